"""`engine build` and `engine verify`: build an engine from options; check stored engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...export.bundle import (
    Bundle,
    BundleError,
    bundles_option,
    open_bundle,
    stored_folder,
)
from ...export.bundle_key import GRAPHS_ONLY, build_command
from ...export.config import EIGHT_BITS, UNBUILT, BackendName, EngineSpec
from ...export.eight_bits import Calibration, random_calibration, require_modelopt
from ...export.engines import engine_key, has_run, open_engine, require_engine, verify_engine
from ...export.hashes import forget_hashes
from ...export.models import (
    ModelError,
    ModelParts,
    ModelSource,
    Unavailable,
    find_model,
    load_parts,
    resolve_vae_precision,
    weights_sha256,
)
from ...export.terminal import say
from ...export.trt_library import builds_ahead, parse_targets
from ..config import usual_px
from ..coreset.coreset import open_coreset
from ..coreset.hub import fetched
from ..coreset.manifest import coreset_folder
from ..expand.backends import COMPILED, choose_backend, require_backend, resolve_device, trt_choice
from ..expand.calibration import plan_calibration
from ..expand.expander import Expander
from ..expand.naming import expand_config, named_model, prompts_of
from ..options import EngineBuild
from .catalogue import misfit, not_run, spec_of
from .needs import check_room, engine_needs


def build_engine(command: EngineBuild, bundles: Path) -> dict[str, Any]:
    """Build the requested engine, or find it stored; return its description.

    Raises Unavailable when a library, a GPU, memory or disk space is missing; ValueError when
    options do not fit the model; BundleError for NaN weights or an engine that differs from torch.
    """
    backend, model, spec = _plan(command)
    if command.verify:
        forget_hashes()
    flags = {"export_only": command.export_only, "keep_refused": command.keep_refused}
    calibration = _calibration(command, model, spec)
    if calibration is not None:
        spec = replace(spec, calibration=calibration.sha256)
    bundle = prepare_engine(backend, model, spec, bundles, calibration=calibration, **flags)
    return describe(bundle) | {"built": bundle.built}


def prepare_engine(
    backend: BackendName,
    model: ModelSource,
    spec: EngineSpec,
    bundles: Path,
    *,
    calibration: Calibration | None = None,
    export_only: bool = False,
    keep_refused: bool = False,
) -> Bundle:
    """Find the engine of these settings stored, or build it, and free its memory.

    An engine that has not run on this card yet is compared with torch. Raises as build_engine does.
    """
    key = engine_key(backend, model, spec, export_only=export_only)
    folder = stored_folder(bundles, key)
    if folder is not None:
        bundle = open_bundle(folder, key)
        if builds_ahead(spec) or has_run(bundle, spec):
            return bundle
    needs = engine_needs(model, spec, backend, export_only=export_only)
    place = "cpu" if builds_ahead(spec) else spec.device
    if folder is None:
        check_room(needs, place, bundles)
    if backend == "inductor" and spec.device == "cuda":
        say("AOTInductor on a GPU: 10 to 30 minutes for SDXL-Turbo, as an estimate")
    say(f"loading {model.name} ({needs.parameters()} parameters, {spec.precision})")
    parts = _load_parts(model, spec, place)
    flags = {"export_only": export_only, "keep_refused": keep_refused}
    return open_engine(
        backend, model, parts, spec, bundles=bundles, calibration=calibration, **flags
    )


def _calibration(command: EngineBuild, model: ModelSource, spec: EngineSpec) -> Calibration | None:
    """The calibration of an engine in eight bits; None for others."""
    if spec.precision not in EIGHT_BITS:
        if command.calibrate is not None:
            raise ValueError("--calibrate is for --precision int8 or fp8: leave it out")
        return None
    require_modelopt()
    if model.weights == "random":
        return random_calibration(model)
    if command.calibrate is None:
        raise ValueError(
            f"--precision {spec.precision} is calibrated on patches: give a run or a coreset with "
            "--calibrate"
        )
    coreset = open_coreset(coreset_folder(fetched(command.calibrate)))
    config = expand_config(
        named_model(coreset),
        size_px=spec.size_px,
        seed=coreset.settings["seed"],
        precision=spec.precision,
        vae_precision="auto",
        device="cpu" if builds_ahead(spec) else spec.device,
    )
    from_patches = config.start == "image"
    return plan_calibration(
        Expander,
        model,
        config,
        patches_NHWC=coreset.patches() if from_patches else None,
        labels_N=coreset.labels_N.numpy(),
        prompts_K=prompts_of(coreset),
    )


def _load_parts(model: ModelSource, spec: EngineSpec, device: str) -> ModelParts:
    return load_parts(
        model,
        precision=spec.precision,
        vae_precision=spec.vae_precision,
        device=device,
        runs_on=spec.device,
    )


def _plan(command: EngineBuild) -> tuple[BackendName, ModelSource, EngineSpec]:
    """Resolve the options and report chosen defaults; refuse a build that cannot work here."""
    targets = parse_targets(command.targets)
    device = "cuda" if targets else resolve_device(command.device)
    half = command.export_only or device == "cuda"
    precision = command.precision or ("fp16" if half else "fp32")
    backend = command.backend
    library = None
    if backend == "trt" and not command.export_only:
        library, targets = trt_choice(command.trt_library, device, targets)
    elif not command.export_only:
        require_backend(backend, precision, device)
    name = command.model or ("sdxl-turbo" if device == "cuda" else "sdxl-tiny")
    if command.model is None:
        say(f"model: {name} (on {device}; choose with --model)")
    model = find_model(name, command.weights)
    size_px = command.size or usual_px(model.trained_px())
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
        vae_precision=resolve_vae_precision(model, precision, command.vae_precision),
        opset=command.opset,
        device=device,
        trt_library=library,
        targets=targets,
    )
    if backend == "auto":
        backend = "ort" if command.export_only else _choose_built(spec)
        say(f"backend: {backend} on {device}")
        if backend == "trt":
            library, targets = trt_choice(command.trt_library, device)
            spec = replace(spec, trt_library=library, targets=targets)
    if backend in UNBUILT:
        raise ValueError(
            f"the {backend} backend is torch itself and has nothing to build: choose --backend "
            "openvino, ort, inductor or trt"
        )
    require_engine(backend, model, spec, export_only=command.export_only)
    return backend, model, spec


def _choose_built(spec: EngineSpec) -> BackendName:
    """Resolve `auto` for a build: as for a run, but a backend that builds engines."""
    backend = choose_backend(spec)
    for each in COMPILED if backend in UNBUILT else ():
        try:
            require_backend(each, spec.precision, spec.device)
            return each
        except Unavailable:
            continue
    return backend


def describe(bundle: Bundle) -> dict[str, Any]:
    """A build's report on its engine, without hashes."""
    shown = ("model", "weights", "backend", "device", "gpu", "precision", "vae_precision")
    shapes = ("size_px", "batch", "min_batch", "images_per_prompt", "opset")
    return {
        "engine": bundle.folder.name,
        "folder": str(bundle.folder),
        **{field: bundle.key.get(field) for field in (*shown, *shapes)},
        "bytes": bundle.size_bytes,
        **bundle.manifest["report"],
        **not_run(bundle.key, bundle.manifest["report"]),
    }


def verify_engines(
    folders: Sequence[Path], show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Verify each engine and `show` its result at once.

    Raises BundleError at the end if any is wrong or cannot run here; it says which, and why.
    """
    forget_hashes()
    results, faults = [], []
    for folder in folders:
        say(f"verifying {folder.name}")
        try:
            results.append(_verify_stored(folder))
            show(results[-1])
        except (ValueError, OSError) as error:
            faults.append(f"{folder.name}: {error}")
    if faults:
        right = f"{len(results)} of {len(folders)} engines are right; " if len(folders) > 1 else ""
        raise BundleError(right + "; ".join(faults))
    return results


def _verify_stored(folder: Path) -> dict[str, Any]:
    """Verify every byte of a stored engine, then measure its parity with torch again.

    Raises BundleError, which says what is wrong or why it cannot run here. Graphs that were only
    exported have no parity, nor has an engine for a card elsewhere; `not_run` says so.
    """
    bundle = open_bundle(folder)
    result = {
        "engine": folder.name,
        "files": len(bundle.manifest["files"]),
        "bytes": bundle.size_bytes,
    }
    if bundle.key["backend"] == GRAPHS_ONLY or builds_ahead(spec_of(bundle.key)):
        return {**result, **not_run(bundle.key, bundle.manifest["report"]), "parity": None}
    return {**result, "parity": _measure_parity(bundle)}


def _measure_parity(bundle: Bundle) -> dict[str, Any]:
    """Measure an engine's parity with torch again.

    Raises BundleError when it does not fit this machine, or its model is gone or has changed.
    """
    key = bundle.key
    name = bundle.manifest["report"].get("model") or key["model"]
    rebuild = build_command(key, name, bundles_option(bundle.folder.parent))
    if differences := misfit(key):
        raise BundleError(
            f"its bytes are right, but it does not fit this machine: {', '.join(differences)}; "
            f"`{rebuild}` builds one that does"
        )
    try:
        model = find_model(name, key["weights"])
    except (ModelError, Unavailable) as error:
        raise BundleError(
            f"its bytes are right, but the model that it was built from is gone: {error}"
        ) from error
    before, now = key["weights_sha256"], weights_sha256(model)
    if now != before:
        raise BundleError(
            f"its bytes are right, but the weights in {model.folder} have changed since it was "
            f"built (sha256 {before[:12]} then, {now[:12]} now): `{rebuild}` builds an engine from "
            "the new ones"
        )
    spec = spec_of(key)
    return verify_engine(bundle, _load_parts(model, spec, spec.device), spec)
