"""NOpt, method dsco: text-to-image sampling that optimises the noise of every step but the last.

    x' = mu + sigma_up · eps         mu: the step's mean, a constant; eps: the optimised noise
    x  = x' / sqrt(sigma² + 1)       the network's next input; sigma: the level after the step
    loss(eps)                        losses.py

eps starts as the ancestral noise that the plain sampler would draw. The first state is a Latin
hypercube of Gaussians: in each of D dimensions, each of n equally probable intervals holds one of a
class's n images. The networks get no gradient, so every backend works.

Up to rounding, the images of a class depend only on the seed, the class, the class's other images
and its real images. So groups of classes, each one engine batch or more, can be made separately and
in any order.

Source: DsCo, arXiv 2603.27987.

Legend: N images of one class, M images of a group of classes, B images of an engine call, F
features, C h w of a latent, D = C·h·w, H W of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...kernels.noise import Draw, normal, uniform
from ..config import DscoConfig
from ..expand.batches import DeviceBatch
from ..expand.expander import Expander
from .losses import (
    ChannelStatistics,
    channel_statistics,
    data_free_loss,
    norm_loss,
    pivot_loss,
)
from .pivots import LatentFeatures, Pivots

Match = Callable[[Tensor], Tensor]
"""x, fp32 [N, C, h, w] → the match term of the loss."""
RealImages = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Class → its real images in batches: (uint8 [B, H, W, 3], sample numbers, int64 [B])."""


@dataclass(frozen=True)
class OptimisedImages:
    """Images of a group of classes, sorted by class."""

    images_MCHW: Tensor
    """fp32 in [-1, 1]."""
    losses: list[list[tuple[float, float]]]
    """Per class and optimised step: the loss before and after."""


class NoiseOptimiser:
    """Makes `ipc` images of each class with an Expander that starts from noise.

    Raises ValueError for a schedule of one step, which has no noise to optimise.
    """

    def __init__(self, expander: Expander, config: DscoConfig, *, classes: int, ipc: int) -> None:
        self.config, self.classes, self.ipc = config, classes, ipc
        self._expander, self._schedule = expander, expander.schedule
        self._seed, self._latent_CHW = expander.config.seed, expander.latent_CHW
        self._device = torch.device(expander.spec.device)
        if self._schedule.evals < 2:
            raise ValueError("method dsco: expected --steps of 2 or more, got 1: no step has noise")

    def groups(self) -> list[range]:
        """Classes made together: the fewest that fill an engine batch."""
        each = -(-self._expander.spec.batch // self.ipc)
        return [
            range(first, min(first + each, self.classes)) for first in range(0, self.classes, each)
        ]

    def make(
        self,
        group: range,
        real: RealImages | None,
        progress: Callable[[float], None] = lambda done: None,
    ) -> OptimisedImages:
        """Make the images of a group of classes; `data_free` needs no `real`.

        `progress` receives the number of classes done, in fractions. Raises ValueError for NaN, a
        call that does not fit into memory, a loss that is not finite, or a class without real
        images.
        """
        schedule, steps = self._schedule, self._schedule.evals - 1
        parts = steps + 2  # per class: the match losses, the steps, the decoding
        matches_KS: list[Sequence[Match]] = []
        for index in group:
            matches_KS.append(self._matches(index, real))
            progress(len(matches_KS) / parts)
        classes_M = np.repeat(np.asarray(group), self.ipc)
        numbers = group.start * self.ipc, group.stop * self.ipc
        samples_KN = torch.arange(*numbers, device=self._device).split(self.ipc)
        state_MCHW = schedule.start_sigma * torch.cat(
            [latin_hypercube(self._seed, samples_N, self._latent_CHW) for samples_N in samples_KN]
        )
        losses: list[list[tuple[float, float]]] = [[] for _ in group]
        for step in range(steps):
            state_MCHW = self._mean(state_MCHW, classes_M, step)
            for row, mean_NCHW in enumerate(state_MCHW.split(self.ipc)):
                noise_NCHW, before_after = optimise_noise(
                    mean_NCHW,
                    self._ancestral_noise(samples_KN[row], step),
                    sigma_up=schedule.sigmas_up[step],
                    scale=schedule.model_scales[step + 1],
                    match=matches_KS[row][step],
                    config=self.config,
                )
                mean_NCHW += schedule.sigmas_up[step] * noise_NCHW
                losses[row].append(before_after)
                progress((len(group) * (step + 1) + row + 1) / parts)
        state_MCHW = self._mean(state_MCHW, classes_M, steps)
        return OptimisedImages(self._decode(state_MCHW, classes_M), losses)

    def _ancestral_noise(self, samples_N: Tensor, step: int, epoch: int = 0) -> Tensor:
        return normal(self._seed, Draw.ANCESTRAL + step, samples_N, epoch, self._latent_CHW)

    def _matches(self, class_index: int, real: RealImages | None) -> Sequence[Match]:
        """Match losses of x after every step but the last."""
        if self.config.data_free:
            return [
                partial(data_free_loss, templates=each, config=self.config)
                for each in self._templates(class_index)
            ]
        if real is None:
            raise ValueError("method dsco: expected real images, or data_free, got neither")
        features = LatentFeatures(
            self._latent_CHW,
            seed=self._seed,
            class_index=class_index,
            groups=self.config.groups,
            device=self._device,
        )
        weight = self.config.feature_weight

        def match(pivots_NF: Tensor, x_NCHW: Tensor) -> Tensor:
            return pivot_loss(features(x_NCHW), pivots_NF, weight)

        return [partial(match, each) for each in self._pivots(features, real(class_index))]

    @torch.no_grad()
    def _pivots(
        self, features: LatentFeatures, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Pivots for every step but the last, fp32 [N, F]; reads the real images once."""
        levels = range(1, self._schedule.evals)
        pivots = [Pivots(self.config.pivot_rows, device=self._device) for _ in levels]
        for pixels_BHWC, numbers_B in batches:
            latents_BCHW = self._expander.encode(pixels_BHWC)
            samples_B = numbers_B.to(self._device)
            for level, kept in zip(levels, pivots, strict=True):
                noise_BCHW = normal(self._seed, Draw.NOISED, samples_B, level, self._latent_CHW)
                noised_BCHW = latents_BCHW + self._schedule.sigmas[level] * noise_BCHW
                kept.add(features(noised_BCHW * self._schedule.model_scales[level]))
        return [kept.means(self.ipc) for kept in pivots]

    @torch.no_grad()
    def _templates(self, class_index: int) -> list[ChannelStatistics]:
        """Statistics of x after every step but the last, from plainly sampled images."""
        count = self.config.templates
        samples_M = torch.arange(count, device=self._device) + class_index * count
        classes_M = np.full(count, class_index)
        state_MCHW = normal(self._seed, Draw.START, samples_M, 0, self._latent_CHW)
        state_MCHW *= self._schedule.start_sigma
        statistics = []
        for step in range(self._schedule.evals - 1):
            # Epoch 1: the optimisation starts from epoch 0's noise.
            noise_MCHW = self._ancestral_noise(samples_M, step, epoch=1)
            state_MCHW = self._mean(state_MCHW, classes_M, step)
            state_MCHW += self._schedule.sigmas_up[step] * noise_MCHW
            x_MCHW = state_MCHW * self._schedule.model_scales[step + 1]
            statistics.append(channel_statistics(x_MCHW))
        return statistics

    @torch.no_grad()
    def _mean(self, state_MCHW: Tensor, classes_M: np.ndarray, step: int) -> Tensor:
        """The states after evaluation `step`, before its noise is added: fp32 [M, C, h, w].

        `classes_M` are the images' classes, int64.
        """
        expander, schedule = self._expander, self._schedule
        timestep_1 = torch.tensor(
            [schedule.timesteps[step]], device=self._device, dtype=torch.float32
        )
        slope = schedule.sigmas_down[step] - schedule.sigmas[step]

        def call(batch: DeviceBatch) -> Tensor:
            state_BCHW = state_MCHW[batch.samples_B]
            x_BCHW = state_BCHW * schedule.model_scales[step]
            conditions = expander.prompt_bank.of(batch.plan.classes_G, batch.classes_G)
            eps_BCHW = expander.backend.denoise(x_BCHW, timestep_1, *conditions)
            return state_BCHW + eps_BCHW * slope

        every = np.arange(len(classes_M))
        return expander.in_batches(call, every, classes_M)

    @torch.no_grad()
    def _decode(self, latents_MCHW: Tensor, classes_M: np.ndarray) -> Tensor:
        """Decode the last states to images: fp32 [M, 3, H, W] in [-1, 1]."""
        expander, every = self._expander, np.arange(len(classes_M))

        def call(batch: DeviceBatch) -> Tensor:
            return expander.backend.decode(latents_MCHW[batch.samples_B])

        images_MCHW = expander.in_batches(call, every, classes_M)
        expander.require_numbers(images_MCHW)
        return images_MCHW


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
