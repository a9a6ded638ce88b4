"""The view of a (sample, epoch) that students see: crop, flip and CutMix, functions of the seed.

The engine is faster with several images of one prompt together; a student needs mixed classes. So
samples of a class stay together in groups, an epoch permutes the groups (Draw.ORDER) and cuts them
into pools, and each student permutes the samples of a pool again. A view is a random resized crop
of the sample's image, mirrored in half of the cases; with CutMix a box of a partner's view is
pasted in. The partner is a sample of the same pool. The teacher's answer to a view is therefore the
same for every student, whatever its own seed, and can be stored.

CutMix (Yun et al. 2019, as RDED uses it, but drawn per sample and not per batch), u = Draw.CUTMIX:

    partner = floor(u0 · P),   lambda = u1 (Beta(1, 1)),   side = size · sqrt(1 - lambda)
    centre = floor(u2 · size), floor(u3 · size);   the box is clipped to the image

Shapes: N samples in all, P samples of a pool, H = W = size_px.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...engine.data.boxes import RandomResizedCrops
from ...engine.expand.batches import upload
from ...kernels.noise import Draw, uniform
from ...kernels.student_input import student_input
from ..config import StudentConfig, pool_size
from ..teacher.normalisation import IMAGENET, Normalisation

if TYPE_CHECKING:
    from ..methods.source import ImageSource


def pools(config: StudentConfig, labels_N: Tensor, epoch: int) -> list[Tensor]:
    """The pools of an epoch: int64 sample numbers, each sample once.

    `labels_N` are the classes of all samples, ascending. Groups of `config.group` samples of one
    class, the last of a class perhaps smaller, are split only where a pool ends.
    """
    u_N2 = uniform(config.seed, Draw.ORDER, torch.arange(len(labels_N)), epoch, 2)
    within_N = torch.from_numpy(np.lexsort((u_N2[:, 0].numpy(), labels_N.numpy())))
    counts = torch.bincount(labels_N).tolist()
    groups = [g for members in within_N.split(counts) for g in members.split(config.group)]
    first_G = torch.stack([group[0] for group in groups])
    order_G = torch.argsort(u_N2[first_G, 1 if config.group > 1 else 0], stable=True)
    return list(torch.cat([groups[index] for index in order_G.tolist()]).split(pool_size(config)))


def render_views(
    source: ImageSource, samples_P: Tensor, epoch: int, config: StudentConfig
) -> Tensor:
    """Render a pool and make its views: `make_views` of its images."""
    return make_views(source.render(samples_P, epoch), samples_P, epoch, config)


def render_some_views(
    source: ImageSource, samples_P: Tensor, epoch: int, config: StudentConfig, rows_S: Tensor
) -> tuple[Tensor, int]:
    """Views [S, …] of some rows of a pool, and how many images were rendered for them: with CutMix
    also those whose boxes they show."""
    needed = rows_S
    if config.cutmix:
        partners_P, _ = cutmix_of(samples_P, epoch, config)
        needed = torch.cat([rows_S, partners_P[rows_S]]).unique()
    made = source.render(samples_P[needed], epoch)
    images_PCHW = made.new_full((len(samples_P), *made.shape[1:]), -1.0)
    images_PCHW[needed.to(made.device)] = made
    views_PCHW = make_views(images_PCHW, samples_P, epoch, config)
    return views_PCHW[rows_S.to(made.device)], len(needed)


def make_views(
    images_PCHW: Tensor,
    samples_P: Tensor,
    epoch: int,
    config: StudentConfig,
    normalisation: Normalisation = IMAGENET,
) -> Tensor:
    """Images of a whole pool, in [-1, 1], to normalised inputs [P, 3, size_px, size_px].

    The result has the precision `config.views`, channels_last, on the images' device.
    """
    device = images_PCHW.device
    count, _, height, width = images_PCHW.shape
    crops = RandomResizedCrops(
        crops=1, seed=config.seed, draw=Draw.STUDENT_CROP, scale=config.crop_scale
    )
    heights_P, widths_P = np.full(count, height), np.full(count, width)
    boxes_P14 = crops(samples_P.numpy(), heights_P, widths_P, epoch)
    boxes_P4 = torch.from_numpy(boxes_P14[:, 0]).float()
    flips_P = torch.zeros(count, dtype=torch.bool)
    if config.flip:
        flips_P = uniform(config.seed, Draw.FLIP, samples_P, epoch, 1)[:, 0] < 0.5
    cutmix = None
    if config.cutmix:
        partners_P, pasted_P4 = cutmix_of(samples_P, epoch, config)
        cutmix = upload(partners_P, device), upload(pasted_P4, device)
    return student_input(
        images_PCHW.contiguous(),
        upload(boxes_P4, device),
        upload(flips_P, device),
        config.size_px,
        normalisation.mean,
        normalisation.std,
        cutmix=cutmix,
        dtype=torch.float32 if config.views == "fp32" else torch.float16,
    )


def cutmix_of(samples_P: Tensor, epoch: int, config: StudentConfig) -> tuple[Tensor, Tensor]:
    """Each sample's partner (its position in the pool) and the box that shows it, unclipped.

    Both int64: [P] and (top, left, height, width) [P, 4].
    """
    size_px = config.size_px
    u_P4 = uniform(config.seed, Draw.CUTMIX, samples_P, epoch, 4)
    partners_P = (u_P4[:, 0] * len(samples_P)).long()
    half_P = ((1 - u_P4[:, 1]).sqrt() * size_px).floor() // 2
    corners_P2 = (u_P4[:, 2:] * size_px).floor() - half_P[:, None]
    sides_P2 = (2 * half_P)[:, None].expand(-1, 2)
    return partners_P, torch.cat([corners_P2, sides_P2], dim=1).long()


def describe_views(config: StudentConfig) -> dict[str, Any]:
    """Everything that decides the view of an image, and so its label; part of stored labels."""
    described: dict[str, Any] = {
        "seed": config.seed,
        "size_px": config.size_px,
        "crop_scale": list(config.crop_scale),
        "flip": config.flip,
        "cutmix": config.cutmix,
    }
    if config.cutmix:
        described["pool"] = pool_size(config)
        if config.group > 1:
            described["group"] = config.group
    if config.views != "fp32":
        described["views"] = config.views
    return described
