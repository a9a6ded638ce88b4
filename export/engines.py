"""Compile a model for ort, openvino, inductor or trt, or open a compiled engine.

An exporter is one of the modules to_ort, to_openvino, to_inductor, to_tensorrt. For each graph, a
build records torch's output and writes the graph. It then frees torch's weights, compiles and opens
the engine, and compares it with torch's outputs. Only then is the bundle stored.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .bundle import Bundle, BundleError, ParityError, Say, find_or_build, record_run
from .bundle_key import GRAPHS_ONLY
from .config import (
    DEFAULT_OPSET,
    OPTIONAL,
    BackendName,
    EngineSpec,
    Precision,
    TrtLibraryName,
)
from .eight_bits import FP8_CAPABILITY, Calibration, quantise_graph, require_modelopt
from .graphs import Graph, make_graphs
from .machine import (
    PeakGpuMemory,
    gpu_identity,
    peak_host_bytes,
    return_free_memory,
    tells_full_memory,
)
from .models import (
    TOKENS,
    ModelParts,
    ModelSource,
    Unavailable,
    model_reference,
    resolve_vae_precision,
    weights_sha256,
)
from .parity import (
    Reference,
    check_graphs,
    check_parity,
    in_precision,
    make_host_reference,
    make_references,
)
from .terminal import say
from .trt_library import builds_ahead, cards_of, here

_ONNX_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_EXPORTERS = {
    "ort": "to_ort",
    "openvino": "to_openvino",
    "inductor": "to_inductor",
    "trt": "to_tensorrt",
}
_CODE = {
    "ort": ("to_onnx.py", "to_ort.py"),
    "openvino": ("to_onnx.py", "to_openvino.py"),
    "inductor": ("to_inductor.py",),
    "trt": ("to_onnx.py", "to_tensorrt.py", "trt_build.py"),
}
"""The files that determine an engine's bytes, besides modules.py and graphs.py."""


class Session(Protocol):
    """One compiled graph, with its buffers."""

    rows: int
    """Images of its largest call."""

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result is contiguous, and the next call may overwrite it.

        Inputs are cast to the graph's dtypes. Raises ValueError when shapes do not match.
        """
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Exporter(Protocol):
    """The functions that to_ort, to_openvino, to_inductor and to_tensorrt each define."""

    def require(self, precision: Precision, device: str) -> None:
        """Raise Unavailable when a requirement for this precision and device is missing."""
        ...

    def libraries(self, *trt_library: TrtLibraryName) -> dict[str, str]:
        """Names and versions of all libraries that an engine depends on."""
        ...

    def flags(self, spec: EngineSpec) -> dict[str, Any]:
        """Exporter settings that an engine depends on; plain JSON."""
        ...

    def export_graph(self, graph: Graph, folder: Path, spec: EngineSpec) -> None:
        """Write one graph's files for `compile_graphs`."""
        ...

    def compile_graphs(self, folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
        """Compile the written files for `open_sessions`; return entries for the report.

        Torch's weights are already freed.
        """
        ...

    def open_sessions(self, folder: Path, spec: EngineSpec) -> dict[str, Session]:
        """A session for each of GRAPHS."""
        ...


def exporter(backend: BackendName) -> Exporter:
    """The module that compiles for `backend`: ort, openvino, inductor or trt."""
    # ONNX Runtime reads it when it is imported. Without it, it stores a device id and a database of
    # events in ~/.cache/Microsoft, and looks up a telemetry host, before it can be told to stop.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return cast(Exporter, import_module(f".{_EXPORTERS[backend]}", __package__))


def engine_key(
    backend: BackendName,
    model: ModelSource,
    spec: EngineSpec,
    *,
    tokens: int = TOKENS,
    export_only: bool = False,
) -> dict[str, Any]:
    """Everything that an engine depends on; weights, code and versions determine its graphs.

    `auto` is resolved, so it shares the engine of the precision that it stands for.
    """
    settings = asdict(spec) | {"targets": list(spec.targets)}  # as JSON returns them
    unused = [name for name in OPTIONAL if not settings[name]]
    if spec.trt_library is not None:
        unused = [name for name in unused if name != "targets"]
    settings = {name: value for name, value in settings.items() if name not in unused}
    return {
        "model": model.name,
        "weights": model.weights,
        "weights_sha256": weights_sha256(model),
        "tokens": tokens,
        **settings,
        "vae_precision": resolve_vae_precision(model, spec.precision, spec.vae_precision),
        **machine_key(backend, spec, export_only=export_only),
    }


def machine_key(
    backend: BackendName, spec: EngineSpec, *, export_only: bool = False
) -> dict[str, Any]:
    """The part of a key that depends on this machine and this code, not on the model.

    ONNX graphs alone depend on no runtime and no GPU.
    """
    if export_only:
        named = {"backend": GRAPHS_ONLY, "exported_for": backend}
        libraries, gpu = {name: version(name) for name in _ONNX_LIBRARIES}, {}
    else:
        named = {"backend": backend}
        trt_library = (spec.trt_library,) if spec.trt_library else ()
        libraries = exporter(backend).libraries(*trt_library)
        gpu = gpu_identity("cpu" if spec.targets else spec.device)
    return {
        **named,
        "exporter_sha256": _code_sha256(backend),
        "libraries": libraries,
        "flags": exporter(backend).flags(spec),
        **gpu,
    }


def _code_sha256(backend: BackendName) -> str:
    code = hashlib.sha256()
    for name in ("modules.py", "graphs.py", *_CODE[backend]):
        code.update((Path(__file__).parent / name).read_bytes())
    return code.hexdigest()


def require_engine(
    backend: BackendName, model: ModelSource, spec: EngineSpec, *, export_only: bool = False
) -> None:
    """Raise Unavailable when a requirement is missing or the backend cannot build this engine."""
    if export_only:
        if backend == "inductor":
            raise Unavailable(
                "the inductor backend is not made from ONNX graphs: export for --backend ort or trt"
            )
        return
    if spec.precision == "fp8":
        require_fp8(spec.device, spec.targets)
    if spec.targets:
        return  # choose_library has found what it needs
    vae_precision = resolve_vae_precision(model, spec.precision, spec.vae_precision)
    exporter(backend).require(spec.precision, spec.device)
    try:
        exporter(backend).require(vae_precision, spec.device)
    except Unavailable as error:
        raise Unavailable(
            f"encoder and decoder in {vae_precision} (--vae-precision): {error}"
        ) from error
    if backend == "openvino" and spec.min_batch is not None:
        raise Unavailable(
            "the openvino backend compiles for one batch, not for a range: leave out --min-batch, "
            "or use --backend ort"
        )
    if backend == "inductor" and (spec.min_batch is not None or spec.opset != DEFAULT_OPSET):
        raise Unavailable(
            "the inductor backend compiles for one batch, not for a range, and not from ONNX: "
            "leave out --min-batch and --opset, or use --backend ort or trt"
        )


def require_fp8(device: str, targets: Sequence[str] = ()) -> None:
    """Raise Unavailable unless all cards, the GPU here or `targets`, have units for fp8."""
    cards = targets or (here(),) if device == "cuda" else ()
    lacking = [each for each in cards if each and int(each.removeprefix("sm")) < FP8_CAPABILITY]
    if lacking:
        raise Unavailable(
            f"{cards_of(lacking)} have no units for fp8, which come with compute capability 8.9: "
            "use --precision int8 or fp16"
        )


@contextmanager
def _explain_full_memory() -> Iterator[None]:
    """Turn any library's out-of-memory error into Unavailable, which says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not tells_full_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise Unavailable(
            f"memory is full ({first_line}): close what else uses it, or take a smaller --batch, "
            "--size or --precision"
        ) from error


@contextmanager
def _reported(report: Mapping[str, Any]) -> Iterator[None]:
    """Add what a build has reported so far to the error that refuses its engine."""
    try:
        yield
    except ParityError as error:
        error.report = {**report, **error.report}
        raise


def open_engine(
    backend: BackendName,
    model: ModelSource,
    parts: ModelParts,
    spec: EngineSpec,
    *,
    tokens: int = TOKENS,
    bundles: Path,
    calibration: Calibration | None = None,
    export_only: bool = False,
    keep_refused: bool = False,
) -> Bundle:
    """Find the bundle for these settings, or build it; frees the parts.

    `export_only` stops at checked ONNX graphs and runs nothing: even a full-size model needs
    neither a GPU nor its runtime. `keep_refused` keeps an engine that differs from torch, unused.
    Raises Unavailable when a requirement is missing; BundleError for a damaged bundle, weights that
    are NaN or infinite, an engine that does not match torch, or a full disk.
    """
    require_engine(backend, model, spec, export_only=export_only)
    compiler = exporter(backend)

    ahead = builds_ahead(spec)
    vae_precision = resolve_vae_precision(model, spec.precision, spec.vae_precision)

    @_explain_full_memory()
    def build(folder: Path) -> dict[str, Any]:
        started, references = time.perf_counter(), {}
        report: dict[str, Any] = {}
        if calibration is not None:
            require_modelopt()
            report["left_out"] = calibration.left_out
            report["calibrated_on"] = calibration.described
        if export_only:
            _check_weights(parts)
        with _reported(report), PeakGpuMemory("cpu" if ahead else spec.device) as gpu:
            for graph in make_graphs(parts, spec, tokens=tokens):
                say(f"exporting the {graph.name}")
                if ahead:
                    references[graph.name] = make_host_reference(graph)
                elif not export_only:
                    references |= make_references(graph)
                if calibration is not None:
                    quantise_graph(graph, spec.precision, vae_precision, calibration)
                compiler.export_graph(graph, folder, spec)
            del graph
            free_parts(parts)
            references = in_precision(
                references, spec.precision, vae_precision, tiny_decoder=model.has_tiny_decoder
            )
            exported_s = time.perf_counter() - started
            if ahead:
                report["graph_parity"] = check_graphs(folder, references)
                return_free_memory()
            if not export_only:
                report |= compiler.compile_graphs(folder, spec, say)
            if not (export_only or ahead):
                report["parity"] = _measure(compiler.open_sessions(folder, spec), references)
            if spec.targets and not ahead:
                report["ran_on"] = [here()]
        report |= {
            "model": model_reference(model),
            "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "export_seconds": round(exported_s, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_host_bytes": peak_host_bytes(),
        }
        return report if export_only else report | {"peak_gpu_bytes": gpu.bytes}

    key = engine_key(backend, model, spec, tokens=tokens, export_only=export_only)
    reference = model_reference(model)
    bundle = find_or_build(bundles, key, build, reference, keep_refused=keep_refused)
    if not (ahead or export_only or has_run(bundle, spec)):
        say(f"comparing {bundle.folder.name} with torch: it has not run on {here()} yet")
        verify_engine(bundle, parts, spec)
    free_parts(parts)
    return bundle


def has_run(bundle: Bundle, spec: EngineSpec) -> bool:
    """Whether an engine has been compared with torch on this machine's kind of GPU."""
    return not spec.targets or here() in bundle.manifest["report"].get("ran_on", ())


@_explain_full_memory()
def verify_engine(bundle: Bundle, parts: ModelParts, spec: EngineSpec) -> dict[str, Any]:
    """Measure an opened bundle's parity with torch; frees the parts.

    The first time on a target of TensorRT for RTX is recorded in the manifest. Raises BundleError
    beyond the tolerance, or for NaN or infinity.
    """
    tiny_decoder = parts.tiny_decoder is not None
    references = {}
    for graph in make_graphs(parts, spec, tokens=bundle.key["tokens"]):
        say(f"running torch's {graph.name}")
        references |= make_references(graph)
    del graph
    free_parts(parts)
    references = in_precision(
        references, spec.precision, bundle.key["vae_precision"], tiny_decoder=tiny_decoder
    )
    sessions = exporter(bundle.key["backend"]).open_sessions(bundle.folder, spec)
    parity = _measure(sessions, references)
    if not has_run(bundle, spec):
        record_run(bundle, str(here()), parity)
    return parity


def _measure(
    sessions: Mapping[str, Session], references: Mapping[str, Reference]
) -> dict[str, Any]:
    """Parity with each reference; closes the sessions."""
    try:
        return {
            name: check_parity(reference, sessions[reference.graph].run)
            for name, reference in references.items()
        }
    finally:
        for session in sessions.values():
            session.close()


def _check_weights(parts: ModelParts) -> None:
    for part in (parts.unet, parts.vae):
        for name, values in part.named_parameters():
            # NaN spreads to both. isfinite() takes ten times as long on a CPU: 68 s in fp16.
            if not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
                raise BundleError(
                    f"{type(part).__name__}'s {name} holds NaN or infinite values: check the "
                    "weights, or use a higher precision"
                )


def free_parts(parts: ModelParts) -> None:
    """Free the networks, even while others still hold `parts`."""
    vars(parts).clear()
    gc.collect()
    return_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
