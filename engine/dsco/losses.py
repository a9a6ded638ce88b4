"""Losses of noise optimisation (NOpt), for all images of a class together.

    loss = match(x) + sum over images of |r| + r²,        r = ||eps|| - sqrt(D)

    with real images   match = a · n · sum over images and features of |d| + d²,
                       d = the gap between the sorted features of the n images and their pivots
    data-free          match = b · sum over channels of (mean - mean')² + (std - std')²
                               + c · the mean cosine similarity of two images

x is the network's next input, and eps the noise in it. Source: DsCo, arXiv 2603.27987. Our choices,
where it is silent: data-free statistics are those of each channel of x, over images and positions,
compared by squared difference; similarity is that of whole x.

Legend: N images of one class, F features, C h w of a latent, D = C·h·w.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config import DscoConfig


class ChannelStatistics(NamedTuple):
    """Statistics of x over images and positions; fp32 [C] each."""

    mean_C: Tensor
    std_C: Tensor


def pivot_loss(features_NF: Tensor, pivots_NF: Tensor, weight: float) -> Tensor:
    """weight · N · sum of |d| + d² of the sorted features; `pivots_NF` are ascending."""
    gaps_NF = features_NF.sort(dim=0, stable=True).values - pivots_NF
    return weight * len(gaps_NF) * (gaps_NF.abs() + gaps_NF.square()).sum()


def norm_loss(noise_NCHW: Tensor) -> Tensor:
    """Sum of |r| + r² over the images: D Gaussian numbers have a norm of about sqrt(D)."""
    noise_ND = noise_NCHW.flatten(1)
    off_N = noise_ND.norm(dim=1) - math.sqrt(noise_ND.shape[1])
    return (off_N.abs() + off_N.square()).sum()


def channel_statistics(x_NCHW: Tensor) -> ChannelStatistics:
    """Mean and standard deviation of every channel."""
    std_C, mean_C = torch.std_mean(x_NCHW, dim=(0, 2, 3), correction=0)
    return ChannelStatistics(mean_C, std_C)


def data_free_loss(x_NCHW: Tensor, templates: ChannelStatistics, config: DscoConfig) -> Tensor:
    """The match with the templates' statistics, plus repulsion (zero for one image)."""
    of_x = channel_statistics(x_NCHW)
    gaps = (of_x.mean_C - templates.mean_C).square() + (of_x.std_C - templates.std_C).square()
    loss = config.match_weight * gaps.sum()
    images = len(x_NCHW)
    if images > 1:
        unit_ND = normalize(x_NCHW.flatten(1), dim=1)
        pairs = unit_ND.sum(0).square().sum() - unit_ND.square().sum()
        loss = loss + config.repulsion_weight * pairs / (images * (images - 1))
    return loss
