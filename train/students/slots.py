"""The pools of a training, in order, and the slots that hold their views and labels.

    source → images → views → labels          one pool, the same for every student

Legend: N samples per epoch, P per pool, B per batch, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ...engine.labels.codecs import SoftTargets
from ..config import StudentConfig, pool_size
from ..labels.targets import Labels
from ..labels.views import pools, render_views
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


def pools_per_epoch(config: StudentConfig, samples: int) -> int:
    """The last pool of an epoch may be smaller than the others."""
    return -(-samples // pool_size(config))


def pools_from(config: StudentConfig, labels_N: Tensor, first: int) -> Iterator[Pool]:
    """All pools of all epochs from number `first` on."""
    each = pools_per_epoch(config, len(labels_N))
    for epoch in range(first // each, config.epochs):
        for number, samples_P in enumerate(pools(config, labels_N, epoch)):
            index = epoch * each + number
            if index >= first:
                yield Pool(index, epoch, number + 1 == each, samples_P)


class PoolSlot:
    """Views and labels of the pool that `fill_slot` put here last."""

    views_PCHW: Tensor
    """Normalised, channels_last."""
    targets_P: SoftTargets

    def rows(self, rows_B: Tensor) -> tuple[Tensor, SoftTargets]:
        """Copies of some views, channels_last, and of their labels."""
        # Rows of NHWC: indexing NCHW would lose channels_last.
        views_BCHW = self.views_PCHW.permute(0, 2, 3, 1)[rows_B].permute(0, 3, 1, 2)
        return views_BCHW, self.targets_P.rows(rows_B)


def fill_slot(
    slot: PoolSlot, pool: Pool, source: ImageSource, labels: Labels, config: StudentConfig
) -> None:
    """Render a pool, make its views, and label them."""
    slot.views_PCHW = render_views(source, pool.samples_P, pool.epoch, config)
    slot.targets_P = labels.targets(pool.samples_P, pool.epoch, slot.views_PCHW)
