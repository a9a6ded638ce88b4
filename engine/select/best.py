"""The best patches of every class in a stream, for one process or several.

A row represents a patch: its pixels, uint8 [H, W, 3], or the teacher's features, fp32 [D].

Shapes: K classes, N = per_class patches of each, M rows exchanged between ranks. A box is (top,
left, height, width) in pixels of the upright image.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import chain

import torch

from ..peers import Peers


class BestPatches:
    """Keeps the ``per_class`` patches with the lowest (key, index) of every class in a stream.

    Memory is that of the result, however many patches are offered; their order does not matter.
    """

    def __init__(
        self,
        classes: int,
        per_class: int,
        row: Sequence[int],
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        """`row` is the shape of a patch's row."""
        self.per_class, self.row = per_class, tuple(row)
        shape = (classes, per_class)
        self.rows_KN = torch.zeros((*shape, *row), dtype=dtype)
        self.losses_KN = torch.full(shape, math.nan, dtype=torch.float32)
        self.source_index_KN = torch.full(shape, -1, dtype=torch.int64)
        self.boxes_KN4 = torch.zeros((*shape, 4), dtype=torch.int64)
        # Per class: (-key, -index, slot), so that the heap's first entry is the next to be dropped.
        self._heaps: list[list[tuple[float, int, int]]] = [[] for _ in range(classes)]

    def offer(
        self,
        label: int,
        key: float,
        index: int,
        row: torch.Tensor,
        loss: float,
        box_4: torch.Tensor,
    ) -> None:
        """Keep the patch if it is among the best of its class so far."""
        heap = self._heaps[label]
        rank = (-key, -index)
        if len(heap) < self.per_class:
            slot = len(heap)
            heapq.heappush(heap, (*rank, slot))
        elif rank > heap[0][:2]:
            slot = heap[0][2]
            heapq.heapreplace(heap, (*rank, slot))
        else:
            return
        self.rows_KN[label, slot] = row
        self.losses_KN[label, slot] = loss
        self.source_index_KN[label, slot] = index
        self.boxes_KN4[label, slot] = box_4

    def counts(self) -> list[int]:
        """Patches held, per class."""
        return [len(heap) for heap in self._heaps]

    def held(self) -> list[list[tuple[float, int, int]]]:
        """(key, index, slot) of the patches held, per class, unordered."""
        return [[(-key, -index, slot) for key, index, slot in heap] for heap in self._heaps]

    def sort(self) -> None:
        """Sort every class by (key, index), lowest first; no offer may follow."""
        for label, heap in enumerate(self._heaps):
            heap.sort(reverse=True)
            order = torch.tensor([slot for _, _, slot in heap], dtype=torch.int64)
            for tensor_KN in (
                self.rows_KN,
                self.losses_KN,
                self.source_index_KN,
                self.boxes_KN4,
            ):
                tensor_KN[label, : len(order)] = tensor_KN[label, order]
            heap.clear()


def best_of_all(best: BestPatches, peers: Peers) -> BestPatches:
    """The best patches of all ranks, the same on every rank.

    Ranks exchange keys first, then only the winning rows: one result's worth at any world size.
    """
    if peers.size == 1:
        return best
    winning = _winning(best, peers)
    slots = [label for label, *_ in winning], [slot for *_, slot in winning]
    named = chain.from_iterable(peers.all_gather([entry[:3] for entry in winning]))
    rows_M = peers.all_gather_rows(best.rows_KN[slots])
    losses_M = peers.all_gather_rows(best.losses_KN[slots])
    boxes_M4 = peers.all_gather_rows(best.boxes_KN4[slots])
    merged = BestPatches(len(best.counts()), best.per_class, best.row, best.rows_KN.dtype)
    for row, (label, key, index) in enumerate(named):
        merged.offer(label, key, index, rows_M[row], float(losses_M[row]), boxes_M4[row])
    return merged


def _winning(best: BestPatches, peers: Peers) -> list[tuple[int, float, int, int]]:
    """(label, key, index, slot) of the patches held here that are among the best of all ranks."""
    held_K = best.held()
    keys_of_ranks = peers.all_gather([[entry[:2] for entry in entries] for entries in held_K])
    winning = []
    for label, (entries, of_ranks) in enumerate(
        zip(held_K, zip(*keys_of_ranks, strict=True), strict=True)
    ):
        winners = set(heapq.nsmallest(best.per_class, chain.from_iterable(of_ranks)))
        winning += [(label, *entry) for entry in entries if entry[:2] in winners]
    return winning
