"""ONNX graphs → TensorRT 10.12 to 11: plans without weights, refitted from the graphs.

Networks are strongly typed: the graph's own types decide, so the same code serves both major
versions (11 has no precision flags). A quantised precision (fp8, int8 through modelopt) would be
another graph, written by export_graph; nothing else here would change.

Tested against the real bindings of 10.16 and 11.4 (tests/test_trt_contract.py); no engine has been
built yet, for lack of a GPU.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .bundle import Say
from .config import EngineSpec, Precision
from .graphs import GRAPHS, Graph, write_borders
from .models import Unavailable
from .to_onnx import export_onnx

if TYPE_CHECKING:
    from .trt_session import EngineSession

OLDEST, TOO_NEW = (10, 12), (12, 0)
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_DISTRIBUTIONS = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt")
_REMEDY = "pip install 'tensorrt-cu13>=10.12,<12'"
_OPTIMISATION_LEVEL = 3  # TensorRT's own default, explicit so that it is in the key


def require(precision: Precision, device: str) -> None:
    """Raise Unavailable without a supported version of TensorRT, or without a GPU."""
    missing = []
    if device != "cuda" or not torch.cuda.is_available():
        missing.append("an NVIDIA GPU (torch finds none, or another device was requested)")
    found = _installed_version()
    if found is None:
        missing.append(f"TensorRT 10.12 to 11 ({_REMEDY})")
    elif not OLDEST <= tuple(int(number) for number in found.split(".")[:2]) < TOO_NEW:
        missing.append(f"TensorRT 10.12 to 11, not {found} ({_REMEDY})")
    if missing:
        raise Unavailable(
            f"the trt backend needs {' and '.join(missing)}; --backend ort and inductor also run "
            "on the CPU"
        )
    try:
        import tensorrt  # noqa: F401 # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"TensorRT {found} is installed but does not load ({error}): {_REMEDY}, and see that "
            "the driver is new enough for its CUDA"
        ) from error


def _installed_version() -> str | None:
    """Version of whichever distribution provides the module, without importing it."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def libraries() -> dict[str, str]:
    """Versions that an engine depends on."""
    runtime = {"tensorrt": _installed_version() or "none", "cuda": torch.version.cuda or "none"}
    return {name: version(name) for name in _LIBRARIES} | runtime


def flags(spec: EngineSpec) -> dict[str, Any]:
    """Builder settings that an engine depends on."""
    return {
        "native_group_norm": True,
        "optimisation_level": _OPTIMISATION_LEVEL,
        "max_aux_streams": 0,
        "tf32": False,
        "strip_plan": True,
    }


def export_graph(graph: Graph, folder: Path, spec: EngineSpec) -> None:
    """Write `<graph>.onnx`, which keeps the weights, and `<graph>.json`."""
    export_onnx(graph, folder / f"{graph.name}.onnx", opset=spec.opset, native_group_norm=True)
    write_borders(graph, folder)


def compile_graphs(folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
    """Build `<graph>.plan` for each graph; return the seconds and bytes of each.

    Raises BundleError when TensorRT rejects a graph or cannot run it in this GPU's memory, and
    KeyboardInterrupt between two steps of the build.
    """
    from .trt_build import build_plan

    return {
        "plans": {
            name: build_plan(folder, name, spec, level=_OPTIMISATION_LEVEL, say=say)
            for name in GRAPHS
        }
    }


def open_sessions(folder: Path, spec: EngineSpec) -> dict[str, EngineSession]:
    """A session for each graph; all three share one memory, so only one may run at a time."""
    from .trt_session import open_plans

    return open_plans(folder, spec)
