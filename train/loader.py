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
import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..engine.coreset.coreset import Coreset, open_coreset
from ..engine.coreset.hub import fetched
from ..engine.errors import CoresetError
from ..engine.expand.backends import resolve_device
from ..engine.labels.codecs import decode_topk
from ..export.durable import differences
from ..kernels.noise import Draw, uniform
from .config import StudentConfig, pool_size
from .coreset_options import LoaderOptions, check_names
from .labels.hard import HardLabels
from .labels.targets import Labels, OnlineLabels
from .methods.source import ImageSource
from .students.from_manifest import (
    default_views,
    fitting_labels,
    load_recorded_teacher,
    open_recorded_source,
    require_soft_labels,
)
from .students.ring import Ring
from .students.slots import Pool, PoolSlot, fill_slot, pools_from, pools_per_epoch
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
        teacher: Teacher | nn.Module | str | None = None,
        views: StudentConfig | None = None,
        **options: Any,
    ) -> None:
        """`options`: the fields of coreset_options.LoaderOptions; `batch` is required.

        teacher: computes labels in place of the stored ones; a Teacher, a module for images as they
        come, a file, or torchvision:NAME. views: crops, flips, CutMix, pool and temperature, for a
        coreset without stored labels. Default: those in its manifest, or the recipe's.

        Raises ValueError or OSError, one clear line, for an option that does not exist or fit, a
        coreset without labels or without a description of their views, a model with other weights,
        or a machine that lacks what was requested.
        """
        known = [field.name for field in fields(LoaderOptions)]
        check_names(options, [*known, "teacher", "views"], "ExpandedLoader: option")
        if "batch" not in options:
            raise ValueError("ExpandedLoader needs batch, the images per step")
        self.options = LoaderOptions(**options)
        if not isinstance(coreset, Coreset):
            coreset = open_coreset(fetched(Path(coreset).expanduser()))
        config = _views(coreset, views, self.options, taught=teacher is not None)
        self.temperature = self.options.temperature or config.temperature
        config = replace(config, temperature=self.temperature)
        self.class_ids = coreset.class_ids
        labelled = config.epochs if teacher is None and config.targets == "soft" else None
        self.epochs = _epochs(self.options.epochs, labelled)
        with ExitStack() as opened:
            self._source = opened.enter_context(
                open_recorded_source(coreset, self.options, self.options.backend, config)
            )
            self._labels = _labels(coreset, self._source, config, self.options, teacher)
            if not len(self):
                raise ValueError(
                    f"batch {self.options.batch} with drop_last: expected at most "
                    f"{self._source.samples}, the images of an epoch"
                )
            self._opened = opened.pop_all()
        self._closed = False
        _OPEN.add(self)
        self.device = torch.device(resolve_device(self.options.device))
        self._coreset, self._config = coreset, replace(config, epochs=self.epochs or sys.maxsize)
        self._next = self._position = (0, 0)
        self._stream: Generator[tuple[Pool, PoolSlot]] | None = None
        self._running = 0
        """The number of the latest iteration."""
        self._upcoming = 0
        """Number of the pool that the stream yields next."""

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self._source.samples, self.options.batch)
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
                if number != self._running:
                    raise ValueError(
                        "the loader was closed or began another iteration before this one ended: "
                        "make a loader for each"
                    )
        finally:
            if not ended and number == self._running:
                self._stop()

    def _require(self, epoch: int) -> None:
        if not 0 <= epoch < self._config.epochs:
            known = "0 or more" if self.epochs is None else f"0 to {self.epochs - 1}"
            raise ValueError(
                f"epoch {epoch}: expected {known}: set_epoch chooses one, more need labels of more "
                "epochs or a teacher"
            )

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches from number `done` on."""
        parts: list[tuple[Tensor, ...]] = []
        missing = self.options.batch
        each = pools_per_epoch(self._config, self._source.samples)
        first, skipped = divmod(done * self.options.batch, pool_size(self._config))
        for index in range(epoch * each + first, (epoch + 1) * each):
            pool, slot = self._pool(index)
            rank_P = uniform(self.options.seed, Draw.ORDER, pool.samples_P, epoch, 3)[:, 2]
            rows_P = torch.argsort(rank_P, stable=True)[skipped:]
            skipped = 0
            while len(rows_P):
                parts.append(self._rows(pool, slot, rows_P[:missing]))
                missing, rows_P = missing - len(parts[-1][0]), rows_P[missing:]
                if not missing:
                    yield tuple(map(torch.cat, zip(*parts, strict=True)))
                    parts, missing = [], self.options.batch
        if parts and not self.options.drop_last:
            yield tuple(map(torch.cat, zip(*parts, strict=True)))

    def _pool(self, index: int) -> tuple[Pool, PoolSlot]:
        """A filled pool, from the running thread if it comes next in it."""
        if self._stream is None or self._upcoming != index:
            self._stop()
            made_of = (self._source, self._labels, self._config)
            self._stream = _ahead(*made_of, index, self.options.ahead, self.device)
        self._upcoming = index + 1
        return next(self._stream)

    def _rows(self, pool: Pool, slot: PoolSlot, rows_B: Tensor) -> tuple[Tensor, ...]:
        """Copies of some rows, as the slot will be filled again: (images, labels[, classes])."""
        views_BCHW, targets_B = slot.rows(rows_B.to(self.device))
        if targets_B.classes is not None:
            labels_BK = decode_topk(targets_B.labels, targets_B.classes, len(self.class_ids))
        else:
            labels_BK = targets_B.labels.float()
            if self.options.labels == "probabilities":
                labels_BK = (labels_BK / self.temperature).softmax(1)
        if not self.options.class_indices:
            return views_BCHW.float(), labels_BK
        classes_B = self._source.labels_N[pool.samples_P[rows_B]]
        return views_BCHW.float(), labels_BK, classes_B.to(self.device)

    def _stop(self) -> None:
        """End the thread, and wait for it."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

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


def _views(
    coreset: Coreset, given: StudentConfig | None, options: LoaderOptions, *, taught: bool
) -> StudentConfig:
    """The views, with the targets asked for.

    Raises CoresetError without stored labels where nothing else labels, ValueError for views of
    another size than the images.
    """
    hard, size_px = options.targets == "hard", coreset.settings["image_size_px"]
    if hard and taught:
        raise ValueError("targets 'hard' need no teacher: give one of the two")
    if not hard and not taught:
        require_soft_labels(coreset)
    views = given or default_views(coreset, device=options.device)
    if views.size_px != size_px:
        raise ValueError(
            f"views of {views.size_px} px: expected {size_px}, the size of the images of "
            f"{coreset.folder}: give views with size_px={size_px}"
        )
    return replace(views, targets="hard", temperature=1.0) if hard else views


def _epochs(requested: int | None, labelled: int | None) -> int | None:
    """Number of epochs; `labelled` is None where a teacher or the classes label any number."""
    if requested is not None and labelled is not None and requested > labelled:
        raise ValueError(f"epochs {requested}: expected {labelled} at most, which have labels")
    return requested or labelled


def _labels(
    coreset: Coreset,
    source: ImageSource,
    config: StudentConfig,
    options: LoaderOptions,
    teacher: Teacher | nn.Module | str | None,
) -> Labels:
    """The teacher's labels, the stored ones, or the classes.

    Raises CoresetError for labels of other images or views or for logits of top-k labels,
    ValueError for a teacher of other classes, and load_teacher's errors for one given by name.
    """
    if config.targets == "hard":
        return HardLabels(source, config)
    if teacher is None:
        labels = fitting_labels(coreset, source, config, options)
        if options.labels == "logits" and not labels.stored.codec.keeps_logits:
            raise CoresetError(
                f"{coreset.folder}: top-k labels keep no logits: give labels='probabilities'"
            )
        return labels
    if not isinstance(teacher, Teacher):
        teacher = load_recorded_teacher(coreset, teacher, options.device)
    if teacher.class_ids != coreset.class_ids:
        raise ValueError(
            f"teacher: expected the coreset's classes in their order ({coreset.class_ids[0]}, …), "
            f"got {len(teacher.class_ids)} ({teacher.class_ids[0]}, …)"
        )
    return OnlineLabels(teacher, config.temperature)


def _ahead(
    source: ImageSource,
    labels: Labels,
    config: StudentConfig,
    first: int,
    ahead: int,
    device: torch.device,
) -> Generator[tuple[Pool, PoolSlot]]:
    """Pools from number `first` on, filled in a thread that is at most `ahead` pools ahead.

    Closing it ends the thread, once the pool in progress is filled. An error is raised here, with
    its own traceback, when its pool is requested.
    """
    slots = [PoolSlot() for _ in range(ahead + 1)]  # + 1: the caller consumes one
    with Ring(
        slots,
        lambda slot, pool: fill_slot(slot, pool, source, labels, config),
        pools_from(config, source.labels_N, first),
        device=device,
    ) as ring:
        while taken := ring.take():
            yield from taken
