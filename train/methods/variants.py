"""Post data augmentation of generated images: random variants, new in every epoch.

From generative dataset distillation (Su et al. 2024, arXiv 2408.08610), in this order, on 8 bits:

    mirror         with p = 0.8, left to right
    upturn         with p = 0.8, top to bottom
    tones          with p = 0.5, x ← clamp(contrast · x + brightness), x in [0, 1],
                   contrast in 1 ± 0.2, brightness in ± 0.2
    rotate         with p = 0.8, by an angle in ± 60°, bilinear, reflected at the borders
    gamma          with p = 0.5, x ← x^gamma, gamma in 1 ± 0.2

The paper gives the probabilities and the angle. It leaves the other ranges and the border open;
they are albumentations' defaults of that time. All values are uniform, from Draw.AUGMENTATION: a
variant is a pure function of (seed, sample, epoch).

Legend: P images, H W size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ...kernels.noise import Draw, uniform

MIRROR_P = UPTURN_P = ROTATE_P = 0.8
TONES_P = GAMMA_P = 0.5
TONES_RANGE = GAMMA_RANGE = 0.2
ANGLE_RANGE = 60.0
_DRAWN = 9  # numbers per variant
_LEVELS = torch.arange(256, dtype=torch.float64) / 255


@dataclass(frozen=True, kw_only=True)
class Variants:
    """Parameters of the variants of P images, on the CPU. fp64, so that vectorised rounding, which
    depends on the place in a batch, changes no 8-bit pixel."""

    mirrored_P: Tensor
    """bool."""
    upturned_P: Tensor
    """bool."""
    contrast_P: Tensor
    """In [0.8, 1.2]; 1: unchanged."""
    brightness_P: Tensor
    """In [-0.2, 0.2] of the whole range; 0: unchanged."""
    angle_P: Tensor
    """Degrees in [-60, 60]; 0: unchanged."""
    gamma_P: Tensor
    """In [0.8, 1.2]; 1: unchanged."""


def draw_variants(seed: int, samples_P: Tensor, epoch: int) -> Variants:
    """Variants of samples (int64 [P], CPU) at `epoch`."""
    u_9P = uniform(seed, Draw.AUGMENTATION, samples_P, epoch, _DRAWN).double().T
    spread_9P = 2 * u_9P - 1  # in (-1, 1)
    toned_P, rotated_P, bent_P = u_9P[2] < TONES_P, u_9P[5] < ROTATE_P, u_9P[7] < GAMMA_P
    return Variants(
        mirrored_P=u_9P[0] < MIRROR_P,
        upturned_P=u_9P[1] < UPTURN_P,
        contrast_P=1 + TONES_RANGE * spread_9P[3] * toned_P,
        brightness_P=TONES_RANGE * spread_9P[4] * toned_P,
        angle_P=ANGLE_RANGE * spread_9P[6] * rotated_P,
        gamma_P=1 + GAMMA_RANGE * spread_9P[8] * bent_P,
    )


def augment(images_PHWC: Tensor, variants: Variants) -> Tensor:
    """Apply the variants: uint8 [P, H, W, 3] → the same shape and device; H and W at least 2."""
    device = images_PHWC.device
    mirrored_P, upturned_P, rotated_P = (
        flag_P.to(device)[:, None, None, None]
        for flag_P in (variants.mirrored_P, variants.upturned_P, variants.angle_P != 0)
    )
    images = torch.where(mirrored_P, images_PHWC.flip(2), images_PHWC)
    images = torch.where(upturned_P, images.flip(1), images)
    contrast_P1, brightness_P1 = variants.contrast_P[:, None], variants.brightness_P[:, None]
    images = _looked_up(images, _LEVELS * contrast_P1 + brightness_P1)
    images = torch.where(rotated_P, _rotated(images, variants.angle_P), images)
    return _looked_up(images, _LEVELS ** variants.gamma_P[:, None])


def _looked_up(images_PHWC: Tensor, tones_P256: Tensor) -> Tensor:
    """Replace each of the 256 levels by its tone, clamped to [0, 1]."""
    table_P256 = tones_P256.clamp(0, 1).mul(255).round().to(images_PHWC.device, torch.uint8)
    return table_P256.gather(1, images_PHWC.flatten(1).long()).view_as(images_PHWC)


def _rotated(images_PHWC: Tensor, angle_P: Tensor) -> Tensor:
    """Rotate about the centre; reflect at the centres of the outermost pixels."""
    device = images_PHWC.device
    height, width = images_PHWC.shape[1:3]
    radians_P11 = angle_P.deg2rad()[:, None, None]
    cos_P11, sin_P11 = (each.float().to(device) for each in (radians_P11.cos(), radians_P11.sin()))
    half_h, half_w = (height - 1) / 2, (width - 1) / 2
    y_H1 = (torch.arange(height, device=device) - half_h)[:, None]
    x_W = torch.arange(width, device=device) - half_w
    from_x_PHW = (cos_P11 * x_W + sin_P11 * y_H1) / half_w
    from_y_PHW = (cos_P11 * y_H1 - sin_P11 * x_W) / half_h
    turned_PCHW = grid_sample(
        images_PHWC.permute(0, 3, 1, 2).float(),
        torch.stack((from_x_PHW, from_y_PHW), dim=-1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )
    return turned_PCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
