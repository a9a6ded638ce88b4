"""An ONNX graph → a TensorRT plan, with progress messages and a timing cache per GPU."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorrt as trt  # pyright: ignore[reportMissingImports]

from .bundle import BundleError, Say
from .config import EngineSpec
from .durable import replace_file
from .graphs import read_borders
from .machine import gpu_identity

_PATIENCE_S = 5.0  # between two lines of progress


class Log(trt.ILogger):
    """Keeps TensorRT's errors, for a message that names the cause; drops the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(" ".join(msg.split()))

    def last_error(self) -> str:
        """The last error, in one line."""
        return self.errors[-1] if self.errors else "TensorRT does not say why"


class Progress(trt.IProgressMonitor):
    """Reports a build's progress; ends it at the next step once `stopped` is set."""

    def __init__(self, graph: str, say: Say) -> None:
        super().__init__()
        self.stopped = False
        self._graph, self._say, self._phases = graph, say, {}
        self._began_s = self._said_s = time.monotonic()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._phases[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        now_s = time.monotonic()
        if now_s - self._said_s > _PATIENCE_S:
            self._said_s = now_s
            steps = self._phases.get(phase_name, step + 1)
            self._say(
                f"compiling the {self._graph}: {phase_name}, {step + 1} of {steps}, "
                f"{now_s - self._began_s:.0f} s so far"
            )
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        self._phases.pop(phase_name, None)


def build_plan(
    folder: Path, name: str, spec: EngineSpec, *, level: int, say: Say
) -> dict[str, Any]:
    """Compile `<name>.onnx` into `<name>.plan`, without weights; return its seconds and bytes.

    Raises BundleError when TensorRT rejects the graph or finds no way to run it, and
    KeyboardInterrupt.
    """
    began_s = time.perf_counter()
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(network, folder / f"{name}.onnx", log)
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    config.max_aux_streams = 0  # one stream per graph: it overlaps with the student's training
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits miss PARITY_TOLERANCE
    # The weights stay in the graph's own file, and are refitted when the plan is opened.
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if spec.min_batch is not None:
        profile = builder.create_optimization_profile()
        _add_range(profile, folder, name, spec)
        config.add_optimization_profile(profile)
    cache_path = _timing_cache_path(folder.parent, spec.device)
    cache = _read_timing_cache(cache_path, config, say)
    progress = Progress(name, say)
    config.progress_monitor = progress
    say(f"compiling the {name}")
    # In its own thread: TensorRT blocks the building thread and reports progress from other
    # threads, and Python handles Ctrl-C only in the main thread, which must not be blocked.
    with ThreadPoolExecutor(1) as thread, _interrupts_told(progress):
        plan = thread.submit(builder.build_serialized_network, network, config).result()
    if progress.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise BundleError(
            f"TensorRT could not compile the {name} ({log.last_error()}): if memory is short, "
            "close what else uses the GPU, or take a smaller --batch or --size"
        )
    plan_bytes = bytes(plan)
    (folder / f"{name}.plan").write_bytes(plan_bytes)
    try:
        replace_file(cache_path, bytes(cache.serialize()))
    except OSError as error:  # the plan is good without it
        say(f"the timing cache {cache_path} could not be kept: {error}")
    seconds = time.perf_counter() - began_s
    say(f"compiled the {name} in {seconds:.0f} s, {len(plan_bytes) / 1e6:.1f} MB without weights")
    return {"seconds": round(seconds, 1), "bytes": len(plan_bytes)}


def _parse(network: Any, path: Path, log: Log) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    told = "; ".join(f"{fault.node_name() or 'graph'}: {fault.desc()}" for fault in faults)
    raise BundleError(
        f"TensorRT {trt.__version__} does not take {path.name} ({told or log.last_error()}): try "
        "--opset 23 or 21, or another version of TensorRT"
    )


def _add_range(profile: Any, folder: Path, name: str, spec: EngineSpec) -> None:
    """Allow batches from the smallest to the largest, tuned for the largest."""
    for port in read_borders(folder, name).inputs:
        if port.per_prompt:
            fewest = (port.per_prompt * spec.min_prompts, *port.shape[1:])
            profile.set_shape(port.name, fewest, port.shape, port.shape)


def _timing_cache_path(bundles: Path, device: str) -> Path:
    """TensorRT's kernel timings on this GPU, beside the bundles.

    They make the next build faster, and the same: without them two builds may choose different
    kernels.
    """
    gpu = re.sub(r"\W+", "-", gpu_identity(device)["gpu"] or device).lower()
    return bundles / f".tensorrt-{trt.__version__}-{gpu}.timing"


def _read_timing_cache(path: Path, config: Any, say: Say) -> Any:
    """Attach the cache to the build, or an empty one if TensorRT refuses it."""
    kept = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        say(f"{path.name} is damaged or from another machine: timing everything again")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


@contextmanager
def _interrupts_told(progress: Progress) -> Iterator[None]:
    """Make Ctrl-C ask the build to stop: no exception may pass through TensorRT's own frames."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        progress.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
