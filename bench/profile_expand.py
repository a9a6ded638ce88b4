"""Where the time of an expansion goes: the largest costs of one pass, by torch's profiler.

    python bench/profile_expand.py --json                                           (CPU, sdxl-tiny)
    python bench/profile_expand.py --model sdxl-turbo --weights random --size 224 --json    (a GPU)

A cost is the device time of all calls of one kernel; on a CPU the time of all calls of one
operation, without the operations it calls. Shares are relative to the sum of all costs. `busy` is
that sum over the time of a pass without the profiler: on a GPU, well below 1 means that the GPU
waits for the host, which no faster kernel fixes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import environment, publish, run_program, timed
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.export.config import DeviceName, Weights
from patchbloom.export.models import find_model
from pictures import EPOCH, make_coreset, open_expander
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NAME_LENGTH = 120
"""Characters kept of a kernel's name: enough to tell template instances apart."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The largest costs of an expansion."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    weights: Weights = "pretrained"
    """`random`: the architecture only; speed does not depend on weights."""
    backend: str = "eager"
    """eager, ort, inductor or trt; append -bf16, -fp16 or -fp32 for another precision than the
    device's usual one. On a CPU ort is a single operation, so its profile says nothing."""
    device: DeviceName = "auto"
    """`auto`: cuda if available."""
    size: int = 64
    """Image size in px; patches are half as large."""
    batch: int = 32
    """Images per engine call."""
    images: int = 32
    """Images per pass."""
    classes: int = 2
    patches_per_class: int = 40
    largest: int = 10
    """Number of costs to report."""
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def costs_of(call: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Name, calls and milliseconds of every kernel or operation, largest first.

    Raises RuntimeError when the profiler recorded none.
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        timed(call)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        {
            "name": each.key[:NAME_LENGTH],
            "calls": each.count,
            "ms": (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e3,
        }
        for each in profiled.key_averages()
        if each.device_type == kind and not each.is_user_annotation
    ]
    if not any(each["ms"] for each in found):
        raise RuntimeError(f"the profiler saw nothing on {device}: is CUPTI here and allowed?")
    return sorted(found, key=lambda each: -each["ms"])


def measure(options: Options, device: str) -> dict[str, Any]:
    """Seconds of a pass, and its costs."""
    coreset = make_coreset(
        classes=options.classes,
        patches_per_class=options.patches_per_class,
        side_px=options.size // 2,
        seed=0,
    )
    expander = open_expander(
        options.backend,
        find_model(options.model, options.weights),
        coreset,
        device=device,
        size_px=options.size,
        batch=options.batch,
        nan_gate=options.weights != "random",
    )
    samples = torch.arange(options.images)

    def one_pass() -> object:
        return expander.expand(samples, EPOCH)

    for _ in range(2):  # the second call records a CUDA graph
        one_pass()
    seconds, _ = timed(one_pass)
    costs = costs_of(one_pass, device)
    described = expander.describe()
    expander.close()
    total_ms = sum(each["ms"] for each in costs)
    return {
        "backend": described["backend"],
        "evals": described["evals"],
        "pass_s": round(seconds, 4),
        "busy": round(total_ms / 1e3 / seconds, 3),
        "costs": [
            each | {"ms": round(each["ms"], 3), "share": round(each["ms"] / total_ms, 3)}
            for each in costs[: options.largest]
        ],
    }


def main(options: Options) -> None:
    """Measure, report."""
    if options.images > options.classes * options.patches_per_class:
        raise ValueError(
            f"--images {options.images}: expected at most {options.classes} classes x "
            f"{options.patches_per_class} patches"
        )
    device = resolve_device(options.device)
    found = measure(options, device)
    print(f"a pass {found['pass_s']:.3f} s, busy {found['busy']:.2f}")
    for each in found["costs"]:
        print(f"{100 * each['share']:5.1f} %  {each['ms']:9.2f} ms  {each['calls']:6d} x  ", end="")
        print(each["name"])
    row = environment(device) | {
        "benchmark": "profile",
        "model": options.model,
        "weights": options.weights,
        "size_px": options.size,
        "batch": options.batch,
        "images": options.images,
        "threads": torch.get_num_threads(),
        **found,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
