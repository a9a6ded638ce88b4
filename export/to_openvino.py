"""ONNX graphs → OpenVINO on the CPU: fp32, or bf16 by a hint where the CPU has units for it.

In bf16 the graph holds the model's weights as fp32 numbers, which OpenVINO rounds back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from .bundle import Say
from .config import EngineSpec, Precision
from .graphs import GRAPHS, Graph, Port, read_borders, write_borders
from .models import Unavailable
from .to_onnx import export_onnx

OLDEST = "2026.0"
STORED_BYTES = 2**31
"""A larger graph is stored as ONNX, because OpenVINO makes a compiled one in memory."""
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "openvino")
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def require(precision: Precision, device: str) -> None:
    """Raise Unavailable where OpenVINO cannot compute, or not in this precision without a loss of
    speed."""
    core = _core()
    if device != "cpu":
        raise Unavailable("the openvino backend runs on the CPU: use --device cpu")
    if precision not in ("fp32", "bf16", "int8"):
        raise Unavailable(
            f"the openvino backend runs fp32, bf16 or int8, not {precision}: use --precision bf16"
        )
    if precision == "bf16" and "BF16" not in _capabilities(core):
        raise Unavailable(
            "this CPU has no units for bf16, so OpenVINO would compute in fp32: use "
            "--precision fp32"
        )


def libraries() -> dict[str, str]:
    """Versions that an engine depends on."""
    _core()
    return {name: version(name) for name in _LIBRARIES}


def flags(spec: EngineSpec) -> dict[str, Any]:
    """GroupNorm as InstanceNormalization, and the CPU's units. sdxl-tiny's denoiser and decoder are
    as fast as with OpenVINO's own GroupNormalization in fp32, and 28 and 8 % faster in bf16."""
    return {"native_group_norm": False, "cpu": _capabilities(_core())}


@torch.no_grad()
def export_graph(graph: Graph, folder: Path, spec: EngineSpec) -> None:
    """Write `<graph>.onnx` in fp32, and `<graph>.json` with the graph's own dtypes."""
    write_borders(graph, folder)
    inputs = tuple(_as_fp32(port) for port in graph.inputs)
    named = replace(graph, inputs=inputs, output=_as_fp32(graph.output))
    with _in_fp32(graph.module):
        export_onnx(named, folder / f"{graph.name}.onnx", opset=spec.opset, native_group_norm=False)


def compile_graphs(folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
    """Compile the graphs, so that they open in half the time."""
    for name in GRAPHS:
        files = [*folder.glob(f"{name}.onnx*")]  # with weights beside a large graph
        if sum(path.stat().st_size for path in files) > STORED_BYTES:
            continue
        blob = _compiled(folder, name, spec).export_model()
        (folder / f"{name}.blob").write_bytes(blob.getbuffer())
        for path in files:
            path.unlink()
    return {}


def open_sessions(folder: Path, spec: EngineSpec) -> dict[str, OpenVinoSession]:
    """A session for each graph."""
    return {name: OpenVinoSession(folder, name, spec) for name in GRAPHS}


class OpenVinoSession:
    """One graph at its static batch; inputs and output are torch's memory, without a copy."""

    def __init__(self, folder: Path, name: str, spec: EngineSpec) -> None:
        borders = read_borders(folder, name)
        self._inputs, self.rows = borders.inputs, borders.inputs[0].shape[0]
        self._request = _compiled(folder, name, spec).create_infer_request()
        self._output = torch.empty(borders.output.shape)
        self._request.set_output_tensor(0, _shared(self._output))

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result, fp32, is overwritten by the next call.

        Raises ValueError when shapes do not match.
        """
        alive = []  # a request does not hold the memory of its inputs
        for place, (port, value) in enumerate(zip(self._inputs, inputs, strict=True)):
            if tuple(value.shape) != port.shape:
                raise ValueError(
                    f"{port.name} must be {list(port.shape)}, the engine's shape, "
                    f"got {list(value.shape)}"
                )
            alive.append(value.detach().float().contiguous())
            self._request.set_input_tensor(place, _shared(alive[-1]))
        self._request.infer()
        return self._output

    def close(self) -> None:
        """Free the session and its buffers."""
        del self._request, self._output


def _hint(folder: Path, name: str, spec: EngineSpec) -> str:
    """OpenVINO's name of a graph's precision; beside int8 it is bf16 where the CPU has it."""
    of_vae = spec.precision if spec.vae_precision == "auto" else spec.vae_precision
    if (spec.precision if name == "denoiser" else of_vae) == "int8":
        return "bf16" if "BF16" in _capabilities(_core()) else "f32"
    return _HINTS[read_borders(folder, name).output.dtype]


def _compiled(folder: Path, name: str, spec: EngineSpec) -> Any:
    """The compiled graph, from its blob if there is one."""
    settings = {
        "INFERENCE_PRECISION_HINT": _hint(folder, name, spec),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # students train on the same cores
    }
    blob = folder / f"{name}.blob"
    if blob.is_file():
        return _core().import_model(blob.read_bytes(), "CPU", settings)
    return _core().compile_model(folder / f"{name}.onnx", "CPU", settings)


def _shared(values: Tensor) -> Any:
    import openvino

    return openvino.Tensor(values.numpy(), shared_memory=True)


def _as_fp32(port: Port) -> Port:
    return replace(port, dtype=torch.float32)


@contextmanager
def _in_fp32(module: torch.nn.Module) -> Iterator[None]:
    """The module in fp32; afterwards in its own dtype again, which loses nothing."""
    own = next(module.parameters()).dtype
    module.to(torch.float32)
    try:
        yield
    finally:
        module.to(own)


def _capabilities(core: Any) -> list[str]:
    return sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@cache
def _core() -> Any:
    """Raises Unavailable without OpenVINO, or with one that is too old."""
    remedy = "pip install 'patchbloom[openvino]', or use --backend ort"
    # OpenVINO sends telemetry when it is imported, by this module if it finds it.
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    try:
        found = version("openvino")
        from openvino import Core
    except (ImportError, PackageNotFoundError):
        raise Unavailable(f"the openvino backend needs OpenVINO: {remedy}") from None
    if Version(found) < Version(OLDEST):
        raise Unavailable(f"the openvino backend needs OpenVINO {OLDEST}, got {found}: {remedy}")
    return Core()
