"""Patches up, pictures down to the student, mosaics, and the loss on stored labels.

Formulas of the bytes: kernels/pixels.py, student_input.py, mosaic.py and softlabel.py. Names give
pictures x side in pixels, or pictures x classes. Pictures and logits are of ``model_dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import Case, model_dtype
from patchbloom.kernels.mosaic import mosaic, mosaic_reference
from patchbloom.kernels.pixels import upsample_patches, upsample_patches_reference
from patchbloom.kernels.softlabel import softlabel, softlabel_reference, target_reference
from patchbloom.kernels.student_input import student_input, student_input_reference
from torch import Tensor

TARGET_SIDE_PX, TARGET_SHARE = 512, 0.85
"""From this side on, a batch of 64 is to reach this share of copy bandwidth."""
BOX = 0.6, 0.7
"""Height and width of every crop, as shares of the picture's side."""
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Views:
    """Pictures, and what the student sees of them."""

    inputs: tuple[Tensor, Tensor, Tensor]
    """Pictures, boxes, flips."""
    cutmix: tuple[Tensor, Tensor]
    """Each picture's neighbour, in a quarter of its pixels."""
    moments: dict[str, Any]
    """ImageNet's mean_C and std_C."""


def random_views(device: str, batch: int, side: int) -> Views:
    """``batch`` pictures of ``side`` pixels; CutMix boxes for views of at most 224."""
    size = min(224, side)
    images = (torch.rand(batch, 3, side, side, device=device) * 2 - 1).to(model_dtype(device))
    boxes = torch.tensor([[3.0, 5.0, side * BOX[0], side * BOX[1]]], device=device)
    rows = torch.arange(batch, device=device)
    pasted = torch.tensor([[size // 5, size // 3, size // 2, size // 2]], device=device)
    return Views(
        (images, boxes.repeat(batch, 1), rows % 2 == 0),
        (rows.roll(1), pasted.repeat(batch, 1)),
        {"mean_C": (0.485, 0.456, 0.406), "std_C": (0.229, 0.224, 0.225)},
    )


def view_bytes(views: Views, size_px: int, dtype: torch.dtype) -> int:
    """The boxes read, which CutMix does not change as all are of one size; the views written."""
    images = views.inputs[0]
    batch, channels = images.shape[:2]
    read = int(BOX[0] * BOX[1] * images.numel()) * images.itemsize
    return read + batch * channels * size_px**2 * dtype.itemsize


def pixel_cases(device: str, batch: int, side: int, *, compiled: bool) -> list[Case]:
    """Patches up, pictures down to the student with and without CutMix, mosaics."""
    half, patch, student = model_dtype(device), side // 2, min(224, side)
    patches = torch.randint(0, 256, (batch, patch, patch, 3), dtype=torch.uint8, device=device)
    tiles = torch.randint(0, 256, (4 * batch, *patches.shape[1:]), dtype=torch.uint8, device=device)
    quads = torch.randperm(4 * batch, device=device).view(batch, 4)
    views = random_views(device, batch, side)
    named = *views.inputs, student
    moments = views.moments
    mix: dict[str, Any] = {"cutmix": views.cutmix}
    pixels = batch * 3 * side * side
    has_target = device == "cuda" and side >= TARGET_SIDE_PX
    common: dict[str, Any] = {
        "compiled": compiled, "share_of_copy": TARGET_SHARE if has_target else None,
    }  # fmt: skip
    view: dict[str, Any] = {
        "moved_bytes": view_bytes(views, student, half), "tolerance": 2e-2, **common,
    }  # fmt: skip
    return [
        Case(
            name=f"upsample_patches {batch} x {patch} to {side}",
            kernel=lambda: upsample_patches(patches, side, dtype=half),
            reference=lambda: upsample_patches_reference(patches, side).to(half),
            moved_bytes=patches.numel() + half.itemsize * pixels,
            tolerance=5e-3,
            **common,
        ),
        Case(
            name=f"student_input {batch} x {side} to {student}",
            kernel=lambda: student_input(*named, **moments, dtype=half),
            reference=lambda: student_input_reference(*named, **moments).to(half),
            **view,
        ),
        Case(
            name=f"student_input, CutMix {batch} x {side} to {student}",
            kernel=lambda: student_input(*named, **moments, **mix, dtype=half),
            reference=lambda: student_input_reference(*named, **moments, **mix).to(half),
            **view,
        ),
        Case(
            name=f"mosaic {batch} x {side}",
            kernel=lambda: mosaic(tiles, quads, 2),
            reference=lambda: mosaic_reference(tiles, quads, 2),
            moved_bytes=2 * pixels,
            tolerance=0,
            speedup=None,
            **common,
        ),
    ]


def label_cases(device: str, batch: int, classes: int, kept: int, *, compiled: bool) -> list[Case]:
    """The loss on stored labels with its gradient: dense and top-k, alone and mixed by CutMix."""
    student = torch.randn(batch, classes, device=device).to(model_dtype(device)).requires_grad_()
    teacher = torch.randn(batch, classes, device=device).half()
    top = (teacher.float() / TEMPERATURE).softmax(1).topk(kept)
    rows = torch.arange(batch, device=device)
    pairs = torch.stack((rows, rows.roll(1)), 1), torch.full((batch,), 0.7, device=device)
    s = student.itemsize
    cases = []
    for mixed in (False, True):
        mix = pairs if mixed else (None, None)
        labels = 2 if mixed else 1
        kinds: dict[str, tuple[tuple[Tensor, Tensor | None], int]] = {
            # Bytes of a label row, read by the forward and by the backward pass.
            "dense": ((teacher, None), 2 * 2 * classes),
            f"top-{kept}": ((top.values.half(), top.indices.int()), kept * (2 * (2 + 4) + 3 * s)),
        }
        for kind, (stored, label_bytes) in kinds.items():
            named = student, *stored, *mix
            cases.append(
                Case(
                    name=f"softlabel, {kind}{', mixed' if mixed else ''} {batch} x {classes}",
                    kernel=lambda named=named: _with_gradient(_loss(*named), named[0]),
                    reference=lambda named=named: _with_gradient(_reference(*named), named[0]),
                    moved_bytes=batch * (3 * s * classes + labels * label_bytes),
                    tolerance=2e-2,
                    compiled=compiled,
                )
            )
    return cases


def _with_gradient(loss: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def _loss(
    student: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    mix: dict[str, Any] = {"rows_B2": rows, "weight_B": weight}
    return softlabel(student, labels, classes, temperature=TEMPERATURE, **mix)


def _reference(
    student: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    settings = {"classes": student.shape[1], "temperature": TEMPERATURE}
    target = target_reference(labels, classes, rows, weight, **settings)
    return softlabel_reference(student, target, TEMPERATURE)
