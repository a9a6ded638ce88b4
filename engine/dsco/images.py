"""Images of method dsco: text-to-image sampling with optimised noise.

Up to rounding, the images of a class depend only on the seed, the class, the class's other images
and its real images. So groups of classes, each one engine batch or more, can be made separately and
in any order.

Legend: N images of one class, M images of a group of classes, F features, C h w of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...kernels.noise import Draw, normal
from ..config import DscoConfig
from ..expand.expander import Expander
from .noise_optimisation import (
    ChannelStatistics,
    Match,
    channel_statistics,
    data_free_loss,
    latin_hypercube,
    optimise_noise,
    pivot_loss,
)
from .pivots import LatentFeatures, Pivots
from .stepwise import Stepwise

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
        self.seed, self._stepwise = expander.config.seed, Stepwise(expander)
        self._expander, self._schedule = expander, expander.schedule
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
        steps = self._schedule.evals - 1
        parts = steps + 2  # per class: the match losses, the steps, the decoding
        matches_KS: list[Sequence[Match]] = []
        for index in group:
            matches_KS.append(self._matches(index, real))
            progress(len(matches_KS) / parts)
        classes_M = np.repeat(np.asarray(group), self.ipc)
        samples_KN = [self._samples(index) for index in group]
        state_MCHW = self._schedule.start_sigma * torch.cat(
            [latin_hypercube(self.seed, each, self._stepwise.latent_CHW) for each in samples_KN]
        )
        losses: list[list[tuple[float, float]]] = [[] for _ in group]
        for step in range(steps):
            state_MCHW = self._stepwise.mean(state_MCHW, classes_M, step)
            for row, mean_NCHW in enumerate(state_MCHW.split(self.ipc)):
                noise_NCHW, ended = self._optimise(
                    mean_NCHW, samples_KN[row], step, matches_KS[row][step]
                )
                mean_NCHW += self._schedule.sigmas_up[step] * noise_NCHW
                losses[row].append(ended)
                progress((len(group) * (step + 1) + row + 1) / parts)
        state_MCHW = self._stepwise.mean(state_MCHW, classes_M, self._schedule.evals - 1)
        return OptimisedImages(self._stepwise.decode(state_MCHW, classes_M), losses)

    def _samples(self, class_index: int) -> Tensor:
        """A class's sample numbers, int64 [N]."""
        first = class_index * self.ipc
        return torch.arange(first, first + self.ipc, device=self._stepwise.device)

    def _optimise(
        self, mean_NCHW: Tensor, samples_N: Tensor, step: int, match: Match
    ) -> tuple[Tensor, tuple[float, float]]:
        shape = self._stepwise.latent_CHW
        return optimise_noise(
            mean_NCHW,
            normal(self.seed, Draw.ANCESTRAL + step, samples_N, 0, shape),
            sigma_up=self._schedule.sigmas_up[step],
            scale=self._schedule.model_scales[step + 1],
            match=match,
            config=self.config,
        )

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
            self._stepwise.latent_CHW,
            seed=self.seed,
            class_index=class_index,
            groups=self.config.groups,
            device=self._stepwise.device,
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
        device = self._stepwise.device
        pivots = [Pivots(self.config.pivot_rows, device=device) for _ in levels]
        for pixels_BHWC, numbers_B in batches:
            latents_BCHW = self._expander.encode(pixels_BHWC)
            for level, kept in zip(levels, pivots, strict=True):
                noise_BCHW = normal(
                    *(self.seed, Draw.NOISED, numbers_B.to(device), level),
                    self._stepwise.latent_CHW,
                )
                noised_BCHW = latents_BCHW + self._schedule.sigmas[level] * noise_BCHW
                kept.add(features(noised_BCHW * self._schedule.model_scales[level]))
        return [kept.means(self.ipc) for kept in pivots]

    @torch.no_grad()
    def _templates(self, class_index: int) -> list[ChannelStatistics]:
        """Statistics of x after every step but the last, from plainly sampled images."""
        count, device = self.config.templates, self._stepwise.device
        first, shape = class_index * count, self._stepwise.latent_CHW
        samples_M = torch.arange(first, first + count, device=device)
        classes_M = np.full(count, class_index)
        state_MCHW = normal(self.seed, Draw.START, samples_M, 0, shape)
        state_MCHW *= self._schedule.start_sigma
        statistics = []
        for step in range(self._schedule.evals - 1):
            # Epoch 1: the optimisation starts from epoch 0's noise.
            noise_MCHW = normal(self.seed, Draw.ANCESTRAL + step, samples_M, 1, shape)
            state_MCHW = self._stepwise.mean(state_MCHW, classes_M, step)
            state_MCHW += self._schedule.sigmas_up[step] * noise_MCHW
            x_MCHW = state_MCHW * self._schedule.model_scales[step + 1]
            statistics.append(channel_statistics(x_MCHW))
        return statistics
