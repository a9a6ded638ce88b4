"""`engine build` and `engine verify`: build an engine from options; check stored engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export.bundle import Bundle, BundleError, Say, open_bundle
from ...export.bundle_key import GRAPHS_ONLY, build_command, bundle_name
from ...export.config import BackendName, EngineSpec
from ...export.engines import (
    engine_key,
    export_graphs,
    graphs_key,
    open_engine,
    require_engine,
    require_graphs,
    verify_engine,
)
from ...export.models import (
    TOKENS,
    ModelError,
    ModelSource,
    Unavailable,
    find_model,
    load_parts,
    weights_sha256,
)
from ..expand.backends import choose_backend, require_backend, resolve_device
from ..options import EngineBuild
from .catalogue import misfit, spec_of
from .needs import check_room, engine_needs


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """A fully resolved build."""

    model: ModelSource
    backend: BackendName
    spec: EngineSpec
    export_only: bool


def build_engine(command: EngineBuild, bundles: Path, say: Say) -> dict[str, Any]:
    """Build the requested engine, or find it stored; return its description.

    Raises Unavailable when a library, a GPU, memory or disk space is missing; ValueError when
    options do not fit the model; BundleError for NaN weights or an engine that differs from torch.
    """
    plan = plan_build(command, say)
    key_of = graphs_key if plan.export_only else engine_key
    key = key_of(plan.backend, plan.model, plan.spec, tokens=TOKENS)
    folder = bundles / bundle_name(key)
    bundle = open_bundle(folder, key, say) if folder.exists() else _build(plan, bundles, say)
    return describe(bundle) | {"built": bundle.built}


def plan_build(command: EngineBuild, say: Say) -> BuildPlan:
    """Resolve the options and report defaults that were chosen; refuse what cannot work here."""
    device = resolve_device(command.device)
    half = command.export_only or device == "cuda"
    precision = command.precision or ("fp16" if half else "fp32")
    backend = command.backend
    if not command.export_only:
        require_backend(backend, precision, device)
    name = command.model or ("sdxl-turbo" if device == "cuda" else "sdxl-tiny")
    if command.model is None:
        say(f"model: {name} (on {device}; choose with --model)")
    model = find_model(name, command.weights)
    size_px = command.size or model.trained_px()
    if size_px % model.vae_factor():
        raise ValueError(
            f"--size {size_px}: expected a multiple of {model.vae_factor()}, by which the VAE of "
            f"{model.name} shrinks images"
        )
    spec = EngineSpec(
        size_px=size_px,
        batch=command.batch,
        min_batch=command.min_batch,
        images_per_prompt=command.images_per_prompt,
        precision=precision,
        vae_precision=command.vae_precision,
        opset=command.opset,
        device=device,
    )
    if backend == "auto":
        backend = "ort" if command.export_only else _choose_built(spec)
        say(f"backend: {backend} on {device}")
    if backend == "eager":
        raise ValueError(
            "the eager backend is torch itself and has nothing to build: choose --backend ort, "
            "inductor or trt"
        )
    if command.export_only:
        require_graphs(backend)
    else:
        require_engine(backend, model, spec)
    return BuildPlan(model=model, backend=backend, spec=spec, export_only=command.export_only)


def _choose_built(spec: EngineSpec) -> BackendName:
    """Resolve `auto` for a build: as for a run, but the first compiled backend instead of eager."""
    backend = choose_backend(spec)
    order: tuple[BackendName, ...] = ("trt", "inductor", "ort")
    for each in order if backend == "eager" else ():
        try:
            require_backend(each, spec.precision, spec.device)
            return each
        except Unavailable:
            continue
    return backend


def _build(plan: BuildPlan, bundles: Path, say: Say) -> Bundle:
    spec = plan.spec
    needs = engine_needs(plan.model, spec, plan.backend, export_only=plan.export_only)
    check_room(needs, spec, bundles)
    say(f"loading {plan.model.name} ({needs.parameters()} parameters, {spec.precision})")
    parts = load_parts(
        plan.model,
        precision=spec.precision,
        vae_precision=spec.vae_precision,
        device=spec.device,
    )
    make: Callable[..., Bundle] = export_graphs if plan.export_only else open_engine
    return make(plan.backend, plan.model, parts, spec, tokens=TOKENS, bundles=bundles, say=say)


def describe(bundle: Bundle) -> dict[str, Any]:
    """A build's report on its engine, without the hashes."""
    shown = ("model", "weights", "backend", "device", "gpu", "precision", "vae_precision")
    shapes = ("size_px", "batch", "min_batch", "images_per_prompt", "opset")
    return {
        "engine": bundle.folder.name,
        "folder": str(bundle.folder),
        **{field: bundle.key.get(field) for field in (*shown, *shapes)},
        "bytes": bundle.size_bytes,
        **bundle.manifest["report"],
    }


def verify_engines(
    folders: Sequence[Path], say: Say, show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Verify each engine and `show` its result at once.

    Raises BundleError at the end if any is wrong or cannot run here; it says which, and why.
    """
    results, faults = [], []
    for folder in folders:
        say(f"verifying {folder.name}")
        try:
            results.append(verify_stored(folder, say))
            show(results[-1])
        except (ValueError, OSError) as error:
            faults.append(f"{folder.name}: {error}")
    if faults:
        right = f"{len(results)} of {len(folders)} engines are right; " if len(folders) > 1 else ""
        raise BundleError(right + "; ".join(faults))
    return results


def verify_stored(folder: Path, say: Say) -> dict[str, Any]:
    """Verify every byte of a stored engine, then measure its parity with torch again.

    Raises BundleError, which says what is wrong or why it cannot run here. Graphs that were only
    exported have no parity.
    """
    bundle = open_bundle(folder, say=say)
    result: dict[str, Any] = {
        "engine": folder.name,
        "files": len(bundle.manifest["files"]),
        "bytes": bundle.size_bytes,
        "parity": None,
    }
    if bundle.key["backend"] != GRAPHS_ONLY:
        result["parity"] = _parity_anew(bundle, say)
    return result


def _parity_anew(bundle: Bundle, say: Say) -> dict[str, Any]:
    differences = misfit(bundle.key)
    if differences:
        raise BundleError(
            f"its bytes are right, but it does not fit this machine: {', '.join(differences)}; "
            f"`{_rebuild(bundle)}` builds one that does"
        )
    spec = spec_of(bundle.key)
    parts = load_parts(
        _model_of(bundle),
        precision=spec.precision,
        vae_precision=spec.vae_precision,
        device=spec.device,
    )
    return verify_engine(bundle, parts, spec, say)


def _model_of(bundle: Bundle) -> ModelSource:
    """The bundle's model. Raises BundleError when it is gone or its weights have changed."""
    name = bundle.manifest["report"]["model"]
    try:
        model = find_model(name, bundle.key["weights"])
    except (ModelError, Unavailable) as error:
        raise BundleError(
            f"its bytes are right, but the model that it was built from is gone: {error}"
        ) from error
    before, now = bundle.key["weights_sha256"], weights_sha256(model)
    if now != before:
        raise BundleError(
            f"its bytes are right, but the weights in {model.folder} have changed since it was "
            f"built (sha256 {before[:12]} then, {now[:12]} now): `{_rebuild(bundle)}` builds an "
            "engine from the new ones"
        )
    return model


def _rebuild(bundle: Bundle) -> str:
    return build_command(bundle.key, bundle.manifest["report"]["model"])
