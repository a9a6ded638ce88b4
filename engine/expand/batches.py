"""Arrange samples in engine batches of G prompts × n images, always full.

Legend: B = G · n slots of a batch, slot b belongs to group b // n; all slots of a group show one
class. A padding slot repeats a sample, and its image is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...export.config import EngineSpec


@dataclass(frozen=True)
class BatchPlan:
    """One call of the engine."""

    samples_B: np.ndarray
    """Sample of each slot, int64."""
    targets_B: np.ndarray
    """Position of the slot's image in the output, int64; -1: padding."""
    classes_G: np.ndarray
    """Class of each group, int64."""


@dataclass(frozen=True)
class DeviceBatch:
    """A BatchPlan whose numbers are on the device; int64."""

    plan: BatchPlan
    samples_B: Tensor
    targets_B: Tensor
    """Padding has the position behind the last image's."""
    classes_G: Tensor


def images_per_prompt(batch: int, class_counts: np.ndarray) -> int:
    """The largest n that divides the batch and every class's sample count.

    A pass over all samples, or over whole classes, then pads at most the last batch.
    """
    return math.gcd(batch, *(int(count) for count in class_counts if count))


def plan_batches(
    samples: np.ndarray, labels_N: np.ndarray, spec: EngineSpec
) -> Iterator[BatchPlan]:
    """Arrange `samples` (int64, any order, repeats allowed) by class into full batches."""
    if not len(samples):
        return
    prompts, images_per_prompt = spec.prompts, spec.images_per_prompt
    order = np.argsort(labels_N[samples], kind="stable")
    group_samples, group_targets = [], []
    for members in np.split(order, np.flatnonzero(np.diff(labels_N[samples][order])) + 1):
        padded = -len(members) % images_per_prompt
        targets = np.concatenate([members, np.full(padded, -1)])
        rows = samples[np.concatenate([members, np.full(padded, members[-1])])]
        group_targets.append(targets.reshape(-1, images_per_prompt))
        group_samples.append(rows.reshape(-1, images_per_prompt))
    samples_Gn, targets_Gn = np.concatenate(group_samples), np.concatenate(group_targets)
    padded = -len(samples_Gn) % prompts
    samples_Gn = np.concatenate([samples_Gn, np.repeat(samples_Gn[-1:], padded, axis=0)])
    targets_Gn = np.concatenate([targets_Gn, np.full((padded, images_per_prompt), -1)])
    for first in range(0, len(samples_Gn), prompts):
        chosen = samples_Gn[first : first + prompts]
        yield BatchPlan(
            samples_B=chosen.reshape(-1),
            targets_B=targets_Gn[first : first + prompts].reshape(-1),
            classes_G=labels_N[chosen[:, 0]],
        )


def upload_plans(
    plans: Sequence[BatchPlan], images: int, device: torch.device
) -> Iterator[DeviceBatch]:
    """The plans of `images` images on the device, by one copy that the host does not wait for."""
    if not plans:
        return
    batch, prompts = len(plans[0].samples_B), len(plans[0].classes_G)
    width = batch + batch % 2  # 16 bytes: an aligned address is what kernels are compiled for
    numbers_P3W = np.zeros((len(plans), 3, width), dtype=np.int64)
    for rows_3W, plan in zip(numbers_P3W, plans, strict=True):
        rows_3W[0, :batch] = plan.samples_B
        rows_3W[1, :batch] = np.where(plan.targets_B < 0, images, plan.targets_B)
        rows_3W[2, :prompts] = plan.classes_G
    for rows_3W, plan in zip(upload(numbers_P3W, device), plans, strict=True):
        yield DeviceBatch(plan, rows_3W[0, :batch], rows_3W[1, :batch], rows_3W[2, :prompts])


def upload(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The host's numbers on the device; the host does not wait for the copy."""
    values = torch.as_tensor(numbers)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
