"""Batching for the engine: images per call, and samples of a class that stay together."""

from __future__ import annotations

import math

from .config import StudentConfig, pool_size

CPU_ENGINE_BATCH = 32
MOST_TOGETHER = 8  # samples of a class per group: more would skew a student's batches


def fitting_batch(samples: int, most: int = CPU_ENGINE_BATCH) -> int:
    """The largest engine batch up to `most` that divides a pass over all samples.

    If that is less than half of `most`, and not all samples, it is `most` itself. For 10 classes of
    4 patches it is 20: batches of 32 would render 64 images for 40 samples.
    """
    divisor = max(batch for batch in range(1, most + 1) if samples % batch == 0)
    return divisor if divisor == samples or 2 * divisor >= most else most


def whole_class_batch(ipc: int, classes: int) -> int:
    """Engine batch of whole classes with `ipc` images each, or of a part of a larger class."""
    if ipc > CPU_ENGINE_BATCH:
        return fitting_batch(ipc)
    return ipc * fitting_batch(classes, CPU_ENGINE_BATCH // ipc)


def engine_batch_for(
    samples: int, student: StudentConfig, refresh: float = 1.0, most: int = CPU_ENGINE_BATCH
) -> int:
    """Default images per call of the model, up to `most`, for `samples` per epoch.

    An epoch of many pools has `most`; the last call of each pool may be padded.
    """
    if refresh < 1:
        return fitting_batch(round(refresh * min(samples, pool_size(student))), most)
    return fitting_batch(samples, most) if samples <= pool_size(student) else most


def grouping(classes: int, each: int, student: StudentConfig) -> int | None:
    """Samples of a class that stay together in an epoch's order.

    None when an epoch is one pool: its order does not matter, and the Expander's own choice, a
    divisor of a class's samples, pads nothing. A pool of 1000 classes has about one sample of each:
    without groups, 8 images per prompt would render five times the images needed, and 1 would read
    a prompt's keys and values for every image.
    """
    if classes * each <= pool_size(student):
        return None
    return math.gcd(each, pool_size(student), MOST_TOGETHER)


def together_in_engine(group: int | None, engine_batch: int, refresh: float) -> int | None:
    """ExpandConfig.images_per_prompt for groups of an epoch's order. None: the Expander's choice.

    1 with `refresh` below 1, where the number of samples expanded per group varies.
    """
    if refresh < 1:
        return 1
    return None if group is None else math.gcd(group, engine_batch)
