"""Crop boxes as functions of the sample: torchvision's random resized crop, seeded.

Shapes: B images, P crops of one image, T tries for a box. A box is (top, left, height, width) in
pixels of the upright image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...kernels.noise import Draw, uniform_numpy

TRIES = 10


def resized_crop_boxes(
    uniforms_BPT4: np.ndarray,
    heights_B: np.ndarray,
    widths_B: np.ndarray,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """torchvision's RandomResizedCrop as a function of its uniform numbers: int64 [B, P, 4].

    Try t of a crop has four numbers in (0, 1): area, log of the aspect ratio (width / height), top
    and left. The first try whose rounded box fits the image wins; if none of the T fits, the result
    is the largest centred box of the nearest allowed ratio. torchvision draws until a try fits, and
    only then top and left; drawing all of them at once leaves the distribution unchanged and makes
    a box a pure function of (seed, draw, sample, epoch). Computed in float64.
    """
    area_BPT, aspect_BPT, top_BPT, left_BPT = np.moveaxis(uniforms_BPT4.astype(np.float64), -1, 0)
    height_B11, width_B11 = heights_B[:, None, None], widths_B[:, None, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target_BPT = height_B11 * width_B11 * (scale[0] + (scale[1] - scale[0]) * area_BPT)
    root_BPT = np.exp(0.5 * (low + (high - low) * aspect_BPT))
    side_BPT = np.sqrt(target_BPT)
    h_BPT = np.rint(side_BPT / root_BPT).astype(np.int64)
    w_BPT = np.rint(side_BPT * root_BPT).astype(np.int64)
    fits_BPT = (h_BPT > 0) & (w_BPT > 0) & (h_BPT <= height_B11) & (w_BPT <= width_B11)
    top_BPT = np.floor(top_BPT * (height_B11 - h_BPT + 1)).astype(np.int64)
    left_BPT = np.floor(left_BPT * (width_B11 - w_BPT + 1)).astype(np.int64)
    boxes_BPT4 = np.stack((top_BPT, left_BPT, h_BPT, w_BPT), axis=-1)
    first_BP11 = fits_BPT.argmax(axis=-1)[..., None, None]
    boxes_BP4 = np.take_along_axis(boxes_BPT4, first_BP11, axis=2)[:, :, 0]
    fallback_B14 = _central_boxes(heights_B, widths_B, ratio)[:, None]
    return np.where(fits_BPT.any(axis=-1)[..., None], boxes_BP4, fallback_B14)


def _central_boxes(
    heights_B: np.ndarray, widths_B: np.ndarray, ratio: tuple[float, float]
) -> np.ndarray:
    """The largest centred box whose width / height is inside ``ratio``: int64 [B, 4]."""
    w_B = np.minimum(widths_B, np.rint(heights_B * ratio[1]).astype(np.int64))
    h_B = np.minimum(heights_B, np.rint(widths_B / ratio[0]).astype(np.int64))
    return np.stack(((heights_B - h_B) // 2, (widths_B - w_B) // 2, h_B, w_B), axis=-1)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrops:
    """Boxes for ``stream_crops``: crop p of a sample uses elements 4·T·p … of its uniform draw."""

    crops: int
    seed: int
    draw: Draw
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, sample_B: np.ndarray, heights_B: np.ndarray, widths_B: np.ndarray, epoch: int
    ) -> np.ndarray:
        """boxes_BP4, int64; sizes in pixels."""
        count = self.crops * TRIES * 4
        uniforms = uniform_numpy(self.seed, self.draw, sample_B, epoch, count)
        uniforms_BPT4 = uniforms.reshape(len(sample_B), self.crops, TRIES, 4)
        return resized_crop_boxes(
            uniforms_BPT4, heights_B, widths_B, scale=self.scale, ratio=self.ratio
        )
