"""Compile a model for a backend, or open what was compiled: one way for ort, inductor and trt.

An exporter is one of the modules to_ort, to_inductor, to_tensorrt. A build goes: graph by graph
torch's answers are kept and the graph is written; then torch's weights are freed; then what was
written is compiled, opened, and held against torch's answers. Only then is the bundle stored.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .bundle import Bundle, find_or_build
from .config import BackendName, EngineSpec, Precision
from .graphs import GRAPHS, Graph, make_graphs
from .models import (
    ModelParts,
    ModelSource,
    Unavailable,
    resolve_vae_precision,
    weights_sha256,
)
from .parity import check_parity, make_reference

Say = Callable[[str], None]
_EXPORTERS = {"ort": "to_ort", "inductor": "to_inductor", "trt": "to_tensorrt"}


class Session(Protocol):
    """One compiled graph, with its buffers."""

    def run(self, *inputs: Tensor) -> Tensor:
        """Run it; the result may be a buffer that the next call overwrites.

        Inputs are cast to the graph's types. ValueError: shapes that are not the graph's.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Exporter(Protocol):
    """What to_ort, to_inductor and to_tensorrt each define."""

    def require(self, precision: Precision, device: str) -> None:
        """Unavailable: what this backend needs there and for that is not here."""
        ...

    def libraries(self) -> dict[str, str]:
        """Names and versions of all libraries (and drivers) that an engine depends on."""
        ...

    def flags(self, spec: EngineSpec) -> dict[str, Any]:
        """Settings of the exporter that an engine depends on; plain JSON."""
        ...

    def export_graph(self, graph: Graph, folder: Path, spec: EngineSpec) -> None:
        """Write what `compile_graphs` needs of one graph."""
        ...

    def compile_graphs(self, folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
        """Turn what was written into what is opened; returns what is worth reporting.

        Torch holds no weights any more.
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
    """All that an engine depends on. The graphs' bytes follow from it: weights, code, versions."""
    code = hashlib.sha256()
    for name in ("modules.py", "graphs.py", "to_onnx.py", f"{_EXPORTERS[backend]}.py"):
        code.update((Path(__file__).parent / name).read_bytes())
    gpu = torch.cuda.get_device_properties() if spec.device == "cuda" else None
    return {
        "backend": backend,
        "model": model.name,
        "weights": model.weights,
        "weights_sha256": weights_sha256(model),
        "exporter_sha256": code.hexdigest(),
        "libraries": exporter(backend).libraries(),
        "gpu": gpu and gpu.name,
        "sm_count": gpu and gpu.multi_processor_count,
        "tokens": tokens,
        "flags": exporter(backend).flags(spec),
        **spec.as_dict(),
        "vae_precision": resolve_vae_precision(model, spec.precision, spec.vae_precision),
    }


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
    """Find the bundle for these settings, or build it; the parts are taken over and freed.

    Unavailable: what the backend needs is missing. BundleError: a damaged bundle, an engine that
    does not match torch, or a full disk.
    """
    compiler = exporter(backend)
    compiler.require(spec.precision, spec.device)
    compiler.require(resolve_vae_precision(model, spec.precision, spec.vae_precision), spec.device)
    if spec.min_batch is not None and backend == "inductor":
        raise Unavailable(
            "the inductor backend compiles for one batch, not for a range: leave out the smallest "
            "batch, or use --backend ort or trt"
        )
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
        sessions = compiler.open_sessions(folder, spec)
        try:
            parity = {
                reference.graph: check_parity(reference, sessions[reference.graph].run)
                for reference in references
            }
        finally:
            for session in sessions.values():
                session.close()
        seconds = time.perf_counter() - started
        return {
            **report,
            "parity": parity,
            "export_seconds": round(exported_s, 1),
            "seconds": round(seconds, 1),
        }

    bundle = find_or_build(bundles, key, build, say)
    free_parts(parts)
    return bundle


def free_parts(parts: ModelParts) -> None:
    """Let go of the networks, whoever else still holds `parts`."""
    vars(parts).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def open_sessions(bundle: Bundle, spec: EngineSpec) -> dict[str, Session]:
    """Sessions of a bundle's three graphs."""
    sessions = exporter(bundle.manifest["key"]["backend"]).open_sessions(bundle.folder, spec)
    assert sessions.keys() == set(GRAPHS)
    return sessions
