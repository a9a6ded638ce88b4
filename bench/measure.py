"""The one place that takes times: rounds over peers, single calls, what ran where, rows on disk.

Times are CUDA events where there is a GPU, and the host's clock elsewhere; a pass ends when the
device is done. Warm-up is not counted. Figures are p20, p50 and p80 over n rounds. A row is one
JSON object in ``bench/results/<device>/<benchmark>.jsonl``, appended and never edited.

Taken elsewhere, by the host's clock: how long a bench, its stages and what it does once ran, and
what the training loop says of its epochs, which is what a user sees (epoch_runs.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "torch",
    "torchvision",
    "triton",
    "diffusers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13",
    "nvidia-dali-cuda130",
    "pillow",
)
GPU_QUERIES = {
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.mem",
    "clock_memory_max_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}
QUANTILES = (20, 50, 80)
LAUNCHES = 100
"""Calls in a row whose launch time is divided."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rate:
    """Items per second of one peer, one number per timed round."""

    rounds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """The median round."""
        return float(np.median(self.rounds))

    def row(self) -> dict[str, float | int]:
        """p20, p50, p80 over the n rounds: p20 is the slow side."""
        return quantiles(self.rounds, digits=2) | {"n": len(self.rounds)}


def quantiles(values: Sequence[float], *, digits: int) -> dict[str, float]:
    """p20, p50 and p80, rounded."""
    named = zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)
    return {f"p{quantile}": round(float(value), digits) for quantile, value in named}


def measure_rates(
    peers: Mapping[str, Callable[[], int]], *, rounds: int, warmup: int = 1
) -> dict[str, Rate]:
    """Items per second of every peer. A peer does one pass and returns its number of items.

    Peers take turns within a round, so that what else the machine does hits all of them;
    ``warmup`` rounds are not counted. With a GPU, a pass ends when the GPU is done.
    """
    taken: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(warmup + rounds):
        for name, one_pass in peers.items():
            seconds, items = timed(one_pass)
            if number >= warmup:
                taken[name].append(items / seconds)
    return {name: Rate(tuple(rates)) for name, rates in taken.items()}


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call until the device is done with it, and its result.

    Between two CUDA events, where there is a GPU. The second waits for the whole device: the work
    may be on streams of its own, and an event waits for that of one alone.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = call()
    torch.cuda.synchronize()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, result


def time_us(call: Callable[[], object], device: str) -> dict[str, float | int]:
    """p20, p50 and p80 of a call that takes microseconds to milliseconds, in microseconds, and n.

    On a GPU between two events and with a cleared L2 cache (triton.testing.do_bench).
    """
    if device != "cpu":
        from triton.testing import do_bench

        taken_ms: Any = do_bench(call, warmup=25, rep=100, return_mode="all")
        taken_us = [1e3 * each for each in taken_ms]
    else:
        taken_us = [1e6 * timed(call)[0] for _ in range(12)][2:]
    return quantiles(taken_us, digits=2) | {"n": len(taken_us)}


def launch_us(call: Callable[[], object]) -> dict[str, float | int]:
    """What a call takes of the host, which does not wait for the GPU: p20, p50, p80 of n rounds."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        taken.append(1e6 * (time.perf_counter() - began) / LAUNCHES)
    torch.cuda.synchronize()
    return quantiles(taken, digits=2) | {"n": len(taken)}


def ratios(fast: Rate, slow: Rate) -> Rate:
    """fast / slow of every round: what is common to a round cancels."""
    return Rate(tuple(a / b for a, b in zip(fast.rounds, slow.rounds, strict=True)))


def environment(device: str = "cpu") -> dict[str, object]:
    """What a number depends on: device, clocks, load, versions, commit, time.

    `dirty`: what runs is not the commit; rows appended under results/ are no code.
    """
    code = (":(top)", ":(top,exclude)bench/results")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    row: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cpu_mhz": _number(_cpu_field("cpu MHz")),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }
    return row if device == "cpu" else row | _gpu_row(device)


def _gpu_row(device: str) -> dict[str, object]:
    """Of torch and nvidia-smi, which is asked for this GPU by its id; None: it does not say.

    It is asked while the GPU multiplies matrices: the clocks of an idle one say nothing.
    """
    found = torch.cuda.get_device_properties(device)
    asked = ",".join(("driver_version", *GPU_QUERIES.values()))
    told = _ask_under_load(
        device,
        "nvidia-smi",
        f"--id=GPU-{found.uuid}",
        f"--query-gpu={asked}",
        "--format=csv,noheader,nounits",
    )
    driver, *numbers = told.split(", ") if told else [None] * (1 + len(GPU_QUERIES))
    return {
        "capability": f"{found.major}.{found.minor}",
        "sm_count": found.multi_processor_count,
        "gpu_memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": driver,
        **{name: _number(text) for name, text in zip(GPU_QUERIES, numbers, strict=True)},
    }


def _ask_under_load(device: str, *words: str) -> str | None:
    a = torch.randn(4096, 4096, dtype=torch.float16, device=device)
    out = torch.empty_like(a)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(_command, *words)
        while not asked.done():
            torch.mm(a, a, out=out)
            torch.cuda.synchronize(device)
        return asked.result()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # [N/A], where the card does not tell
        return None


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its number of usable cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def append_row(benchmark: str, row: Mapping[str, object], results: Path = RESULTS) -> Path:
    """Append the row to ``results/<row["device"]>/<benchmark>.jsonl``; the file's path."""
    folder = results / re.sub(r"[^a-z0-9]+", "-", str(row["device"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path


def publish(row: Mapping[str, object], *, record: bool, as_json: bool) -> None:
    """Append a row to the results of its ``row["benchmark"]`` and print it last, as asked."""
    if record:
        print(f"appended to {append_row(str(row['benchmark']), row)}")
    if as_json:
        print(json.dumps(row))


def run_program(
    main: Callable[[Any], int | None], options: type[Any], *, wrong: int = 1
) -> NoReturn:
    """Call `main` with the options of the command line and exit with what it returns.

    A ValueError or OSError is one line on stderr and exit status `wrong`.
    """
    import tyro  # the tests of this file run where there is none

    try:
        sys.exit(main(tyro.cli(options)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(wrong)


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.machine()


def _cpu_field(name: str) -> str | None:
    """Of the first core in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(rf"^{name}\s*:\s*(.+)", text, re.M)
    return match[1].strip() if match else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    return _command("git", "-C", str(RESULTS.parent), *words)


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
