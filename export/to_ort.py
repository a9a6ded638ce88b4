"""ONNX graphs → ONNX Runtime: sessions that run where they were asked to, and bundles of three.

A bundle is stored only after its graphs matched torch on random inputs (max abs error at most
PARITY_TOLERANCE times the largest value) and made no NaN or infinity.
"""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bundle import Bundle, BundleError, find_or_build
from .config import DEFAULT_OPSET, EngineSpec
from .models import ModelParts, ModelSource, Unavailable, weights_sha256
from .to_onnx import Graph, export_onnx, make_graphs

GRAPHS = ("encoder", "denoiser", "decoder")
PARITY_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENTS = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
}


class OrtSession:
    """One graph on one provider, with its output buffer; inputs and output are torch tensors."""

    def __init__(self, path: Path, device: str) -> None:
        onnxruntime, provider = require_ort(device), _PROVIDERS[device]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin between two operators save 15 % of sdxl-tiny's time; between two calls
        # torch works on the same cores, and a spinning pool would take them from it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        settings = {} if self._stream is None else cuda_settings(self._stream)
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=[(provider, settings)]
        )
        self._session.disable_fallback()
        if self._session.get_providers()[0] != provider:
            raise Unavailable(
                f"ONNX Runtime opened {path.name} on {self._session.get_providers()[0]} instead of "
                f"{provider}: its CUDA and cuDNN libraries do not load; see `python -c 'import "
                "onnxruntime; onnxruntime.preload_dlls()'`"
            )
        self._device, self._binding = device, self._session.io_binding()
        self._inputs = self._session.get_inputs()
        result = self._session.get_outputs()[0]
        self._output = torch.empty(result.shape, dtype=_ELEMENTS[result.type][0], device=device)
        self._bind(self._binding.bind_output, result, self._output)

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result is overwritten by the next call.

        Inputs are cast to the graph's types. ValueError: shapes that are not the graph's.
        """
        cast = []
        for port, value in zip(self._inputs, inputs, strict=True):
            if list(value.shape) != port.shape:
                raise ValueError(
                    f"{port.name} must be {port.shape}, the engine's shape, got {list(value.shape)}"
                )
            cast.append(value.to(self._device, _ELEMENTS[port.type][0]).contiguous())
            self._bind(self._binding.bind_input, port, cast[-1])
        if self._stream is None:
            self._session.run_with_iobinding(self._binding)
            return self._output
        # ONNX Runtime waits for its own stream only, neither for the kernels that fill its inputs
        # nor for those that still read its last output.
        torchs = torch.cuda.current_stream()
        self._stream.wait_stream(torchs)
        self._session.run_with_iobinding(self._binding)
        torchs.wait_stream(self._stream)
        return self._output

    def _bind(self, bind: Any, port: Any, value: Tensor) -> None:
        bind(
            name=port.name,
            device_type=self._device,
            device_id=value.device.index or 0,
            element_type=_ELEMENTS[port.type][1],
            shape=tuple(value.shape),
            buffer_ptr=value.data_ptr(),
        )


def cuda_settings(stream: torch.cuda.Stream) -> dict[str, str]:
    """Options of the CUDA provider: compute on this stream and its device, fp32 as fp32.

    A stream of our own, because torch's usual one has the handle 0, which ONNX Runtime takes for
    none given: it then makes one, and reads inputs that torch has not written yet. By default fp32
    is computed in TF32, whose 10 bits are not within PARITY_TOLERANCE.
    """
    return {
        "device_id": str(stream.device_index),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": "0",
    }


def require_ort(device: str) -> Any:
    """The onnxruntime module, its telemetry off.

    Unavailable when it, or its provider for the device, is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable("the ort backend needs ONNX Runtime: pip install onnxruntime") from error
    onnxruntime.disable_telemetry_events()
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise Unavailable(
            f"this ONNX Runtime has no {_PROVIDERS[device]}: pip install onnxruntime-gpu in place "
            "of onnxruntime, or use --device cpu"
        )
    return onnxruntime


def bundle_key(model: ModelSource, spec: EngineSpec, *, tokens: int) -> dict[str, Any]:
    """All that a bundle of the ort backend depends on."""
    code = hashlib.sha256()
    for name in ("modules.py", "to_onnx.py"):
        code.update((Path(__file__).parent / name).read_bytes())
    return {
        "backend": "ort",
        "model": model.name,
        "weights_sha256": weights_sha256(model),
        "exporter_sha256": code.hexdigest(),
        "libraries": {name: version(name) for name in LIBRARIES}
        # Of the module: the distribution is onnxruntime, onnxruntime-gpu, ...
        | {"onnxruntime": require_ort(spec.device).__version__},
        "gpu": torch.cuda.get_device_name() if spec.device == "cuda" else None,
        "tokens": tokens,
        "flags": {"opset": DEFAULT_OPSET, "native_group_norm": spec.device == "cuda"},
        **spec.as_dict(),
    }


def open_ort_bundle(
    model: ModelSource, parts: ModelParts, spec: EngineSpec, *, tokens: int, bundles: Path
) -> Bundle:
    """Find the bundle for these settings, or build it from the parts, which are then taken over.

    Unavailable: a precision or provider that ONNX Runtime does not have here. BundleError: a
    damaged bundle, or graphs that do not match torch.
    """
    require_ort(spec.device)
    if spec.precision == "bf16" or (spec.device == "cpu" and spec.precision != "fp32"):
        raise Unavailable(
            f"the ort backend runs fp32 on the CPU, fp32 or fp16 on a GPU, not {spec.precision} on "
            f"{spec.device}: use --precision fp32, or --backend eager"
        )
    key = bundle_key(model, spec, tokens=tokens)
    flags = key["flags"]

    def build(folder: Path) -> dict[str, Any]:
        started, parity = time.perf_counter(), {}
        for graph in make_graphs(parts, spec, tokens=tokens):
            path = folder / f"{graph.name}.onnx"
            export_onnx(
                graph, path, opset=flags["opset"], native_group_norm=flags["native_group_norm"]
            )
            parity[graph.name] = measure_parity(graph, path, spec)
        return {"parity": parity, "seconds": round(time.perf_counter() - started, 1)}

    return find_or_build(bundles, key, build)


@torch.no_grad()
def measure_parity(graph: Graph, path: Path, spec: EngineSpec) -> dict[str, float]:
    """Compare a written graph with its module on random inputs.

    Returns max_abs and relative_l2 errors. BundleError: beyond the tolerance, NaN or infinite.
    """
    inputs = graph.random_inputs(seed=1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # see cuda_settings
        expected = graph.module(*inputs).float()
    found = OrtSession(path, spec.device).run(*inputs).float()
    if not bool(torch.isfinite(found).all()):
        raise BundleError(
            f"the {graph.name} makes NaN or infinite values in {spec.precision}, so it was not "
            "stored: check the weights, or use a higher precision"
        )
    difference = found - expected
    error = float(difference.abs().max())
    limit = PARITY_TOLERANCE[spec.precision] * max(1.0, float(expected.abs().max()))
    if not error <= limit:
        raise BundleError(
            f"the {graph.name} differs from torch by {error:.2e}, more than {limit:.2e}, so it was "
            "not stored: report the versions that `pip list` shows"
        )
    return {
        "max_abs": error,
        "relative_l2": float(difference.norm() / expected.norm()),
        "limit": limit,
    }
