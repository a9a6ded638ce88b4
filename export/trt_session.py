"""Opened TensorRT plans: weights refitted from the graphs, one activation memory for all three.

A call gives TensorRT the addresses of its inputs, or of copies in the engine's types, and enqueues.
It waits for nothing but inputs in pageable host memory. Engines of up to REPLAYED_BATCH images are
captured once as a CUDA graph and replayed: at that size launches take as long as the kernels
(measured by others, not here).

TensorRT for RTX compiles a plan's kernels for the card when they first run. They are kept beside
the bundle.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bundle import BundleError, kernel_cache
from .config import EngineSpec
from .durable import replace_file
from .graphs import GRAPHS, Borders, Port, prompts_of, read_borders
from .terminal import say
from .trt_build import make_log

REPLAYED_BATCH = 8
ALIGNMENT = 256
"""Bytes: TensorRT's least alignment of an address."""
_REMEDY = (
    "if memory is short, close what else uses the GPU, or take a smaller --batch or --size; "
    "otherwise remove the engine, and it is built again"
)


def open_plans(trt: Any, folder: Path, spec: EngineSpec) -> dict[str, EngineSession]:
    """A session for each plan. Raises BundleError when a plan or its weights do not load."""
    log = make_log(trt)
    runtime = trt.Runtime(log)
    engines = {name: _open_plan(trt, runtime, folder, name, log) for name in GRAPHS}
    most_bytes = max(engine.device_memory_size_v2 for engine in engines.values())
    activations = torch.empty(most_bytes, dtype=torch.uint8, device=spec.device)
    stream = torch.cuda.Stream()
    return {
        name: EngineSession(
            trt,
            engine,
            read_borders(folder, name),
            spec,
            activations=activations,
            stream=stream,
            log=log,
            cache_path=kernel_cache(folder, name) if spec.trt_library == "rtx" else None,
        )
        for name, engine in engines.items()
    }


def _open_plan(trt: Any, runtime: Any, folder: Path, name: str, log: Any) -> Any:
    engine = runtime.deserialize_cuda_engine((folder / f"{name}.plan").read_bytes())
    if engine is None:
        raise BundleError(f"TensorRT does not open {name}.plan ({log.last_error()}): {_REMEDY}")
    if not (folder / f"{name}.onnx").exists():
        return engine  # it holds its weights
    refitter = trt.Refitter(engine, log)
    weights = trt.OnnxParserRefitter(refitter, log)
    if not (weights.refit_from_file(str(folder / f"{name}.onnx")) and refitter.refit_cuda_engine()):
        faults = [weights.get_error(index).desc() for index in range(weights.num_errors)]
        raise BundleError(
            f"the weights of {name}.onnx do not fit {name}.plan "
            f"({'; '.join(faults) or log.last_error()}): {_REMEDY}"
        )
    return engine


class EngineSession:
    """One engine with its buffers; sessions share `activations`, so only one may run at a time."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        borders: Borders,
        spec: EngineSpec,
        *,
        activations: Tensor,
        stream: torch.cuda.Stream,
        log: Any,
        cache_path: Path | None = None,
    ) -> None:
        self._log, self._cache_path = log, cache_path
        self._borders, self._stream, self._activations = borders, stream, activations
        self._fewest, self._most = spec.min_prompts, spec.prompts
        self._prompts: int | None = None
        self.rows = borders.inputs[0].shape[0]
        self._buffers: dict[str, Tensor] = {}
        self._engine = engine
        self._context = self._new_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise BundleError(
                f"TensorRT cannot run the engine here ({log.last_error()}): {_REMEDY}"
            )
        self._context.set_device_memory(activations.data_ptr(), activations.numel())
        self._ranged = spec.min_batch is not None
        if self._ranged:
            self._set_shapes(self._most)
        self._device = spec.device
        self._bind(borders.output.name, self._buffer(borders.output))
        self._replay: torch.cuda.CUDAGraph | None = None
        if spec.batch <= REPLAYED_BATCH and not self._ranged and self._can_record():
            for port in borders.inputs:
                self._bind(port.name, self._buffer(port))
            self._replay = self._record()

    def _new_context(self, strategy: Any) -> Any:
        self._cache = None
        if self._cache_path is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache = config.create_runtime_cache()
        if self._cache_path.is_file():
            self._cache.deserialize(self._cache_path.read_bytes())  # refuses another GPU's
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def run(self, *inputs: Tensor) -> Tensor:
        """Enqueue the engine on torch's current stream; the next call overwrites the result.

        Inputs are cast to the graph's dtypes. Raises ValueError when shapes do not match,
        RuntimeError when TensorRT refuses to run.
        """
        prompts = self._prompts_of(inputs[0]) if self._ranged else None
        if prompts is not None and prompts != self._prompts:
            self._set_shapes(prompts)
        for port, value in zip(self._borders.inputs, inputs, strict=True):
            shape = _shape(port, prompts)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{port.name} must be {list(shape)}, the engine's shape, "
                    f"got {list(value.shape)}"
                )
            self._give(port, value)
        self._enqueue()
        output = self._borders.output
        return self._buffers[output.name][: _shape(output, prompts)[0]]

    def _give(self, port: Port, value: Tensor) -> None:
        """Let the engine read a value where it lies, or a copy of it.

        A graph is replayed on its own addresses. The keys and values of 32 prompts of SDXL-Turbo
        are 0.8 GB, the same for every evaluation of a batch.
        """
        fits = value.dtype == port.dtype and value.device.type == self._device
        aligned = value.is_contiguous() and not value.data_ptr() % ALIGNMENT
        if self._replay is not None or not (fits and aligned):
            copy = self._buffer(port)[: len(value)]
            value = copy.copy_(value, non_blocking=True)
        if self._replay is None:
            self._bind(port.name, value)

    def _buffer(self, port: Port) -> Tensor:
        if port.name not in self._buffers:
            self._buffers[port.name] = torch.zeros(
                port.shape, dtype=port.dtype, device=self._device
            )
        return self._buffers[port.name]

    def _bind(self, name: str, value: Tensor) -> None:
        if not self._context.set_tensor_address(name, value.data_ptr()):
            raise BundleError(f"the engine has no tensor {name!r}: build it again")

    def _enqueue(self) -> None:
        torchs = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            self._execute(torchs)  # a graph cannot be launched into one that is being recorded
        elif self._replay is not None:
            self._replay.replay()
        elif torchs == torch.cuda.default_stream():
            # On the default stream TensorRT waits for the GPU after every call.
            self._stream.wait_stream(torchs)
            self._execute(self._stream)
            torchs.wait_stream(self._stream)
        else:
            self._execute(torchs)

    def _execute(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT refused to run the engine: {self._log.last_error()}")

    def _can_record(self) -> bool:
        if self._cache is None:
            return True
        capturable = self._context.is_stream_capturable(self._stream.cuda_stream)
        if not capturable:
            say("TensorRT for RTX cannot record this engine as a CUDA graph: it is launched anew")
        return capturable

    def _record(self) -> torch.cuda.CUDAGraph:
        """Capture the engine as a CUDA graph, after one run that loads its kernels."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._execute(self._stream)
        self._stream.synchronize()
        recorded = torch.cuda.CUDAGraph()
        # Other threads (a data loader's) may continue; only this one must not allocate meanwhile.
        with torch.cuda.graph(recorded, stream=self._stream, capture_error_mode="thread_local"):
            self._execute(self._stream)
        return recorded

    def _set_shapes(self, prompts: int) -> None:
        for port in self._borders.inputs:
            shape = _shape(port, prompts)
            if not self._context.set_input_shape(port.name, shape):
                raise BundleError(f"the engine does not take {port.name} of {list(shape)}")
        self._prompts = prompts

    def _prompts_of(self, first: Tensor) -> int:
        port, limits = self._borders.inputs[0], {"fewest": self._fewest, "most": self._most}
        return prompts_of(port.name, len(first), port.per_prompt, **limits)

    def close(self) -> None:
        """Free the engine and its buffers; keep the kernels that were compiled here."""
        if self._cache is not None and self._cache_path is not None:
            with suppress(OSError):  # the next start compiles them again
                replace_file(self._cache_path, bytes(self._cache.serialize()))
        self._replay = self._cache = None
        del self._context, self._engine, self._buffers, self._activations


def _shape(port: Port, prompts: int | None) -> tuple[int, ...]:
    """A port's shape for this many prompts; None: the engine's one batch."""
    rows = port.per_prompt * prompts if prompts else 0
    return (rows or port.shape[0], *port.shape[1:])
