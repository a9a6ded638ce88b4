"""Arrange samples in engine batches of G prompts × n images, always full.

Legend: B = G · n slots of a batch, slot b belongs to group b // n; all slots of a group show one
class. A padding slot repeats a sample, and its image is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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


def images_per_prompt(batch: int, class_counts: np.ndarray) -> int:
    """The largest n that divides the batch and every class's sample count.

    A pass over all samples, or over whole classes, then pads at most the last batch.
    """
    return math.gcd(batch, *(int(count) for count in class_counts if count))


def fitting_batch(samples: int, most: int = 32) -> int:
    """The largest engine batch up to `most` that divides a pass over all samples.

    If that is less than half of `most`, and not all samples, it is `most` itself. For 10 classes of
    4 patches it is 20: batches of 32 would render 64 images for 40 samples.
    """
    divisor = max(batch for batch in range(1, most + 1) if samples % batch == 0)
    return divisor if divisor == samples or 2 * divisor >= most else most


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
