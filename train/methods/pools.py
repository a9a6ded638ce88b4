"""A pool of samples, rendered and labelled by all ranks; every rank gets the whole pool.

CutMix takes a sample's partner from the whole pool, so the views need all its images. Ranks share
whole calls of an engine and whole forward passes of the teacher. A call then has the same samples
at any world size, and so the same bits, whatever a library does with a batch. A pool of fewer calls
than ranks leaves some ranks idle.

Legend: P samples of a pool, K classes, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.data.crops import to_unit
from ..run.world import World
from ..teacher.evaluation import FORWARD_BATCH
from ..teacher.teacher import Teacher
from .source import Expansions, RealImages


class SharedImages:
    """A source of which every rank renders a part and gets all images, bit for bit.

    RealImages, each of which is a JPEG to decode, travel as 8-bit pixels; expansions in half
    precision where that is exact.
    """

    def __init__(self, source: Expansions | RealImages, world: World) -> None:
        self.source, self._world = source, world
        self.samples, self.labels_N = source.samples, source.labels_N
        self.class_ids = source.class_ids

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """`source.render`, on every rank: fp32 [P, 3, H, W] in [-1, 1]."""
        source, world = self.source, self._world
        if isinstance(source, RealImages):
            each = torch.arange(len(samples_P)).split(1)  # an image has no neighbours
            return to_unit(_shared(each, lambda at: source.pixels(samples_P[at], epoch), world))
        calls = [torch.from_numpy(at) for at in source.expander.calls(samples_P)]
        made = _shared(calls, lambda at: source.render(samples_P[at], epoch), world, narrows=True)
        return made.float()

    def describe(self) -> dict[str, Any]:
        """As the source describes itself."""
        return self.source.describe()


def answer_pool(teacher: Teacher, views_PCHW: Tensor, world: World) -> Tensor:
    """`teacher.logits(views_PCHW)`, computed by all ranks: fp32 [P, K] on every rank."""
    if world.size == 1:
        return teacher.logits(views_PCHW)
    passes = torch.arange(len(views_PCHW)).split(FORWARD_BATCH[teacher.device.type])

    def answer(at: Tensor) -> Tensor:
        views_BCHW = views_PCHW[at.to(views_PCHW.device)]
        # The memory layout of a slice: a convolution's rounding depends on it.
        return teacher.logits(views_BCHW.contiguous(memory_format=torch.channels_last))

    return _shared(passes, answer, world)


def _shared(
    calls: Sequence[Tensor],
    work: Callable[[Tensor], Tensor],
    world: World,
    *,
    narrows: bool = False,
) -> Tensor:
    """The rows of `work` on positions 0 to P - 1, in this order, on every rank.

    `calls`: positions that `work` takes together; ranks take the calls in turn. `narrows`: the rows
    are fp32, and stay in a smaller type if that holds them.
    """
    dealt = [calls[rank :: world.size] for rank in range(world.size)]
    own = dealt[world.rank]
    made = work(torch.cat(list(own))) if own else torch.empty(0, dtype=torch.float32)
    received = world.all_gather_rows(_narrowed(made, world) if narrows else made)
    positions = torch.cat([at for of_rank in dealt for at in of_rank]).to(received.device)
    rows = torch.empty_like(received)
    rows[positions] = received
    return rows


def _narrowed(rows: Tensor, world: World) -> Tensor:
    """fp32 rows in fp16 or bf16, if one of them holds the rows of all ranks exactly.

    A decoder in half precision makes such rows. Their values decide, not the type that an engine
    declares: a library may compute beyond it.
    """
    exact = [
        dtype
        for dtype in (torch.float16, torch.bfloat16)
        if all(torch.equal(part, part.to(dtype).float()) for part in rows.split(64))
    ]
    of_ranks = world.all_gather(exact)
    common = [dtype for dtype in exact if all(dtype in of_rank for of_rank in of_ranks)]
    return rows.to(common[0]) if common else rows
