"""`engine list`, `info` and `remove`: the engines in a folder, and which fit this machine.

Torch is imported only when there is an engine to compare with this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...export.bundle import (
    BundleError,
    bundles_option,
    bytes_of,
    find_bundles,
    named_bundle,
    read_manifest,
    remove_bundle,
    remove_leftovers,
)
from ...export.bundle_key import GRAPHS_ONLY, batch_shape, build_command, why_not
from ...export.config import OPTIONAL, EngineSpec


def list_engines(bundles: Path) -> dict[str, Any]:
    """All stored engines, including damaged ones; `misfit` is empty for one that fits.

    Reads only manifests. Removes leftovers of killed processes.
    """
    freed = remove_leftovers(bundles)
    engines = [_row(folder) for folder in find_bundles(bundles)]
    return {
        "bundles": str(bundles),
        "engines": engines,
        "bytes": sum(engine["bytes"] for engine in engines),
        "leftovers_removed_bytes": freed,
    }


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": folder.name, "bytes": bytes_of(folder)}
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        return {**row, "damaged": str(error), "misfit": ["damaged"]}
    key = manifest["key"]
    shown = ("model", "weights", "backend", "device", "gpu", "precision", "size_px")
    return {
        **row,
        **{field: key.get(field) for field in shown},
        "batch": batch_shape(key),
        "built_at": manifest["report"].get("built_at"),
        "targets": key.get("targets"),
        "ran_on": manifest["report"].get("ran_on"),
        "misfit": misfit(key),
    }


def spec_of(key: Mapping[str, Any]) -> EngineSpec:
    """The spec in a key."""
    names = [each.name for each in fields(EngineSpec) if each.name not in OPTIONAL]
    own: dict[str, Any] = {name: key.get(name) for name in ("trt_library", "calibration")}
    own["targets"] = tuple(key.get("targets", ()))
    return EngineSpec(**{name: key[name] for name in names}, **own)


def misfit(key: Mapping[str, Any]) -> list[str]:
    """Why a stored engine does not fit this machine and this code; empty when it does.

    It does not compare the model's weights, which would have to be read.
    """
    import torch

    from ...export.engines import exporter, machine_key
    from ...export.models import Unavailable
    from ...export.trt_library import builds_ahead, cards_of, here

    graphs_only = key["backend"] == GRAPHS_ONLY
    try:
        spec = spec_of(key)
        if builds_ahead(spec):
            return [f"it runs on {cards_of(spec.targets)}, here is {here() or 'no GPU'}"]
        if spec.device == "cuda" and not graphs_only and not torch.cuda.is_available():
            return [f"gpu {key['gpu']} (here none)"]
        backend = key["exported_for" if graphs_only else "backend"]
        if not graphs_only:
            exporter(backend).require(spec.precision, spec.device)
        here = machine_key(backend, spec, export_only=graphs_only)
    except Unavailable as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        return [f"made by another version of this package ({error})"]
    return why_not(key, {**key, **here})


def not_run(key: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    """{"not_run": why an engine was not compared with torch}; empty when it was."""
    if key["backend"] == GRAPHS_ONLY:
        return {"not_run": "graphs only: nothing was run, so there is no parity with torch"}
    targets, ran_on = key.get("targets"), report.get("ran_on", ())
    if not targets:
        return {}
    from ...export.trt_library import cards_of, here

    waiting = [target for target in targets if target not in ran_on]
    if not waiting or here() in ran_on:
        return {}
    where = "on this card" if here() in targets else f"no {cards_of(waiting)} here"
    return {"not_run": f"engine not yet run: {where}; its first opening compares it"}


def engine_info(bundles: Path, name: str) -> dict[str, Any]:
    """Everything in a stored engine's manifest; reads no other file."""
    folder = named_bundle(bundles, name)
    manifest = read_manifest(folder)
    key, report = manifest["key"], manifest["report"]
    return {
        "engine": folder.name,
        "folder": str(folder),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "key": key,
        "report": report,
        "files": manifest["files"],
        "content_sha256": manifest["content_sha256"],
        "misfit": misfit(key),
        **not_run(key, report),
        "command": build_command(key, report.get("model"), bundles_option(bundles)),
    }


def remove_engines(bundles: Path, names: Sequence[str], everything: bool) -> dict[str, Any]:
    """Remove engines by name or unique prefix, or all; return their names and the bytes freed.

    Raises BundleError, and removes none, when a name matches no engine or several.
    """
    if everything == bool(names):
        raise ValueError("engine remove: expected the names of engines or --all, not both")
    folders = find_bundles(bundles) if everything else [named_bundle(bundles, n) for n in names]
    freed = remove_leftovers(bundles)
    removed = sorted({folder.name for folder in folders})
    freed += sum(remove_bundle(bundles / name) for name in removed)
    return {"bundles": str(bundles), "removed": removed, "freed_bytes": freed}
