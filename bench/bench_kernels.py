"""How fast the kernels are: each against its reference in eager torch and compiled, at real shapes.

    python bench/bench_kernels.py --json                     (on a GPU, under 2 minutes)
    python bench/bench_kernels.py --device cpu --no-record   (a rehearsal: references only)

First the gate: kernel and reference agree, or no time is taken. Then the clock, CUDA events with a
cleared cache (triton.testing.do_bench): p20, p50, p80 in microseconds, and for each operation the
bytes that it must move, by the formula given with its case, as a share of what a copy of 1 GiB
reaches on the same device. Results below 10 us are launches more than memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from measure import environment, publish
from patchbloom.engine.backends import resolve_device
from patchbloom.export.config import DeviceName
from patchbloom.kernels.latents import start_state, start_state_reference
from patchbloom.kernels.mosaic import mosaic, mosaic_reference
from patchbloom.kernels.noise import Draw, normal, normal_reference
from patchbloom.kernels.pixels import upsample_patches, upsample_patches_reference
from patchbloom.kernels.sampler import euler_ancestral_step, euler_ancestral_step_reference
from patchbloom.kernels.softlabel import softlabel, softlabel_reference, target_reference
from patchbloom.kernels.student_input import student_input, student_input_reference
from torch import Tensor

SEED, EPOCH = 1, 2
COPY_BYTES = 1 << 30
IMAGENET: dict[str, Any] = {"mean_C": (0.485, 0.456, 0.406), "std_C": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kernels, microseconds and share of copy bandwidth."""

    device: DeviceName = "auto"
    """`auto` is cuda where there is one; on the CPU shapes are small, and nothing is a kernel."""
    only: str = ""
    """Cases whose names hold this."""
    compiled: bool = True
    """Also time torch.compile of the references."""
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape; both callables return the same tensors."""

    name: str
    kernel: Callable[[], Any]
    reference: Callable[[], Any]
    moved_bytes: int
    tolerance: float
    """Largest difference of kernel and reference that passes."""


def latent_cases(device: str, batch: int, side: int) -> list[Case]:
    """Noise, first state and sampler step of a batch of latents, model input in half."""
    half = torch.float16 if device == "cuda" else torch.float32
    shape, rows = (4, side, side), torch.arange(batch, device=device)
    numel = batch * 4 * side * side
    bank, eps = torch.randn(2, batch, *shape, device=device)
    firsts, counts = rows // 8 * 8, torch.full_like(rows, 8)
    start: dict[str, Any] = {
        "seed": SEED, "epoch": EPOCH, "sigma": 4.0, "mixup": True, "model_scale": 0.25,
    }  # fmt: skip
    step: dict[str, Any] = {
        "sigma": 4.0, "sigma_down": 2.0, "sigma_up": 1.5, "next_scale": 0.4,
        "seed": SEED, "step": 1, "epoch": EPOCH,
    }  # fmt: skip
    halved = eps.to(half)
    size = half.itemsize
    where = f"{batch} x 4 x {side} x {side}"
    return [
        Case(
            f"noise {where}",
            lambda: normal(SEED, Draw.START, rows, EPOCH, shape),
            lambda: normal_reference(SEED, Draw.START, rows, EPOCH, shape),
            4 * numel,  # written
            1e-5,
        ),
        Case(
            f"start_state {where}",
            lambda: start_state(bank, rows, rows, firsts, counts, **start, dtype=half),
            lambda: start_state_reference(bank, rows, rows, firsts, counts, **start),
            (8 + 4 + size) * numel,  # two rows of the bank read; state and model input written
            5e-3,
        ),
        Case(
            f"euler_ancestral_step {where}",
            lambda: euler_ancestral_step(bank, halved, rows, **step),
            lambda: euler_ancestral_step_reference(bank, halved, rows, **step),
            (4 + size + 4 + size) * numel,  # state and eps read, state and model input written
            2e-2,
        ),
    ]


def pixel_cases(device: str, batch: int, side: int) -> list[Case]:
    """Patches up, images down to the student, mosaics; half outputs on a GPU."""
    half = torch.float16 if device == "cuda" else torch.float32
    size, patch = half.itemsize, side // 2
    patches = torch.randint(0, 256, (batch, patch, patch, 3), dtype=torch.uint8, device=device)
    images = (torch.rand(batch, 3, side, side, device=device) * 2 - 1).to(half)
    boxes = torch.tensor([[3.0, 5.0, side * 0.6, side * 0.7]], device=device).repeat(batch, 1)
    flips = torch.arange(batch, device=device) % 2 == 0
    quads = torch.randint(0, batch, (batch, 4), device=device)
    pixels = batch * 3 * side * side
    student = min(224, side)
    return [
        Case(
            f"upsample_patches {batch} x {patch} to {side}",
            lambda: upsample_patches(patches, side, dtype=half),
            lambda: upsample_patches_reference(patches, side).to(half),
            pixels // 4 + size * pixels,  # bytes read, halves written
            5e-3,
        ),
        Case(
            f"student_input {batch} x {side} to {student}",
            lambda: student_input(images, boxes, flips, student, **IMAGENET, dtype=half),
            lambda: student_input_reference(images, boxes, flips, student, **IMAGENET).to(half),
            int(0.42 * size * pixels) + size * batch * 3 * student**2,  # the box read, out written
            2e-2,
        ),
        Case(
            f"mosaic {batch} x {side}",
            lambda: mosaic(patches, quads, 2),
            lambda: mosaic_reference(patches, quads, 2),
            2 * pixels,
            0,
        ),
    ]


def label_cases(device: str, batch: int, classes: int, kept: int) -> list[Case]:
    """The loss on stored labels with its gradient; torch's is that of dense targets."""
    half = torch.float16 if device == "cuda" else torch.float32
    student = torch.randn(batch, classes, device=device).to(half).requires_grad_()
    teacher = torch.randn(batch, classes, device=device).half()
    top = teacher.float().softmax(1).topk(kept)
    values, codes = top.values.half(), top.indices.to(torch.int32)

    def ours(labels: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = softlabel(student, labels, where, temperature=4.0)
        return loss.detach(), *torch.autograd.grad(loss.sum(), student)

    def torchs(labels: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"classes": classes, "temperature": 4.0}
        target = target_reference(labels, where, None, None, **options)
        loss = softlabel_reference(student, target, 4.0)
        return loss.detach(), *torch.autograd.grad(loss.sum(), student)

    size, where = half.itemsize, f"{batch} x {classes}"
    scores = 3 * size * batch * classes  # read twice, their gradient written once
    return [
        Case(
            f"softlabel, dense {where}",
            lambda: ours(teacher, None),
            lambda: torchs(teacher, None),
            scores + 2 * 2 * batch * classes,
            2e-2,
        ),
        Case(
            f"softlabel, top-{kept} {where}",
            lambda: ours(values, codes),
            lambda: torchs(values, codes),
            scores + batch * kept * (2 * (2 + 4) + 3 * size),
            2e-2,
        ),
    ]


def make_cases(device: str) -> list[Case]:
    """SDXL-Turbo's shapes at 224 and 512 px on a GPU; sdxl-tiny's on the CPU."""
    if device == "cpu":
        latents, pixels = latent_cases(device, 32, 16), pixel_cases(device, 32, 64)
        return [*latents, *pixels, *label_cases(device, 32, 100, 10)]
    cases = []
    for batch, side in ((32, 28), (64, 64)):
        cases += latent_cases(device, batch, side)
    for batch, side in ((64, 224), (64, 512)):
        cases += pixel_cases(device, batch, side)
    for batch, classes in ((256, 1000), (256, 21_841)):
        cases += label_cases(device, batch, classes, 10)
    return cases


def check(case: Case) -> float:
    """Largest difference between kernel and reference. RuntimeError: more than the case allows."""
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


def time_us(call: Callable[[], Any], device: str) -> dict[str, float]:
    """p20, p50 and p80 of a call, in microseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        taken_ms: Any = do_bench(call, warmup=25, rep=100, quantiles=[0.2, 0.5, 0.8])
        return _row([1000 * each for each in taken_ms])
    taken = []
    for number in range(12):
        began = time.perf_counter()
        call()
        if number >= 2:
            taken.append(1e6 * (time.perf_counter() - began))
    return _row([float(each) for each in np.percentile(taken, (20, 50, 80))])


def _row(quantiles: list[float]) -> dict[str, float]:
    return {name: round(us, 2) for name, us in zip(("p20", "p50", "p80"), quantiles, strict=True)}


def copy_bytes_per_s(device: str) -> float:
    """What a copy reaches: read and written."""
    source = torch.empty(COPY_BYTES // (1 if device == "cuda" else 32), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_us(lambda: target.copy_(source), device)["p50"] / 1e6)


def measure(case: Case, device: str, copied: float, compiled: bool) -> dict[str, Any]:
    """The case's row."""
    error = check(case)
    row: dict[str, Any] = {"moved_bytes": case.moved_bytes, "max_difference": error}
    peers = {"kernel": case.kernel, "eager": case.reference}
    if compiled:
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
    return row


def main(options: Options) -> None:
    """Gate, measure, report."""
    device = resolve_device(options.device)
    copied = copy_bytes_per_s(device)
    print(f"copy: {copied / 1e9:.1f} GB/s")
    rows = {}
    for case in make_cases(device):
        if options.only in case.name:
            row = rows[case.name] = measure(case, device, copied, options.compiled)
            speedups = ", ".join(f"{x} x {name}" for name, x in row["speedup"].items())
            print(
                f"{case.name:38} {row['kernel_us']['p50']:9.1f} us   "
                f"{100 * row['share_of_copy']:3.0f} % of copy   {speedups}",
                flush=True,
            )
    row = environment(device) | {
        "benchmark": "kernels",
        "copy_gb_per_s": round(copied / 1e9, 1),
        "cases": rows,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
