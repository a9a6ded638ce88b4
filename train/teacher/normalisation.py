"""Normalisation of pixels before a network sees them.

    x = (v - mean) / std,      v the pixel in [0, 1], per channel (R, G, B)

Teacher and student may differ: inputs for one are renormalised for the other, affinely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, in [0, 1] units."""

    mean: Triple
    std: Triple

    def of_uint8(self, images_NHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → fp32 [B, 3, H, W], channels_last."""
        scale, shift = self._affine(images_NHWC.device)
        pixels_NHWC = images_NHWC.float().mul_(scale / 255).add_(shift)
        return pixels_NHWC.permute(0, 3, 1, 2)

    def from_other(self, inputs_BCHW: Tensor, other: Normalisation) -> Tensor:
        """Renormalise inputs that `other` normalised; returns the same tensor when they agree."""
        if other == self:
            return inputs_BCHW
        device = inputs_BCHW.device
        other_mean, other_std = (
            torch.tensor(v, device=device, dtype=torch.float32) for v in (other.mean, other.std)
        )
        scale, shift = self._affine(device)
        factor, offset = scale * other_std, scale * other_mean + shift
        return inputs_BCHW * factor[:, None, None] + offset[:, None, None]

    def rgb(self) -> tuple[int, ...]:
        """The mean as a colour in 0..255: the zero of the network's inputs."""
        return tuple(round(255 * value) for value in self.mean)

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=device, dtype=torch.float32)
            for values in (self.mean, self.std)
        )
        return 1 / std, -mean / std


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Normalisation of every network that is trained here, and of RDED's."""
