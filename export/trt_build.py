"""An ONNX graph → a TensorRT plan, with progress messages and, in TensorRT, a timing cache per GPU.

`trt` is the module of either library. TensorRT's plans hold no weights: they stay in the graph's
file, and are refitted when the plan is opened. TensorRT for RTX cannot strip them without a GPU, so
its plans hold them, and the graph's file is not kept.
"""

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

from .bundle import BundleError, Say
from .config import EngineSpec
from .durable import replace_file
from .graphs import read_borders
from .machine import gpu_identity

_PATIENCE_S = 5.0  # between two lines of progress


def make_log(trt: Any) -> Any:
    """A logger that keeps errors, for a message that names the cause, and drops the rest."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

        def last_error(self) -> str:
            """The last error, in one line."""
            return self.errors[-1] if self.errors else "TensorRT does not say why"

    return Log()


def make_progress(trt: Any, graph: str, say: Say) -> Any:
    """A monitor that reports a build's progress, and ends it at the next step once `stopped`."""

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.stopped, self._phases = False, {}
            self._began_s = self._said_s = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now_s = time.monotonic()
            if now_s - self._said_s > _PATIENCE_S:
                self._said_s = now_s
                steps = self._phases.get(phase_name, step + 1)
                say(
                    f"compiling the {graph}: {phase_name}, {step + 1} of {steps}, "
                    f"{now_s - self._began_s:.0f} s so far"
                )
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Progress()


def build_plan(
    trt: Any, folder: Path, name: str, spec: EngineSpec, *, level: int, say: Say
) -> dict[str, Any]:
    """Compile `<name>.onnx` into `<name>.plan`; return its seconds and bytes.

    Raises BundleError when TensorRT rejects the graph or finds no way to run it, and
    KeyboardInterrupt.
    """
    began_s = time.perf_counter()
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, folder / f"{name}.onnx", log)
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    config.max_aux_streams = 0  # one stream per graph: it overlaps with the student's training
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits miss PARITY_TOLERANCE
    if spec.targets:
        config.num_compute_capabilities = len(spec.targets)
        for index, target in enumerate(spec.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    else:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if spec.min_batch is None and spec.targets:
        _fix_batch(network, folder, name)
    elif spec.min_batch is not None:
        profile = builder.create_optimization_profile()
        _add_range(profile, folder, name, spec)
        config.add_optimization_profile(profile)
    # TensorRT for RTX times nothing when it builds.
    times = None if spec.targets else _Timings(trt, folder.parent, spec.device, config, say)
    progress = make_progress(trt, name, say)
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
    with open(folder / f"{name}.plan", "wb") as file:
        file.write(plan)  # its buffer: SDXL-Turbo's 4.5 GB are not copied
    if times is not None:
        times.keep()
    plan_bytes = memoryview(plan).nbytes
    seconds, without = time.perf_counter() - began_s, "" if spec.targets else " without weights"
    say(f"compiled the {name} in {seconds:.0f} s, {plan_bytes / 1e6:.1f} MB{without}")
    return {"seconds": round(seconds, 1), "bytes": plan_bytes}


def _fix_batch(network: Any, folder: Path, name: str) -> None:
    """Give every input its static shape: the graph was written for a range."""
    shapes = {port.name: port.shape for port in read_borders(folder, name).inputs}
    for index in range(network.num_inputs):
        port = network.get_input(index)
        port.shape = shapes[port.name]


def _parse(trt: Any, network: Any, path: Path, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    told = "; ".join(_told(fault) for fault in faults)
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


def _told(fault: Any) -> str:
    """A parser's error, in one line."""
    where = " ".join(part for part in (fault.node_operator(), fault.node_name()) if part)
    return f"{where or 'graph'}: {' '.join(fault.desc().split())}"


class _Timings:
    """TensorRT's kernel timings on this GPU, in a file beside the bundles.

    They make the next build faster, and the same: without them two builds may choose different
    kernels.
    """

    def __init__(self, trt: Any, bundles: Path, device: str, config: Any, say: Say) -> None:
        gpu = re.sub(r"\W+", "-", gpu_identity(device)["gpu"] or device).lower()
        self._path = bundles / f".tensorrt-{trt.__version__}-{gpu}.timing"
        self._say = say
        kept = self._path.read_bytes() if self._path.is_file() else b""
        self._cache = config.create_timing_cache(kept)
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            say(f"{self._path.name} is damaged or from another machine: timing everything again")
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def keep(self) -> None:
        """Write the timings of this build and earlier ones; tell when it is not possible."""
        try:
            replace_file(self._path, bytes(self._cache.serialize()))
        except OSError as error:  # the plan is good without it
            self._say(f"the timing cache {self._path} could not be kept: {error}")


@contextmanager
def _interrupts_told(progress: Any) -> Iterator[None]:
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
