"""The one place that takes times: rounds over peers, what ran where, rows on disk.

A row is one JSON object in ``bench/results/<device>/<benchmark>.jsonl``, appended and never edited.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "torch",
    "torchvision",
    "triton",
    "diffusers",
    "onnxruntime",
    "nvidia-dali-cuda130",
    "pillow",
)


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
        p20, p50, p80 = np.percentile(self.rounds, (20, 50, 80))
        rates = {"p20": p20, "p50": p50, "p80": p80}
        return {name: round(float(rate), 2) for name, rate in rates.items()} | {
            "n": len(self.rounds)
        }


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
            _wait_for_gpu()
            start = time.perf_counter()
            items = one_pass()
            _wait_for_gpu()
            if number >= warmup:
                taken[name].append(items / (time.perf_counter() - start))
    return {name: Rate(tuple(rates)) for name, rates in taken.items()}


def ratios(fast: Rate, slow: Rate) -> Rate:
    """fast / slow of every round: what is common to a round cancels."""
    return Rate(tuple(a / b for a, b in zip(fast.rounds, slow.rounds, strict=True)))


def environment(device: str = "cpu") -> dict[str, object]:
    """What a number depends on besides the code: device, load, versions, commit, time."""
    row: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
    }
    if device != "cpu":
        row["driver"] = _command(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        row["clocks"] = _command(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"
        )
    return row


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


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if match:
            return match[1].strip()
    return platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with -dirty when tracked files differ from it."""
    return _command("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty")


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
