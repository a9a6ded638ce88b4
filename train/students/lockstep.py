"""All students of a method in lockstep: pools from the ring, checkpoints, and the log.

    producer:   for every pool: render → views → labels → a slot of the ring
    consumer:   for every filled slot, for each student: its own order of the pool, batches,
                AdamW steps on KL(labels || softmax(student / T)), batchmean, no T²

Rendering is the expensive half; all students share it, and learn from one pool while the next is
rendered (ring.py). On a GPU students take turns; on the CPU each computes in one thread, as many at
a time as there are cores. A student's bits therefore depend neither on the number of cores, nor on
the seeds trained beside it, nor on the overlap.

A checkpoint stores each student's progress, to the batch; SIGINT and SIGTERM write one at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel

from ...engine.data.threads import single_threaded_workers
from ...engine.expand.backends import resolve_device
from ...engine.interrupts import signal_came, signals_deferred, stop
from ...export.documents import Count, Finite, check_document
from ..config import StudentConfig
from ..labels.targets import Labels
from ..methods.source import ImageSource
from ..run.checkpoint import (
    CheckpointError,
    Checkpoints,
    Tensors,
    read_tensors,
    require_same,
    restoring,
)
from ..run.progress import Report, duration
from ..run.world import World
from ..teacher.evaluation import Score
from .ring import Ring
from .slots import Pool, PoolSlot, fill_slot, pools_from, pools_per_epoch
from .student import Student

CHECKPOINT_S = 600.0
"""Longest time between two checkpoints, to the pool: ten epochs of a thousand classes at ipc 50
take a day."""
SLOTS = {"cpu": 4, "cuda": 2}
"""Most pools rendered before the students have learned from them. On a CPU three students on two
cores then share twelve calls instead of three, whose last would leave a core idle; on a GPU one
slot is filled while the other is used."""
Pools = Sequence[tuple[Pool, PoolSlot]]


class _Student(BaseModel):
    pool: Count
    batch: Count
    losses: list[Finite]
    curve: list[list[Finite]] = []
    scaler: dict[str, Any]


class _Reached(BaseModel):
    config: dict[str, Any]
    students: dict[str, _Student]


class Lockstep:
    """All students of one method."""

    def __init__(
        self,
        source: ImageSource,
        labels: Labels,
        config: StudentConfig,
        seeds: Sequence[int],
        checkpoints: Checkpoints,
        identity: dict[str, Any],
        report: Report,
        world: World,
    ) -> None:
        self.source, self.labels, self.config, self.world = source, labels, config, world
        self.checkpoints, self.identity, self.report = checkpoints, identity, report
        one = world.size == 1
        self.device = torch.device(resolve_device(config.device)) if one else world.device
        classes = len(source.class_ids)
        self.students = [Student(seed, config, classes, self.device, world) for seed in seeds]
        self.images_per_s: float | None = None
        """Mean of the epochs that ended in this session; None before the first."""
        self._stopped = False
        self._restore()
        self._began = self._logged = now = time.monotonic()
        self._saved = (self._epoch(), now)
        self._ended, self._waited_s = 0, 0.0

    @signals_deferred()
    def run(self, name: str, evaluate: Callable[[], Sequence[Score]] | None = None) -> None:
        """Train from where the students are to the last epoch, writing checkpoints.

        `evaluate` is called after every `evaluate_every` epochs but the last.
        Raises KeyboardInterrupt or Terminated after a signal, once the checkpoint is written:
        within a batch, though with several ranks not while they wait for a pool.
        """
        with self._workers() as workers, self._ring() as ring, ring.consuming():
            # Ranks may take different numbers of pools at a time, so they agree once per pool.
            while not self._stopped and (taken := ring.take()):
                # Threads balance better over several pools; ranks synchronise at every one.
                for together in self._parted(taken) if workers else [[each] for each in taken]:
                    self._learn(together, workers)
                    if self._stopping():
                        break
                    self._log(together, name, ring)
                    if evaluate is not None and self._is_measured(together[-1][0]):
                        self._measure(name, evaluate)
                    if self.world.any(self._is_due()):
                        self._save()
            if self._stopping():
                self._save()
        if self._stopping():
            stop()

    def _parted(self, taken: Pools) -> Iterator[Pools]:
        """The same pools, parted after those that a measurement follows."""
        start = 0
        for end, (pool, _) in enumerate(taken, 1):
            if end == len(taken) or self._is_measured(pool):
                yield taken[start:end]
                start = end

    def _is_measured(self, pool: Pool) -> bool:
        every, epochs = self.config.evaluate_every, pool.epoch + 1
        return every > 0 and pool.ends_epoch and epochs % every == 0 and epochs < self.config.epochs

    def _measure(self, name: str, evaluate: Callable[[], Sequence[Score]]) -> None:
        """Note the students' accuracies; the clock of rates stands still meanwhile."""
        began, epoch = time.monotonic(), self._epoch()
        scores = [score.accuracy for score in evaluate()]
        for student, accuracy in zip(self.students, scores, strict=True):
            student.curve.append([epoch, accuracy])
        self.report.scalar(f"{name}/accuracy", epoch, statistics.fmean(scores))
        taken_s = time.monotonic() - began
        self._began, self._logged = self._began + taken_s, self._logged + taken_s

    def _stopping(self) -> bool:
        """Whether any rank received a signal; until one has, all ranks call it together."""
        self._stopped = self._stopped or self.world.any(signal_came())
        return self._stopped

    def _ring(self) -> Ring[PoolSlot, Pool]:
        source, labels, config = self.source, self.labels, self.config
        return Ring(
            [PoolSlot() for _ in range(SLOTS[self.device.type])],
            lambda slot, pool: fill_slot(slot, pool, source, labels, config),
            pools_from(config, source.labels_N, min(student.pool for student in self.students)),
            device=self.device,
            overlap=config.overlap,
            # A rank that stopped waiting by itself would diverge from the others.
            interrupted=signal_came if self.world.size == 1 else lambda: False,
            alone=self.world.size == 1,
        )

    @contextmanager
    def _workers(self) -> Iterator[ThreadPoolExecutor | None]:
        """Threads for the students; None: they take turns in the caller's."""
        if self.device.type != "cpu" or self.world.size > 1:
            yield None
            return
        count = 1 if self.students[0].draws else min(torch.get_num_threads(), len(self.students))
        with single_threaded_workers(count, "student") as workers:
            yield workers

    def _learn(self, taken: Pools, workers: ThreadPoolExecutor | None) -> None:
        """Train every student on these pools, in order; returns when all have learned them.

        Calls start first in, first out, and a student's call waits for its previous one.
        """
        latest: list[Future[None] | None] = [None] * len(self.students)
        for pool, slot in taken:
            rate = learning_rate(self.config, pool.epoch)
            shared = pool, slot, rate, self.source.samples, self._stopping
            for number, student in enumerate(self.students):
                if workers is None:
                    student.train_pool(*shared)
                else:
                    latest[number] = workers.submit(student.train_pool, *shared, latest[number])
        for call in latest:
            if call is not None:
                call.result()

    def _epoch(self) -> int:
        """The epoch that all students have reached."""
        return min(len(student.losses) for student in self.students)

    def _log(self, learned: Pools, name: str, ring: Ring[PoolSlot, Pool]) -> None:
        """Report the progress, and the epochs that ended with these pools."""
        last, _ = learned[-1]
        samples = self.source.samples
        if not last.ends_epoch:
            done = round((last.index + 1) / pools_per_epoch(self.config, samples), 2)
            self.report.progress(name, done, self.config.epochs, "epochs")
        ended = [pool.epoch for pool, _ in learned if pool.ends_epoch]
        if not ended:
            return
        waited_s, now = ring.waited_s(), time.monotonic()  # in this order: it waits for the GPU
        seconds = (now - self._logged) / len(ended)
        rates = {
            "seconds": seconds,
            "images_per_s": samples / seconds,
            "waited_s": (waited_s - self._waited_s) / len(ended),
        }
        self._logged, self._waited_s, self._ended = now, waited_s, self._ended + len(ended)
        self.images_per_s = self._ended * samples / (now - self._began)
        for epoch in ended:
            losses = [student.losses[epoch] for student in self.students]
            loss = sum(losses) / len(losses)
            self._require_finite(loss, epoch)
            for tag, value in {"loss": loss, **rates}.items():
                self.report.scalar(f"{name}/{tag}", epoch, value)
            note = f"loss {loss:.3g}, {rates['images_per_s']:.3g} images/s"
            note += f", waited {duration(rates['waited_s'])}"
            self.report.progress(name, epoch + 1, self.config.epochs, "epochs", note)

    def _require_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the students' loss is {loss} in epoch {epoch}: give a lower --learning-rate "
                f"(now {self.config.learning_rate:g})"
            )

    def _is_due(self) -> bool:
        epoch, saved_s = self._saved
        every, now = self.config.checkpoint_every, self._epoch()
        return now // every > epoch // every or time.monotonic() - saved_s >= CHECKPOINT_S

    def _save(self) -> None:
        tensors: Tensors = {}
        reached: dict[str, Any] = {}
        for student in self.students:
            own, reached[str(student.seed)] = student.state()
            tensors |= own
            # A checkpoint with NaN would replace a good one.
            self._require_finite(float(own[f"{student.seed}.loss"]), len(student.losses))
        if self.world.leads:
            self.checkpoints.write(tensors, {"config": self.identity, "students": reached})
        self._saved = (self._epoch(), time.monotonic())

    def _restore(self) -> None:
        """Restore the checkpoint that rank 0 chooses, on all ranks."""
        found = self.checkpoints.newest(self.report.say) if self.world.leads else None
        chosen = self.world.same(None if found is None else found.name)
        if chosen is None:
            return
        path = self.checkpoints.folder / chosen
        tensors, metadata = read_tensors(path)
        remedy = "it is not a patchbloom checkpoint: remove it"
        check_document(metadata, str(path), CheckpointError, remedy, _Reached)
        require_same(path, metadata["config"], self.identity)
        with restoring(path):
            for student in self.students:
                student.restore(tensors, metadata["students"][str(student.seed)])


def learning_rate(config: StudentConfig, epoch: int) -> float:
    """Rate of an epoch: a cosine from `learning_rate` towards `final_lr_fraction` of it."""
    angle = math.acos(2 * config.final_lr_fraction - 1)
    return config.learning_rate * 0.5 * (1 + math.cos(angle * epoch / config.epochs))
