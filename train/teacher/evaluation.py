"""Accuracy on a whole split: one pass over the files evaluates every network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.data.crops import STANDARD_RESIZE_RATIO, center_boxes, stream_crops
from ...engine.data.images import ImageSet
from ...engine.peers import share_of
from ..config import StudentPrecision
from ..networks import autocast
from ..run.world import ALONE, World
from .normalisation import IMAGENET, Normalisation

FORWARD_BATCH = {"cpu": 32, "cuda": 256}
"""Images per forward pass. One CPU core, convnet-d4-w24to96 at 64 px: 0.80 ms per image at 32,
1.06 at 64, 1.25 at 128, where the activations leave the cache."""


class Score(NamedTuple):
    """Top-1 accuracies in percent (0-100)."""

    accuracy: float
    """On all images."""
    by_class: list[float]
    """On the images of each class, rounded to 0.01."""


@torch.inference_mode()
def evaluate(
    networks: Sequence[Callable[[Tensor], Tensor]],
    images: ImageSet,
    *,
    size_px: int,
    device: torch.device,
    normalisation: Normalisation = IMAGENET,
    precision: StudentPrecision = "fp32",
    world: World = ALONE,
) -> list[Score]:
    """Top-1 accuracy of each network on a split; resize 8/7 and centre crop.

    Each of the M networks is a module, which is left in eval mode, or any function from normalised
    images [B, 3, size_px, size_px] to logits [B, K]; it runs under autocast at `precision`. Files
    that cannot be decoded are refused. The ranks of `world` share the images, batch by batch, and
    all return the same result.
    """
    for network in networks:
        if isinstance(network, nn.Module):
            network.eval()
    classes = len(images.class_ids)
    right_MK = torch.zeros(len(networks), classes, dtype=torch.int64)
    batch = FORWARD_BATCH[device.type]
    stream = stream_crops(
        images,
        share_of(np.arange(len(images)), batch, world),
        center_boxes(STANDARD_RESIZE_RATIO, size_px),
        crops=1,
        size_px=size_px,
        batch=batch,
        device=str(device),
        threads=world.threads,
    )
    for crops in stream:
        inputs_BCHW = normalisation.of_uint8(crops.pixels_BPHWC[:, 0])
        with autocast(device, precision):
            classes_MB = torch.stack([network(inputs_BCHW).argmax(1).cpu() for network in networks])
        for right_K, named_B in zip(right_MK, classes_MB, strict=True):
            right_K += crops.labels_B[named_B == crops.labels_B].bincount(minlength=classes)
    right_MK = np.sum(world.all_gather(right_MK.tolist()), axis=0)
    counts_K = np.bincount(images.labels, minlength=classes)
    by_class_MK = (100 * right_MK / counts_K).round(2)
    total_M = right_MK.sum(1).tolist()
    return [
        Score(100.0 * total / len(images), by_class_K.tolist())
        for total, by_class_K in zip(total_M, by_class_MK, strict=True)
    ]
