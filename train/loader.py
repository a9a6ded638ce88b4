"""A coreset as an iterable of (images, soft labels), which replaces a DataLoader.

    coreset → pools of an epoch → images → views → labels      in a thread, some pools ahead
            → the pool's samples in the loader's order → batches                in the caller

Views match the stored labels: crops, flips and CutMix follow from the coreset's (seed, sample,
epoch). The order of an epoch follows from the loader's seed and never from timing. A batch may span
two pools, so all but an epoch's last are full.

Legend: N samples per epoch, P per pool, B per batch, K classes, H W image size.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..engine.coreset.coreset import Coreset, open_coreset
from ..export.durable import differences
from .config import StudentConfig
from .coreset_options import LoaderOptions
from .labels.views import pools
from .students.from_manifest import view_config
from .students.labelled_pools import LabelledPool, PoolSource, open_pools
from .students.ring import Ring
from .teacher.teacher import Teacher


class ExpandedLoader(AbstractContextManager["ExpandedLoader"]):
    """Batches of fresh images of a coreset, and their soft labels, on the device.

    Yields (images, labels), or (images, labels, classes) with `class_indices`: images fp32
    [B, 3, H, W], with ImageNet's normalisation, channels_last; labels fp32 [B, K]; classes int64
    [B].

    Every iteration is the next epoch, starting from 0, unless `set_epoch` or `load_state_dict`
    chooses another. Only one runs at a time. Leaving it early ends its thread; between epochs the
    thread continues with the next one, until `close`.
    """

    def __init__(
        self,
        coreset: Coreset | str | Path,
        *,
        teacher: Teacher | str | None = None,
        views: StudentConfig | None = None,
        **options: Any,
    ) -> None:
        """`options`: the fields of coreset_options.LoaderOptions; `batch` is required.

        teacher: computes labels in place of the stored ones; a Teacher, a file, or
        torchvision:NAME. views: crops, flips, CutMix, pool and temperature, for a coreset without
        stored labels; default: those in its manifest.

        Raises ValueError or OSError, one clear line, for a coreset without labels or without a
        description of their views, a model with other weights, or a machine that lacks what was
        requested.
        """
        self.options = LoaderOptions(**options)
        if not isinstance(coreset, Coreset):
            coreset = open_coreset(Path(coreset).expanduser())
        self._coreset = coreset
        self._config = _config(self._coreset, self.options, views)
        self.temperature = self._config.temperature
        self.class_ids = self._coreset.class_ids
        self.epochs = self._epochs(teacher is not None)
        with ExitStack() as opened:
            self._source = open_pools(coreset, self._config, self.options, teacher, opened)
            self._opened = opened.pop_all()
        self._closed = False
        _OPEN.add(self)
        self.device = self._source.device
        self._labels_N = self._source.source.labels_N
        self._next = self._position = (0, 0)
        self._stream: Generator[LabelledPool] | None = None
        self._running = 0
        """The number of the latest iteration."""
        self._upcoming: tuple[int, int] | None = None
        """(epoch, pool) that the stream yields next."""

    def _epochs(self, has_teacher: bool) -> int | None:
        wanted = self.options.epochs
        if has_teacher:
            return wanted
        labelled = self._config.epochs
        if wanted is not None and wanted > labelled:
            raise ValueError(f"epochs {wanted}: expected {labelled} at most, which have labels")
        return wanted or labelled

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self._labels_N), self.options.batch)
        return whole + (rest > 0 and not self.options.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration: from its start, or from where a state left it.

        Raises ValueError when there is no such epoch.
        """
        self._require(epoch)
        if epoch != self._next[0]:
            self._next = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position after the latest batch; plain JSON."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration yield the rest of the epoch in which the state was taken.

        Raises ValueError for the state of another loader.
        """
        for key, was, own in differences(state["of"], self._identity()):
            raise ValueError(
                f"state of a loader with {key} = {was}, this one has {own}: "
                "give the same options, or begin at an epoch with set_epoch"
            )
        self._next = self._position = (state["epoch"], state["batch"])

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which samples a batch holds."""
        return {
            "coreset": self._coreset.content_sha256,
            "batch": self.options.batch,
            "drop_last": self.options.drop_last,
            "seed": self.options.seed,
        }

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Raises ValueError when the loader is closed, or has no such epoch.

        An iterator takes its epoch when its first batch is requested: some trainers create several
        and use one.
        """
        if self._closed:
            raise ValueError("the loader is closed: make a new one")
        epoch, done = self._next
        self._require(epoch)
        self._position, self._next = (epoch, done), (epoch + 1, 0)
        self._running = number = self._running + 1
        ended = False
        try:
            for batch in self._batches(epoch, done):
                done += 1
                ended = done == len(self)
                self._position = (epoch + 1, 0) if ended else (epoch, done)
                if ended and epoch + 1 == self.epochs:
                    self._stop()
                yield batch
                if ended:
                    return
                self._require_running(number)
        finally:
            if not ended and number == self._running:
                self._stop()

    def _require(self, epoch: int) -> None:
        if not 0 <= epoch < (math.inf if self.epochs is None else self.epochs):
            known = "0 or more" if self.epochs is None else f"0 to {self.epochs - 1}"
            raise ValueError(
                f"epoch {epoch}: expected {known}: set_epoch chooses one, more need labels of more "
                "epochs or a teacher"
            )

    def _require_running(self, number: int) -> None:
        if number != self._running:
            raise ValueError(
                "the loader was closed or began another iteration before this one ended: make a "
                "loader for each"
            )

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches from number `done` on."""
        parts: list[tuple[Tensor, ...]] = []
        missing = self.options.batch
        for pool, at in self._pools(epoch, done * self.options.batch):
            while at < len(pool.rows_P):
                rows_B = pool.rows_P[at : at + missing]
                parts.append(pool.batch(rows_B))
                missing, at = missing - len(rows_B), at + len(rows_B)
                if not missing:
                    yield self._joined(parts)
                    parts, missing = [], self.options.batch
        if parts and not self.options.drop_last:
            yield self._joined(parts)

    def _joined(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        tensors = (
            parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        )
        return tuple(tensors) if self.options.class_indices else tuple(tensors[:2])

    def _pools(self, epoch: int, skipped: int) -> Iterator[tuple[LabelledPool, int]]:
        """The epoch's pools after `skipped` samples, and how many rows of each pool to skip."""
        sizes = [len(samples_P) for samples_P in pools(self._config, self._labels_N, epoch)]
        first = 0
        while first < len(sizes) and skipped >= sizes[first]:
            skipped -= sizes[first]
            first += 1
        if first == len(sizes):
            return
        stream = self._stream_from(epoch, first)
        for index in range(first, len(sizes)):
            last = index + 1 == len(sizes)
            self._upcoming = (epoch + 1, 0) if last else (epoch, index + 1)
            yield next(stream), skipped if index == first else 0

    def _stream_from(self, epoch: int, first: int) -> Generator[LabelledPool]:
        """All pools from there on, out of the running thread if they come next in it."""
        if self._stream is None or self._upcoming != (epoch, first):
            self._stop()
            items = _items(self._config, self._labels_N, epoch, first, self.epochs)
            self._stream = _ahead(self._source, items, self.options.ahead)
        return self._stream

    def _stop(self) -> None:
        """End the thread, and wait for it."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._upcoming = None

    def close(self) -> None:
        """End the thread and free the model; safe to call twice."""
        self._closed = True
        self._running += 1
        self._stop()
        self._opened.close()

    def __exit__(self, *_: object) -> None:
        self.close()


_OPEN: WeakSet[ExpandedLoader] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that still computes while the interpreter shuts down would crash it."""
    for loader in list(_OPEN):
        loader.close()


def _config(coreset: Coreset, options: LoaderOptions, views: StudentConfig | None) -> StudentConfig:
    config = views or view_config(coreset, device=options.device)
    return replace(config, temperature=options.temperature or config.temperature)


def _items(
    config: StudentConfig, labels_N: Tensor, epoch: int, first: int, epochs: int | None
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, samples [P]) of every pool from number `first` of `epoch` on, to the last epoch."""
    while epochs is None or epoch < epochs:
        for samples_P in pools(config, labels_N, epoch)[first:]:
            yield epoch, samples_P
        epoch, first = epoch + 1, 0


@dataclass
class _Slot:
    """Where the ring's producer leaves a pool."""

    pool: LabelledPool | None = None


def _ahead(
    source: PoolSource, items: Iterable[tuple[int, Tensor]], ahead: int
) -> Generator[LabelledPool]:
    """The items' pools, in order, made in a thread that is at most `ahead` pools ahead.

    Closing it ends the thread, once the pool in progress is filled. An error is raised here, with
    its own traceback, when its item is requested.
    """

    def fill(slot: _Slot, item: tuple[int, Tensor]) -> None:
        slot.pool = source.fill(item)

    slots = [_Slot() for _ in range(ahead + 1)]  # + 1: the caller consumes one
    with Ring(slots, fill, items, device=source.device) as ring:
        while taken := ring.take():
            for _, slot in taken:
                if slot.pool is not None:
                    yield slot.pool
