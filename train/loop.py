"""Train students on rendered images: all seeds in lockstep, from one stream of pools.

    for epoch, for pool of samples:   render → views → targets        (once, for all students)
        for each student:             its own order of the pool, batches, AdamW steps on
                                      KL(targets || softmax(student / T)), batchmean, no T²

Rendering is the expensive half; every student draws on the same rendering. On the CPU each student
computes in one thread, as many students at a time as there are cores, in turns with rendering: so a
student's bits depend neither on the number of cores nor on the seeds that are trained beside it,
and no two thread pools fight for a core (OpenMP waits in a spin: eight times slower, measured).

Legend: P samples of a pool, K classes, H W image size.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.backends import resolve_device
from ..engine.images import ImageSet
from ..engine.soft_labels import SoftTargets
from ..engine.workers import single_threaded_workers
from .checkpoint import CheckpointError, read_tensors, require_same, write_tensors
from .config import StudentConfig
from .evaluation import accuracies
from .labels import Labels
from .methods import ImageSource
from .record import Report
from .student import Student
from .views import describe_views, learning_rate, make_views, pools

SCHEMA = "patchbloom.student/1"
CHECKPOINT_S = 600.0
"""Between two checkpoints, if an epoch is no longer than that: ten epochs of a thousand classes at
ipc 50 take a day."""
POOLS_TOGETHER = 4
"""Pools that are rendered before the students get them: three students on two cores then have
twelve calls to share, not three, of which the last would leave a core idle."""


@dataclass(frozen=True)
class StudentResult:
    """A student after its last epoch."""

    seed: int
    accuracy: float
    """Top-1 on the whole validation split, in percent (0-100)."""
    losses: tuple[float, ...]
    """Mean KL divergence of each epoch, in nats."""
    path: Path
    """Its weights: safetensors."""


def train_students(
    source: ImageSource,
    labels: Labels,
    config: StudentConfig,
    *,
    seeds: Sequence[int],
    val_set: ImageSet,
    folder: Path,
    report: Report,
    name: str = "student",
) -> list[StudentResult]:
    """Train one student per seed; `folder` gets NAME-seedS.safetensors for each.

    While it runs there is NAME.checkpoint.safetensors, from which a killed training goes on with
    the same result (bitwise on the CPU). Raises CheckpointError when that was begun with another
    config, ValueError for a loss that is not finite or a validation set of other classes.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected one or more different seeds, got {list(seeds)}")
    if tuple(val_set.class_ids) != tuple(source.class_ids):
        raise ValueError(
            f"validation: expected the coreset's {len(source.class_ids)} classes "
            f"({', '.join(source.class_ids[:3])}, …), got {len(val_set.class_ids)} "
            f"({', '.join(val_set.class_ids[:3])}, …) in {val_set.root}"
        )
    paths = [folder / f"{name}-seed{seed}.safetensors" for seed in seeds]
    identity = _identity(source, labels, config, seeds)
    if all(path.is_file() for path in paths):
        return [_finished(path, identity) for path in paths]
    checkpoint = folder / f"{name}.checkpoint.safetensors"
    training = _Training(source, labels, config, seeds, checkpoint, identity)
    training.run(name, report)
    networks = [student.network for student in training.students]
    size_px, device = config.size_px, training.device
    scores = accuracies(networks, val_set, size_px=size_px, device=device)
    for student, path, accuracy in zip(training.students, paths, scores, strict=True):
        metadata = {
            "schema": SCHEMA,
            "config": identity,
            "seed": student.seed,
            "class_ids": source.class_ids,
            "accuracy": accuracy,
            "losses": student.losses,
        }
        write_tensors(path, student.network.state_dict(), metadata)
    checkpoint.unlink(missing_ok=True)
    return [_finished(path, identity) for path in paths]


def _finished(path: Path, identity: dict[str, Any]) -> StudentResult:
    """The result in a student's file; CheckpointError when it was trained with another config."""
    _, metadata = read_tensors(path)
    require_same(path, metadata.get("config", {}), identity)
    return StudentResult(metadata["seed"], metadata["accuracy"], tuple(metadata["losses"]), path)


@dataclass(frozen=True)
class _Pool:
    """A pool as all students get it."""

    epoch: int
    begins_epoch: bool
    ends_epoch: bool
    views_PCHW: Tensor
    targets_P: SoftTargets


class _Training:
    """All students of one method, and the epoch they have reached."""

    def __init__(
        self,
        source: ImageSource,
        labels: Labels,
        config: StudentConfig,
        seeds: Sequence[int],
        checkpoint: Path,
        identity: dict[str, Any],
    ) -> None:
        self.source, self.labels, self.config = source, labels, config
        self.checkpoint, self.identity = checkpoint, identity
        self.device = torch.device(resolve_device(config.device))
        classes = len(source.class_ids)
        self.students = [Student(seed, config, classes, self.device) for seed in seeds]
        self.epoch = 0
        if checkpoint.is_file():
            self._restore()

    def run(self, name: str, report: Report) -> None:
        """Train from the epoch reached to the last, writing checkpoints."""
        epoch_s = CHECKPOINT_S  # until one is measured: the first session may not see a second
        with single_threaded_workers(self._workers(), "student") as workers:
            while self.epoch < self.config.epochs:
                first, began = self.epoch, time.monotonic()
                until = next_checkpoint(self.config, first, epoch_s)
                for epoch in self._train(range(first, until), workers):
                    self._tell(epoch, name, report)
                self.epoch = until
                self._save()
                epoch_s = (time.monotonic() - began) / (until - first)

    def _workers(self) -> int:
        """Students that compute at a time."""
        if self.device.type != "cpu" or self.students[0].draws:
            return 1
        return min(torch.get_num_threads(), len(self.students))

    def _train(self, epochs: range, workers: ThreadPoolExecutor) -> Iterator[int]:
        """Train all students for these epochs; yield each epoch when it is done."""
        rendered = self._rendered(epochs)
        while together := list(islice(rendered, POOLS_TOGETHER)):
            for pool, calls in zip(together, self._hand_out(together, workers), strict=True):
                for student, call in zip(self.students, calls, strict=True):
                    if pool.begins_epoch:
                        student.losses.append(0.0)
                    student.losses[-1] += call.result() / self.source.samples
                if pool.ends_epoch:
                    yield pool.epoch

    def _rendered(self, epochs: range) -> Iterator[_Pool]:
        """The epochs' pools in order, each rendered and labelled when it is asked for."""
        for epoch in epochs:
            samples_of_pools = pools(self.config, self.source.samples, epoch)
            last = len(samples_of_pools) - 1
            for number, samples_P in enumerate(samples_of_pools):
                images_PCHW = self.source.render(samples_P, epoch).to(self.device)
                views_PCHW = make_views(images_PCHW, samples_P, epoch, self.config)
                targets_P = self.labels.targets(samples_P, epoch, views_PCHW)
                yield _Pool(epoch, number == 0, number == last, views_PCHW, targets_P)

    def _hand_out(
        self, together: Sequence[_Pool], workers: ThreadPoolExecutor
    ) -> list[list[Future[float]]]:
        """A call per pool and student.

        Students take pools in order: calls start first in, first out, and a student's call waits
        for its call before.
        """
        calls: list[list[Future[float]]] = []
        before: Sequence[Future[float] | None] = [None] * len(self.students)
        for pool in together:
            rate = learning_rate(self.config, pool.epoch)
            given = (pool.views_PCHW, pool.targets_P, rate)
            calls.append(
                [
                    workers.submit(student.train_pool, *given, previous)
                    for student, previous in zip(self.students, before, strict=True)
                ]
            )
            before = calls[-1]
        return calls

    def _tell(self, epoch: int, name: str, report: Report) -> None:
        loss = sum(student.losses[-1] for student in self.students) / len(self.students)
        if not math.isfinite(loss):
            raise ValueError(
                f"the students' loss is {loss} in epoch {epoch}: lower the learning rate "
                f"({self.config.learning_rate})"
            )
        report.scalar(f"{name}/loss", epoch, loss)
        report.progress(name, epoch + 1, self.config.epochs, "epochs", f"loss {loss:.3g}")

    def _save(self) -> None:
        self.labels.flush()
        tensors: dict[str, Tensor] = {}
        for student in self.students:
            tensors |= student.state()
        losses = [student.losses for student in self.students]
        metadata = {"config": self.identity, "epoch": self.epoch, "losses": losses}
        write_tensors(self.checkpoint, tensors, metadata)

    def _restore(self) -> None:
        tensors, metadata = read_tensors(self.checkpoint)
        if "config" not in metadata:
            raise CheckpointError(f"{self.checkpoint} is no checkpoint of ours: remove it")
        require_same(self.checkpoint, metadata["config"], self.identity)
        for student, losses in zip(self.students, metadata["losses"], strict=True):
            student.restore(tensors)
            student.losses = losses
        self.epoch = metadata["epoch"]


def next_checkpoint(config: StudentConfig, epoch: int, epoch_s: float) -> int:
    """The epoch before which the next checkpoint is written, when an epoch takes `epoch_s`.

    At the next multiple of `checkpoint_every`, or as much sooner as CHECKPOINT_S asks for.
    """
    every = config.checkpoint_every
    soon = max(1, int(CHECKPOINT_S / max(epoch_s, 1e-9)))
    return min(epoch + soon, (epoch // every + 1) * every, config.epochs)


def _identity(
    source: ImageSource, labels: Labels, config: StudentConfig, seeds: Sequence[int]
) -> dict[str, Any]:
    """All that decides the students, but the pixels."""
    unimportant = ("device", "checkpoint_every")
    settings = {key: value for key, value in asdict(config).items() if key not in unimportant}
    return {
        **settings,
        "seeds": list(seeds),
        "source": source.describe(),
        "samples": source.samples,
        "classes": hashlib.sha256("\n".join(source.class_ids).encode()).hexdigest(),
        "labels": labels.describe(),
        "views": describe_views(config),
    }
