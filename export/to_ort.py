"""ONNX graphs → ONNX Runtime sessions, which run on the requested device or not at all."""

from __future__ import annotations

from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import DEFAULT_OPSET, EngineSpec, Precision
from .graphs import GRAPHS, Graph, prompts_of
from .machine import tells_full_memory
from .models import Unavailable
from .to_onnx import export_onnx

_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENTS = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
}
_CUDA_REMEDY = (
    "pip install 'patchbloom[cuda]', or if it is there, pip install --force-reinstall --no-deps "
    "onnxruntime-gpu, which onnxruntime has overwritten; or use --backend eager"
)


def require(precision: Precision, device: str) -> None:
    """Raise Unavailable where ONNX Runtime cannot compute, or not in this precision."""
    require_ort(device)
    if precision not in ("fp32", "int8", "fp16" if device == "cuda" else "fp32"):
        raise Unavailable(
            "the ort backend runs fp32 and int8 on the CPU, those and fp16 on a GPU, not "
            f"{precision} on {device}: use --precision fp32, or --backend eager"
        )
    if device == "cuda":
        run_one_node(device)


def libraries() -> dict[str, str]:
    """Versions that an engine depends on."""
    # The module's version: the distribution may be onnxruntime, onnxruntime-gpu, ...
    runtime = {"onnxruntime": require_ort("cpu").__version__}
    return {name: version(name) for name in _LIBRARIES} | runtime


def flags(spec: EngineSpec) -> dict[str, Any]:
    """GroupNorm as InstanceNormalization: neither provider has a kernel for GroupNormalization."""
    return {"native_group_norm": False}


def export_graph(graph: Graph, folder: Path, spec: EngineSpec) -> None:
    """Write `<graph>.onnx`."""
    export_onnx(graph, folder / f"{graph.name}.onnx", opset=spec.opset, **flags(spec))


def compile_graphs(folder: Path, spec: EngineSpec, say: Any) -> dict[str, Any]:
    """Nothing to do: ONNX Runtime optimises a graph when it opens it."""
    return {}


def open_sessions(folder: Path, spec: EngineSpec) -> dict[str, OrtSession]:
    """A session for each graph."""
    prompts = (spec.min_prompts, spec.prompts)
    return {name: OrtSession(folder / f"{name}.onnx", spec.device, prompts) for name in GRAPHS}


class OrtSession:
    """One graph on one provider, with its output buffer; inputs and output are torch tensors.

    `graph`: a file, or its bytes. `prompts`: fewest and most prompts per call, for a graph with a
    range of batches.
    """

    def __init__(self, graph: Path | bytes, device: str, prompts: tuple[int, int] = (1, 1)) -> None:
        onnxruntime, provider = require_ort(device), _PROVIDERS[device]
        missing = _load_cuda_libraries() if device == "cuda" else ""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin between operators save 15 % of sdxl-tiny's time. Between calls torch
        # works on the same cores, and a spinning pool would take them from it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        settings = {} if self._stream is None else cuda_settings(self._stream)
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=[(provider, settings)], enable_fallback=0
        )
        self._session.disable_fallback()
        if self._session.get_providers()[0] != provider:
            raise Unavailable(
                f"ONNX Runtime does not open its {provider} ({missing or 'its message is above'}): "
                f"{_CUDA_REMEDY}"
            )
        # The host need not wait for the GPU after every call: torch's stream does, in run().
        self._unwaited = onnxruntime.RunOptions()
        self._unwaited.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._device, self._binding = device, self._session.io_binding()
        self._inputs, self._result = self._session.get_inputs(), self._session.get_outputs()[0]
        self._fewest, self._most = prompts
        self.rows = _shape(self._inputs[0], self._most)[0]
        self._output = torch.empty(
            _shape(self._result, self._most), dtype=_ELEMENTS[self._result.type][0], device=device
        )
        self._bind(self._binding.bind_output, self._result, self._output)

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result is overwritten by the next call.

        Inputs are cast to the graph's dtypes. Raises ValueError when shapes do not match.
        """
        output, prompts = self._output, self._most
        if _per_prompt(self._result):
            prompts = self._prompts_of(inputs[0])
            output = self._output[: prompts * _per_prompt(self._result)]
            self._bind(self._binding.bind_output, self._result, output)
        cast = []
        for port, value in zip(self._inputs, inputs, strict=True):
            shape = _shape(port, prompts)
            if list(value.shape) != shape:
                raise ValueError(
                    f"{port.name} must be {shape}, the engine's shape, got {list(value.shape)}"
                )
            cast.append(value.to(self._device, _ELEMENTS[port.type][0]).contiguous())
            self._bind(self._binding.bind_input, port, cast[-1])
        if self._stream is None:
            self._session.run_with_iobinding(self._binding)
            return output
        # ONNX Runtime waits only for its own stream, not for the kernels that fill its inputs or
        # still read its last output.
        torchs = torch.cuda.current_stream()
        self._stream.wait_stream(torchs)
        self._session.run_with_iobinding(self._binding, self._unwaited)
        torchs.wait_stream(self._stream)
        return output

    def _prompts_of(self, first: Tensor) -> int:
        port, limits = self._inputs[0], {"fewest": self._fewest, "most": self._most}
        return prompts_of(port.name, len(first), _per_prompt(port), **limits)

    def close(self) -> None:
        """Free the session and its buffers."""
        del self._binding, self._session, self._output

    def _bind(self, bind: Any, port: Any, value: Tensor) -> None:
        bind(
            name=port.name,
            device_type=self._device,
            device_id=value.device.index or 0,
            element_type=_ELEMENTS[port.type][1],
            shape=tuple(value.shape),
            buffer_ptr=value.data_ptr(),
        )


def _per_prompt(port: Any) -> int:
    """Rows per prompt of a port whose first dimension is "8*prompts"; 0 if it is static."""
    side = port.shape[0]
    if isinstance(side, int):
        return 0
    return int(side.split("*")[0]) if "*" in side else 1


def _shape(port: Any, prompts: int) -> list[int]:
    """A port's shape for this many prompts."""
    return [_per_prompt(port) * prompts or port.shape[0], *port.shape[1:]]


def cuda_settings(stream: torch.cuda.Stream) -> dict[str, str]:
    """Options of the CUDA provider: compute on this stream and its device, fp32 in fp32.

    It is our own stream, because torch's default stream has handle 0, which ONNX Runtime takes for
    none: it would make its own, and read inputs that torch has not written yet. By default fp32 is
    computed in TF32, whose 10 bits miss PARITY_TOLERANCE, and the memory arena doubles as it grows.
    """
    return {
        "device_id": str(stream.device_index),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }


def _load_cuda_libraries() -> str:
    """Load the CUDA and cuDNN libraries that pip installed; why some do not load, or nothing."""
    import onnxruntime

    with redirect_stdout(StringIO()) as told:
        onnxruntime.preload_dlls()
    lines = told.getvalue().splitlines()
    missing = [line.partition(": ")[2] for line in lines if line.startswith("Failed to load")]
    if missing:
        onnxruntime.set_default_logger_severity(4)  # it would say the same again, in many lines
    return "; ".join(missing)


@cache
def run_one_node(device: str) -> None:
    """Compute a convolution, for which a GPU needs cuDNN; done once per process, if it works.

    ONNX Runtime lists a provider that it was compiled with, even where its libraries are missing.
    Raises Unavailable with the cause and the remedy. The libraries' absence was seen with
    onnxruntime-gpu 1.31 on a machine without a GPU; nothing has run on a GPU yet.
    """
    from onnx import TensorProto, helper

    image, kernel, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1])
        for name in ("image", "kernel", "result")
    )
    node = helper.make_node("Conv", ["image", "kernel"], ["result"])
    graph = helper.make_graph([node], "probe", [image, kernel], [result])
    opset = [helper.make_opsetid("", DEFAULT_OPSET)]
    oldest = helper.find_min_ir_version_for(opset)
    model = helper.make_model(graph, opset_imports=opset, ir_version=oldest)
    try:
        session = OrtSession(model.SerializeToString(), device)
        session.run(*torch.ones(2, 1, 1, 1, 1, device=device)).item()  # waits for the GPU
        session.close()
    except Unavailable:
        raise
    except Exception as error:
        if tells_full_memory(error):
            raise
        cause = " ".join(str(error).split())
        raise Unavailable(
            f"ONNX Runtime cannot compute on {device} ({cause}): {_CUDA_REMEDY}"
        ) from error


def require_ort(device: str) -> Any:
    """The onnxruntime module, with telemetry off.

    Raises Unavailable when it, or its provider for the device, is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable("the ort backend needs ONNX Runtime: pip install onnxruntime") from error
    onnxruntime.disable_telemetry_events()
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise Unavailable(f"this ONNX Runtime has no {_PROVIDERS[device]}: {_CUDA_REMEDY}")
    return onnxruntime
