"""All timing: rounds over peers, single calls, a description of the machine, and rows on disk.

Times come from CUDA events where there is a GPU, else from the host's clock; a pass ends when the
device is done. Warm-up is not counted. Figures are p20, p50 and p80 over n rounds. A row is one
JSON object in ``bench/results/<device>/<benchmark>.jsonl``, appended and never edited.

Timed elsewhere, by the host's clock: whole benchmarks, their stages and one-time work, and the
epochs of the training loop, as a user sees them (epoch_runs.py).
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
"""Consecutive calls over which launch time is averaged."""
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

    Peers take turns within a round, so that other load on the machine affects all of them;
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
    """Seconds of a call until the device is done, and its result.

    With a GPU, the time between two CUDA events. The device is synchronized before the second: the
    work may use other streams, and an event waits for one stream only.
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
    """p20, p50, p80 in microseconds, and n, of a call that takes microseconds to milliseconds.

    On a GPU by CUDA events, with a cleared L2 cache (triton.testing.do_bench).
    """
    if device != "cpu":
        from triton.testing import do_bench

        taken_ms: Any = do_bench(call, warmup=25, rep=100, return_mode="all")
        taken_us = [1e3 * each for each in taken_ms]
    else:
        taken_us = [1e6 * timed(call)[0] for _ in range(12)][2:]
    return quantiles(taken_us, digits=2) | {"n": len(taken_us)}


def launch_us(call: Callable[[], object]) -> dict[str, float | int]:
    """Host time of a call, without waiting for the GPU: p20, p50, p80 of n rounds."""
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
    """fast / slow per round; load common to a round cancels."""
    return Rate(tuple(a / b for a, b in zip(fast.rounds, slow.rounds, strict=True)))


def environment(device: str = "cpu") -> dict[str, object]:
    """Everything a figure depends on: device, clocks, load, versions, commit, time.

    `dirty`: the code differs from the commit; rows under results/ do not count.
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
    """GPU properties from torch, and nvidia-smi by GPU id. None: nvidia-smi does not report it.

    nvidia-smi is queried while the GPU multiplies matrices, because idle clocks mean nothing.
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
    except ValueError:  # [N/A]: the card does not report it
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
    """Append the row to the results of ``row["benchmark"]`` and print it last, as requested."""
    if record:
        print(f"appended to {append_row(str(row['benchmark']), row)}")
    if as_json:
        print(json.dumps(row))


def run_program(
    main: Callable[[Any], int | None], options: type[Any], *, wrong: int = 1
) -> NoReturn:
    """Call `main` with the command line's options and exit with its return value.

    A ValueError or OSError prints one line on stderr and exits with status `wrong`.
    """
    import tyro  # imported here: the tests of this file also run without it

    try:
        sys.exit(main(tyro.cli(options)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(wrong)


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.machine()


def _cpu_field(name: str) -> str | None:
    """A field of the first core in /proc/cpuinfo."""
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
