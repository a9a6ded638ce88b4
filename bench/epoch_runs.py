"""What bench_epoch.py times: images rendered, students trained, and what stands in for the rest.

Every run says what an epoch of it took on average: from its first image to the last of its steps,
divided by its epochs. A run that is overlapped thus has one pool that nobody learns from yet, and
one after which nothing is rendered: at most the student's share of an epoch, once per run.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import timed
from patchbloom.engine.labels.codecs import SoftTargets
from patchbloom.train.config import StudentConfig
from patchbloom.train.methods.source import ImageSource
from patchbloom.train.run.checkpoint import read_tensors
from patchbloom.train.run.progress import Report
from patchbloom.train.students.loop import train_students
from patchbloom.train.students.slots import PoolSlot, fill_slot, pools_from
from torch import Tensor


@dataclass(frozen=True)
class EpochTime:
    """An epoch of one run, on average, in seconds."""

    seconds: float
    waited_s: float = 0.0
    """Of them, those in which the student had nothing to learn from."""


class Part:
    """`count` samples of a source, evenly spread: an epoch of it is shorter."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self._source, self.samples, self.class_ids = source, count, source.class_ids
        self._chosen = torch.linspace(0, source.samples - 1, count).long()
        self.labels_N = source.labels_N[self._chosen]

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return self._source.render(self._chosen[samples_P], epoch)

    def describe(self) -> dict[str, Any]:
        return self._source.describe()


class Kept:
    """A source that has all its images of one epoch: what is left is the student."""

    def __init__(self, source: ImageSource, epoch: int = 0) -> None:
        self.samples, self.labels_N, self.class_ids = (
            source.samples,
            source.labels_N,
            source.class_ids,
        )
        self._images_NCHW = source.render(torch.arange(source.samples), epoch)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return self._images_NCHW[samples_P.to(self._images_NCHW.device)]

    def describe(self) -> dict[str, Any]:
        return {"method": "kept"}


class Given:
    """Labels as if read from a coreset: the same for every epoch."""

    def __init__(self, samples: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._logits_NK = torch.randn(samples, classes, generator=generator).half()

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        return SoftTargets(self._logits_NK[samples_P].to(views_PCHW.device))

    def describe(self) -> dict[str, Any]:
        return {"codec": "dense"}


class Clock(Report):
    """A Report that keeps what the loop says of its epochs.

    Epochs that were taken together are told as their mean, and pools that were rendered together
    as if the first had taken all of it: only their sum is a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, list[float]] = {"seconds": [], "waited_s": []}

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None: ...

    def scalar(self, tag: str, step: int, value: float) -> None:
        name = tag.rpartition("/")[2]
        if name in self._told:
            self._told[name].append(value)

    def say(self, line: str) -> None: ...

    def epoch_time(self) -> EpochTime:
        """The mean of all epochs."""
        return EpochTime(*(sum(values) / len(values) for values in self._told.values()))


def render_epochs(source: ImageSource, labels: Given, config: StudentConfig) -> EpochTime:
    """Render the views and labels of all epochs into one slot; nobody learns."""
    slot = PoolSlot()

    def fill() -> None:
        for pool in pools_from(config, source.labels_N, 0):
            fill_slot(slot, pool, source, labels, config)

    seconds, _ = timed(fill)
    return EpochTime(seconds / config.epochs)


def train_student(
    source: ImageSource, labels: Given, config: StudentConfig
) -> tuple[EpochTime, dict[str, Tensor]]:
    """What the loop says of its epochs, and the student's weights."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        (result,) = train_students(
            source, labels, config, seeds=[0], val_set=None, folder=Path(folder), report=clock
        )
        return clock.epoch_time(), read_tensors(result.path)[0]
