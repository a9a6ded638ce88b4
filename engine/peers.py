"""Processes that share one piece of work: the engine's interface to them, and how work is dealt.

The engine knows no process groups: `train` passes one in. Results are the same, bit for bit, at any
number of ranks, because the calls of a network keep their composition: whole batches are dealt,
never parts of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

Value = TypeVar("Value")


class Peers(Protocol):
    """The ranks 0 to size - 1. All of them make the same calls, in the same order."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def all_gather(self, value: Value) -> list[Value]:
        """The plain values of all ranks, in the order of the ranks."""
        ...

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank; their number may differ, and be 0."""
        ...


@dataclass(frozen=True)
class Alone:
    """A process without peers."""

    rank: int = 0
    size: int = 1

    def all_gather(self, value: Value) -> list[Value]:
        return [value]

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        return rows


ALONE = Alone()


def share_of(order: np.ndarray, batch: int, peers: Peers) -> np.ndarray:
    """This rank's part of `order`: whole batches of it, dealt in turn.

    Split into batches again, it gives batches of the whole order; only its last can be short.
    """
    starts = range(peers.rank * batch, len(order), peers.size * batch)
    return np.concatenate([order[:0], *(order[first : first + batch] for first in starts)])
