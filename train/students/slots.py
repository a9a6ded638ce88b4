"""Pools on their way to the students: their order, and the slots that hold their views.

    source → images → views → labels          one pool, the same for every student

Legend: N samples per epoch, P per pool, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.labels.codecs import SoftTargets
from ..config import StudentConfig, pool_size
from ..labels.targets import Labels
from ..labels.views import make_views, pools, view_dtype
from ..methods.source import ImageSource


@dataclass(frozen=True)
class Pool:
    """Samples that students learn from together."""

    index: int
    """Number of the pool, counted from the first of epoch 0."""
    epoch: int
    ends_epoch: bool
    samples_P: Tensor
    """int64, on the CPU."""


def pools_from(config: StudentConfig, labels_N: Tensor, first: int) -> Iterator[Pool]:
    """All pools of all epochs from number `first` on."""
    each = -(-len(labels_N) // pool_size(config))
    for epoch in range(first // each, config.epochs):
        for number, samples_P in enumerate(pools(config, labels_N, epoch)):
            index = epoch * each + number
            if index >= first:
                yield Pool(index, epoch, number + 1 == each, samples_P)


class PoolSlot:
    """Buffers for a pool's views and labels, allocated once; those for labels at first use."""

    def __init__(self, config: StudentConfig, samples: int, device: torch.device) -> None:
        self._capacity = min(pool_size(config), samples)
        shape = (self._capacity, 3, config.size_px, config.size_px)
        self._views = torch.empty(
            shape,
            dtype=view_dtype(config),
            device=device,
            memory_format=torch.channels_last,
        )
        self._labels: tuple[Tensor, ...] = ()
        self._count = 0

    @property
    def views_PCHW(self) -> Tensor:
        """Normalised, channels_last."""
        return self._views[: self._count]

    @property
    def targets_P(self) -> SoftTargets:
        """The labels of the views."""
        return SoftTargets(*(each[: self._count] for each in self._labels))

    def store(self, views_PCHW: Tensor, targets_P: SoftTargets) -> None:
        """Copy a pool in."""
        self._count = len(views_PCHW)
        self.views_PCHW.copy_(views_PCHW)
        parts = [each for each in (targets_P.labels, targets_P.classes) if each is not None]
        if not self._labels:
            self._labels = tuple(
                torch.empty(
                    (self._capacity, *part.shape[1:]), dtype=part.dtype, device=self._views.device
                )
                for part in parts
            )
        for buffer, part in zip(self._labels, parts, strict=True):
            buffer[: self._count].copy_(part)


def fill_slot(
    slot: PoolSlot, pool: Pool, source: ImageSource, labels: Labels, config: StudentConfig
) -> None:
    """Render a pool, make its views, and label them."""
    images_PCHW = source.render(pool.samples_P, pool.epoch)
    views_PCHW = make_views(images_PCHW, pool.samples_P, pool.epoch, config)
    slot.store(views_PCHW, labels.targets(pool.samples_P, pool.epoch, views_PCHW))
