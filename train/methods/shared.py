"""A pool of samples, rendered and labelled by all ranks: every rank gets all of it.

CutMix takes a sample's partner from the whole pool, so the views need all images of it. What is
dealt to the ranks are whole calls of an engine, and whole forward passes of the teacher: a call has
the same composition at any world size, and so the same bits, whatever a library does with a batch.
A rank gets nothing of a pool that has fewer calls than there are ranks.

Legend: P samples of a pool, K classes, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..run.world import World
from ..teacher.evaluation import FORWARD_BATCH
from ..teacher.teacher import Teacher
from .source import DealtSource


class SharedImages:
    """A source of which every rank renders a part and gets all: in their order, with their bits."""

    def __init__(self, source: DealtSource, world: World) -> None:
        self.source, self._world = source, world
        self.samples, self.labels_N = source.samples, source.labels_N
        self.class_ids = source.class_ids

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """`source.render`, on every rank: fp32 [P, 3, H, W] in [-1, 1]."""
        calls = self.source.calls(samples_P)
        return _shared(calls, lambda at: self.source.render(samples_P[at], epoch), self._world)

    def describe(self) -> dict[str, Any]:
        """The source's own."""
        return self.source.describe()


def answer_pool(teacher: Teacher, views_PCHW: Tensor, world: World) -> Tensor:
    """`teacher.logits(views_PCHW)`, shared: fp32 [P, K], on every rank."""
    if world.size == 1:
        return teacher.logits(views_PCHW)
    passes = torch.arange(len(views_PCHW)).split(FORWARD_BATCH[teacher.device.type])

    def answer(at: Tensor) -> Tensor:
        views_BCHW = views_PCHW[at.to(views_PCHW.device)]
        # As a slice of them lies; a convolution's rounding follows the layout.
        return teacher.logits(views_BCHW.contiguous(memory_format=torch.channels_last))

    return _shared(passes, answer, world)


def _shared(calls: Sequence[Tensor], work: Callable[[Tensor], Tensor], world: World) -> Tensor:
    """The rows of `work` on positions 0 to P - 1, in this order, on every rank.

    `calls` are the positions that `work` takes together; they are dealt to the ranks in turn.
    """
    dealt = [calls[rank :: world.size] for rank in range(world.size)]
    own = dealt[world.rank]
    received = world.all_gather_rows(work(torch.cat(list(own))) if own else torch.empty(0))
    positions = torch.cat([at for of_rank in dealt for at in of_rank]).to(received.device)
    rows = torch.empty_like(received)
    rows[positions] = received
    return rows
