"""NOpt: optimises the noise of a denoising step, for all images of a class together.

    x' = mu + sigma_up · eps         mu: the step's mean, a constant; eps: the optimised noise
    x  = x' / sqrt(sigma² + 1)       the network's next input
    loss(eps) = match(x) + sum over images of |r| + r²,        r = ||eps|| - sqrt(D)

    with real images   match = a · n · sum over images and features of |d| + d²,
                       d = the gap between the sorted features of the n images and their pivots
    data-free          match = b · sum over channels of (mean - mean')² + (std - std')²
                               + c · the mean cosine similarity of two images

eps starts as the ancestral noise that the plain sampler would draw. The first state is a Latin
hypercube of Gaussians: in each of D dimensions, each of n equally probable intervals holds one of a
class's n images.

Source: DsCo, arXiv 2603.27987. Our choices, where it is silent: data-free statistics are those of
each channel of x, over images and positions, compared by squared difference; similarity is that of
whole x.

Legend: N images of one class, F features, C h w of a latent, D = C·h·w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...kernels.noise import Draw, uniform
from ..config import DscoConfig

Match = Callable[[Tensor], Tensor]
"""x, fp32 [N, C, h, w] → the match term of the loss."""


class ChannelStatistics(NamedTuple):
    """Statistics of x over images and positions; fp32 [C] each."""

    mean_C: Tensor
    std_C: Tensor


def latin_hypercube(seed: int, samples_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals of one class's samples, stratified over them: fp32 [N, *shape].

    They depend on the seed and the set of sample numbers (int64).
    """
    count = math.prod(shape)
    order_ND = uniform(seed, Draw.LATIN, samples_N, 0, count)
    within_ND = uniform(seed, Draw.LATIN, samples_N, 1, count)
    interval_ND = order_ND.argsort(dim=0, stable=True).argsort(dim=0)
    u_ND = (interval_ND.double() + within_ND.double()) / len(samples_N)
    return torch.special.ndtri(u_ND).float().view(len(samples_N), *shape)


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


def optimise_noise(
    mean_NCHW: Tensor,
    noise_NCHW: Tensor,
    *,
    sigma_up: float,
    scale: float,
    match: Match,
    config: DscoConfig,
) -> tuple[Tensor, tuple[float, float]]:
    """Optimise the noise; return it, fp32 [N, C, h, w], and the loss before and after.

    `scale` is 1 / sqrt(sigma² + 1) at the level that the step leads to. Raises ValueError when a
    finite loss becomes NaN or infinite.
    """
    noise_NCHW = noise_NCHW.clone().requires_grad_()
    sgd = torch.optim.SGD([noise_NCHW], lr=config.learning_rate, momentum=config.momentum)

    def loss() -> Tensor:
        x_NCHW = (mean_NCHW + sigma_up * noise_NCHW) * scale
        return match(x_NCHW) + norm_loss(noise_NCHW)

    # cuDNN would otherwise choose different algorithms in different runs.
    with (
        torch.enable_grad(),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
    ):
        first = float(loss().detach())
        for _ in range(config.iterations):
            sgd.zero_grad(set_to_none=True)
            loss().backward()
            sgd.step()
        last = float(loss().detach())
    if math.isfinite(first) and not math.isfinite(last):
        raise ValueError(
            f"method dsco: the loss went from {first:.3g} to {last} in {config.iterations} "
            f"iterations: give a smaller --dsco.learning-rate than {config.learning_rate:g}"
        )
    return noise_NCHW.detach(), (first, last)
