"""Kernel speed at real shapes: each against its reference in eager and in compiled torch.

    python bench/bench_kernels.py --json                     (on a GPU, under 2 minutes)
    python bench/bench_kernels.py --device cpu --no-record   (a rehearsal: references only)

The gate runs first: unless kernel and reference agree, nothing is timed. Then the clock: CUDA
events with a cleared cache (measure.py) give p20, p50 and p80 in microseconds. The bytes that an
operation must move, by the formula in its file, are reported as a share of the copy bandwidth of
the same device. Operations on latents are bound by launch more than by memory, so their launch time
is reported too. A row names the targets that it missed: a share of copy bandwidth for pictures of
512 px, and 4 times eager where eager makes 4 passes.

With `--json` the row so far is printed after every case, as `partial`; the last line is the row.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import Case
from latent_cases import latent_cases, noise_case
from layer_cases import layer_cases
from measure import environment, launch_us, publish, run_program, time_us
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.export.config import DeviceName
from picture_cases import label_cases, pixel_cases
from roofline import copy_bytes_per_s
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kernel times and their share of copy bandwidth."""

    device: DeviceName = "auto"
    """`auto`: cuda if available. On the CPU shapes are small and only references run."""
    only: str = ""
    """Run only cases whose names contain this."""
    compiled: bool = True
    """Also time torch.compile of the references."""
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def make_cases(device: str) -> list[Case]:
    """sdxl-tiny's shapes on the CPU, else SDXL-Turbo's at 224 and 512 px (512 px also compiled)."""
    if device == "cpu":
        cases = latent_cases(device, 32, 16, compiled=True)
        cases += pixel_cases(device, 32, 64, compiled=True)
        cases += layer_cases(device, 32, 64, compiled=False)
        return cases + label_cases(device, 32, 100, 10, compiled=True)
    cases = [
        *latent_cases(device, 32, 28, compiled=False),
        *latent_cases(device, 64, 64, compiled=True),
        noise_case(device, 64, (3, 512, 512), compiled=False),
    ]
    for side, compiled in ((224, False), (512, True)):
        cases += pixel_cases(device, 64, side, compiled=compiled)
        cases += layer_cases(device, 64, side, compiled=compiled)
    for classes, compiled in ((1000, False), (21_841, True)):
        cases += label_cases(device, 256, classes, 10, compiled=compiled)
    return cases


def check(case: Case) -> float:
    """Largest difference of kernel and reference; RuntimeError above the case's tolerance."""
    found, expected = _tensors(case.kernel()), _tensors(case.reference())
    differences = [
        float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True)
    ]
    if not max(differences) <= case.tolerance:
        raise RuntimeError(
            f"{case.name}: expected within {case.tolerance} of the reference, got {differences}; "
            "no time is reported"
        )
    return max(differences)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(case: Case, device: str, copied: float, compiled: bool) -> dict[str, Any]:
    """Check and time one case; its row."""
    row: dict[str, Any] = {"max_difference": check(case), "moved_bytes": case.moved_bytes}
    peers = {"kernel": case.kernel, "eager": case.reference}
    if compiled and case.compiled:
        peers["compiled"] = torch.compile(case.reference, dynamic=False)
    for name, call in peers.items():
        call()
        row[f"{name}_us"] = time_us(call, device)
    kernel_s = row["kernel_us"]["p50"] / 1e6
    row["share_of_copy"] = round(case.moved_bytes / kernel_s / copied, 3)
    row["speedup"] = {
        name: round(row[f"{name}_us"]["p50"] / row["kernel_us"]["p50"], 2)
        for name in peers
        if name != "kernel"
    }
    if case.normals:
        row["gnormal_per_s"] = round(case.normals / kernel_s / 1e9, 3)
    if device == "cuda":
        if case.latent_sized:
            row["launch_us"] = launch_us(case.kernel)
        row["missed"] = missed_targets(case, row)
    return row


def missed_targets(case: Case, row: dict[str, Any]) -> list[str]:
    """The targets that the row missed, in words."""
    missed = []
    if case.share_of_copy is not None and row["share_of_copy"] < case.share_of_copy:
        missed.append(f"share_of_copy {row['share_of_copy']}, not {case.share_of_copy}")
    speedup = row["speedup"]["eager"]
    if case.speedup is not None and speedup < case.speedup:
        missed.append(f"{speedup} x eager, not {case.speedup}")
    return missed


def print_case(name: str, row: dict[str, Any]) -> None:
    """Print one line: time, share of copy bandwidth, speed-ups, launch time, missed targets."""
    parts = [f"{100 * row['share_of_copy']:3.0f} % of copy"]
    parts += [f"{x} x {peer}" for peer, x in row["speedup"].items()]
    if "launch_us" in row:
        parts.append(f"launch {row['launch_us']['p50']} us")
    if "gnormal_per_s" in row:
        parts.append(f"{row['gnormal_per_s']} Gnormal/s")
    parts += [f"MISSED: {words}" for words in row.get("missed", ())]
    print(f"{name:48} {row['kernel_us']['p50']:9.1f} us   {', '.join(parts)}", flush=True)


def main(options: Options) -> None:
    """Gate, measure, report."""
    began = time.perf_counter()
    device = resolve_device(options.device)
    copied = copy_bytes_per_s(device)
    print(f"copy: {copied / 1e9:.1f} GB/s")
    row = environment(device) | {
        "benchmark": "kernels",
        "copy_gb_per_s": round(copied / 1e9, 1),
    }
    rows = {}
    for case in make_cases(device):
        if options.only in case.name:
            rows[case.name] = measure(case, device, copied, options.compiled)
            print_case(case.name, rows[case.name])
            if options.json:
                print(json.dumps(row | {"partial": True, "cases": rows}), flush=True)
    row |= {"seconds": round(time.perf_counter() - began, 1), "cases": rows}
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
