"""ONNX graphs → plans of TensorRT 10.15 to 11 or of TensorRT for RTX (trt_library.py).

Networks are strongly typed: the graph's own types decide, so the same code serves all versions (11
has no precision flags) and all precisions (eight_bits.py).

Plans for RTX cards are built by the real library in tests/test_rtx.py. TensorRT's calls are held
against the real bindings of 10.16 and 11.4 (tests/test_trt_contract.py). No plan has been run yet,
for lack of a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import Say
from .config import EngineSpec, Precision, TrtLibraryName
from .graphs import Graph, write_borders
from .to_onnx import export_onnx
from .trt_library import builds_ahead, choose_library, trt_module, trt_versions

if TYPE_CHECKING:
    from .trt_session import EngineSession

BUILD_ORDER = ("decoder", "encoder", "denoiser")
"""The denoiser, which takes minutes, comes last: the decoder is the first to exceed a limit."""
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_OPTIMISATION_LEVEL = 3  # TensorRT's own default, explicit so that it is in the key


def require(precision: Precision, device: str) -> None:
    """Raise Unavailable without a GPU and a library for it."""
    choose_library("auto", device=device)


def libraries(library: TrtLibraryName = "tensorrt") -> dict[str, str]:
    """Versions that an engine depends on."""
    return {name: version(name) for name in _LIBRARIES} | trt_versions(library)


def flags(spec: EngineSpec) -> dict[str, Any]:
    """Builder settings that an engine depends on."""
    return {
        "native_group_norm": True,
        "optimisation_level": _OPTIMISATION_LEVEL,
        "max_aux_streams": 0,
        "tf32": False,
        "strip_plan": spec.trt_library != "rtx",
    }


def export_graph(graph: Graph, folder: Path, spec: EngineSpec) -> None:
    """Write `<graph>.onnx`, which keeps the weights, and `<graph>.json`.

    For a card elsewhere it allows any number of prompts, so that ONNX Runtime can run one here.
    """
    first = graph.inputs[0]
    if builds_ahead(spec) and graph.min_prompts is None and first.shape[0] > first.per_prompt:
        graph = replace(graph, min_prompts=1)
    export_onnx(graph, folder / f"{graph.name}.onnx", opset=spec.opset, native_group_norm=True)
    write_borders(graph, folder)


def compile_graphs(folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
    """Build `<graph>.plan` for each graph; return the seconds and bytes of each.

    Raises BundleError when TensorRT rejects a graph or finds no way to run it, and
    KeyboardInterrupt between two steps of the build.
    """
    from .trt_build import build_plan

    trt, plans = trt_module(spec), {}
    for name in BUILD_ORDER:
        plans[name] = build_plan(trt, folder, name, spec, level=_OPTIMISATION_LEVEL, say=say)
        if spec.trt_library == "rtx":
            for path in folder.glob(f"{name}.onnx*"):  # the plan holds the weights
                path.unlink()
    return {"plans": plans}


def open_sessions(folder: Path, spec: EngineSpec) -> dict[str, EngineSession]:
    """A session for each graph; all three share one memory, so only one may run at a time."""
    from .trt_session import open_plans

    return open_plans(trt_module(spec), folder, spec)
