"""Compile a model for ort, inductor or trt, or open a compiled engine.

An exporter is one of the modules to_ort, to_inductor, to_tensorrt. For each graph, a build records
torch's output and writes the graph. It then frees torch's weights, compiles and opens the engine,
and compares it with torch's outputs. Only then is the bundle stored.
"""

from __future__ import annotations

import gc
import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .bundle import Bundle, BundleError, Say, find_or_build
from .bundle_key import GRAPHS_ONLY
from .config import DEFAULT_OPSET, BackendName, EngineSpec, Precision
from .graphs import GRAPHS, Graph, make_graphs
from .machine import PeakGpuMemory, gpu_identity, peak_host_bytes
from .models import (
    ModelParts,
    ModelSource,
    Unavailable,
    model_reference,
    resolve_vae_precision,
    weights_sha256,
)
from .parity import Reference, check_parity, make_reference

_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate|can't allocate", re.IGNORECASE)
_ONNX_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_EXPORTERS = {"ort": "to_ort", "inductor": "to_inductor", "trt": "to_tensorrt"}
_CODE = {
    "ort": ("to_onnx.py", "to_ort.py"),
    "inductor": ("to_inductor.py",),
    "trt": ("to_onnx.py", "to_tensorrt.py", "trt_build.py"),
}
"""The files that determine an engine's bytes, besides modules.py and graphs.py."""


class Session(Protocol):
    """One compiled graph, with its buffers."""

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result is contiguous, and the next call may overwrite it.

        Inputs are cast to the graph's dtypes. Raises ValueError when shapes do not match.
        """
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Exporter(Protocol):
    """The functions that to_ort, to_inductor and to_tensorrt each define."""

    def require(self, precision: Precision, device: str) -> None:
        """Raise Unavailable when a requirement for this precision and device is missing."""
        ...

    def libraries(self) -> dict[str, str]:
        """Names and versions of all libraries (and drivers) that an engine depends on."""
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
    """The module that compiles for `backend`: ort, inductor or trt."""
    return cast(Exporter, import_module(f".{_EXPORTERS[backend]}", __package__))


def engine_key(
    backend: BackendName, model: ModelSource, spec: EngineSpec, *, tokens: int
) -> dict[str, Any]:
    """Everything that an engine depends on; weights, code and versions determine its graphs."""
    return {**_model_key(model, spec, tokens), **machine_key(backend, spec)}


def _model_key(model: ModelSource, spec: EngineSpec, tokens: int) -> dict[str, Any]:
    """The part of a key for model and shapes; `auto` is resolved, so both name one engine."""
    return {
        "model": model.name,
        "weights": model.weights,
        "weights_sha256": weights_sha256(model),
        "tokens": tokens,
        **spec.as_dict(),
        "vae_precision": resolve_vae_precision(model, spec.precision, spec.vae_precision),
    }


def machine_key(backend: BackendName, spec: EngineSpec) -> dict[str, Any]:
    """The part of a key that depends on this machine and this code, not on the model."""
    return {
        "backend": backend,
        "exporter_sha256": _code_sha256(backend),
        "libraries": exporter(backend).libraries(),
        "flags": exporter(backend).flags(spec),
        **gpu_identity(spec.device),
    }


def graphs_key(
    backend: BackendName, model: ModelSource, spec: EngineSpec, *, tokens: int
) -> dict[str, Any]:
    """The key of ONNX graphs alone, which depend on no runtime and no GPU."""
    return {**_model_key(model, spec, tokens), **graphs_machine_key(backend, spec)}


def graphs_machine_key(backend: BackendName, spec: EngineSpec) -> dict[str, Any]:
    """`machine_key` for ONNX graphs alone."""
    return {
        "backend": GRAPHS_ONLY,
        "exported_for": backend,
        "exporter_sha256": _code_sha256(backend),
        "libraries": {name: version(name) for name in _ONNX_LIBRARIES},
        "flags": exporter(backend).flags(spec),
    }


def _code_sha256(backend: BackendName) -> str:
    code = hashlib.sha256()
    for name in ("modules.py", "graphs.py", *_CODE[backend]):
        code.update((Path(__file__).parent / name).read_bytes())
    return code.hexdigest()


def require_engine(backend: BackendName, model: ModelSource, spec: EngineSpec) -> None:
    """Raise Unavailable when a requirement is missing or the backend cannot build this engine."""
    vae_precision = resolve_vae_precision(model, spec.precision, spec.vae_precision)
    exporter(backend).require(spec.precision, spec.device)
    try:
        exporter(backend).require(vae_precision, spec.device)
    except Unavailable as error:
        raise Unavailable(
            f"encoder and decoder in {vae_precision} (--vae-precision): {error}"
        ) from error
    if backend == "inductor" and (spec.min_batch is not None or spec.opset != DEFAULT_OPSET):
        raise Unavailable(
            "the inductor backend compiles for one batch, not for a range, and not from ONNX: "
            "leave out --min-batch and --opset, or use --backend ort or trt"
        )


def require_graphs(backend: BackendName) -> None:
    """Raise Unavailable unless the backend starts from ONNX graphs."""
    if backend not in ("ort", "trt"):
        raise Unavailable(
            f"the {backend} backend is not made from ONNX graphs: export for --backend ort or trt"
        )


@contextmanager
def _full_memory_told() -> Iterator[None]:
    """Turn any library's out-of-memory error into Unavailable, which says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise Unavailable(
            f"memory is full ({first_line}): close what else uses it, or take a smaller --batch, "
            "--size or --precision"
        ) from error


def open_engine(
    backend: BackendName,
    model: ModelSource,
    parts: ModelParts,
    spec: EngineSpec,
    *,
    tokens: int,
    bundles: Path,
    say: Say,
) -> Bundle:
    """Find the bundle for these settings, or build it; frees the parts.

    Raises Unavailable when a requirement is missing; BundleError for a damaged bundle, an engine
    that does not match torch, or a full disk.
    """
    require_engine(backend, model, spec)
    compiler = exporter(backend)
    key = engine_key(backend, model, spec, tokens=tokens)

    def build(folder: Path) -> dict[str, Any]:
        started, references = time.perf_counter(), []
        for graph in make_graphs(parts, spec, tokens=tokens):
            say(f"exporting the {graph.name}")
            references.append(make_reference(graph))
            compiler.export_graph(graph, folder, spec)
        del graph
        free_parts(parts)
        exported_s = time.perf_counter() - started
        report = compiler.compile_graphs(folder, spec, say)
        parity = _measure(compiler.open_sessions(folder, spec), references)
        return {**report, "parity": parity, **_provenance(model, started, exported_s)}

    def watched_build(folder: Path) -> dict[str, Any]:
        with PeakGpuMemory(spec.device) as gpu, _full_memory_told():
            report = build(folder)
        return report | {"peak_gpu_bytes": gpu.bytes}

    bundle = find_or_build(bundles, key, watched_build, say, model_reference(model))
    free_parts(parts)
    return bundle


def export_graphs(
    backend: BackendName,
    model: ModelSource,
    parts: ModelParts,
    spec: EngineSpec,
    *,
    tokens: int,
    bundles: Path,
    say: Say,
) -> Bundle:
    """Write and check the ONNX graphs that an engine is compiled from; frees the parts.

    Nothing is run: even a full-size model needs neither a GPU nor its runtime. Raises Unavailable
    unless the backend starts from ONNX graphs; BundleError for weights that are NaN or infinite, a
    damaged bundle or a full disk.
    """
    require_graphs(backend)

    def build(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        _check_weights(parts)
        for graph in make_graphs(parts, spec, tokens=tokens):
            say(f"exporting the {graph.name}")
            exporter(backend).export_graph(graph, folder, spec)
        return _provenance(model, started, time.perf_counter() - started)

    key = graphs_key(backend, model, spec, tokens=tokens)
    bundle = find_or_build(bundles, key, build, say, model_reference(model))
    free_parts(parts)
    return bundle


def verify_engine(bundle: Bundle, parts: ModelParts, spec: EngineSpec, say: Say) -> dict[str, Any]:
    """Measure an opened bundle's parity with torch again; frees the parts.

    Raises BundleError beyond the tolerance, or for NaN or infinity.
    """
    with _full_memory_told():
        references = []
        for graph in make_graphs(parts, spec, tokens=bundle.key["tokens"]):
            say(f"running torch's {graph.name}")
            references.append(make_reference(graph))
        del graph
        free_parts(parts)
        return _measure(open_sessions(bundle, spec), references)


def _measure(sessions: dict[str, Session], references: list[Reference]) -> dict[str, Any]:
    """Parity of each graph, at both ends of a range of batches; closes the sessions."""
    try:
        return {
            name: check_parity(held, sessions[reference.graph].run)
            for reference in references
            for name, held in reference.batches().items()
        }
    finally:
        for session in sessions.values():
            session.close()


def _provenance(model: ModelSource, started: float, exported_s: float) -> dict[str, Any]:
    """A bundle's report besides its parity; not part of the key."""
    return {
        "model": model_reference(model),
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "export_seconds": round(exported_s, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_host_bytes": peak_host_bytes(),
    }


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
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def open_sessions(bundle: Bundle, spec: EngineSpec) -> dict[str, Session]:
    """Sessions of a bundle's three graphs."""
    sessions = exporter(bundle.manifest["key"]["backend"]).open_sessions(bundle.folder, spec)
    assert sessions.keys() == set(GRAPHS)
    return sessions
