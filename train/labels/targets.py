"""Soft labels: the teacher's answers to what the students see.

online   the teacher answers while the students train; nothing is kept
record   the same, and its answers are kept as the codec has them, for the coreset
stored   read from the coreset; no teacher is needed

The teacher's logits are rounded to fp16 first. A student learns from an answer as it is kept: so it
is the same, bit for bit on the CPU, whether its labels were recorded beside it or read from where
they are stored, with any codec; and from online labels it is the one of dense labels.

The basis of codec pca is fitted before the first answer is kept, to answers about samples of all
classes (label_basis.fitted_answers), rendered once more for it. Every TESTED-th of these is left
out, and what the basis keeps of them is said.

Top-k labels p' of dense ones p: ||p' - p||_1 <= 2 r + 2^-10 + k 2^-24, where r is the mass of the
classes that are left out (which is spread evenly; the rest of the bound is fp16). The gradient of
the loss by a student's logits, (q - p) / T, differs by a T-th of that.

Legend: E epochs, N samples, K classes, k kept probabilities or components, P samples of a pool.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...engine.errors import CoresetError
from ...engine.labels.file import KeptCodec, LabelLayout, MappedParts, fill_with_missing
from ...engine.labels.pca import fit_basis, fitted_answers, share_kept, spread_out
from ...engine.labels.soft_labels import (
    Codec,
    LabelCodec,
    RecordedBlock,
    SoftLabels,
    SoftTargets,
    as_fp16,
    unanswered,
)
from ...export.durable import differences, full_disk_explained, replace_file, replacing_file
from ..config import StudentConfig, pool_size
from ..methods.shared import answer_pool
from ..methods.source import ImageSource
from ..run.progress import Report
from ..run.world import ALONE, World
from ..teacher.teacher import Teacher
from .views import describe_views, make_views, pools

TESTED = 8


class Labels(Protocol):
    """Targets of a pool's views."""

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """On the views' device, at the config's temperature."""
        ...

    def flush(self) -> None:
        """Bring to the disk what was recorded so far."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the targets, beside the views; plain JSON."""
        ...


class OnlineLabels:
    """The teacher, asked every time. `views_PCHW` are normalised as views.make_views does."""

    def __init__(self, teacher: Teacher, temperature: float, world: World = ALONE) -> None:
        self.teacher, self.temperature, self._world = teacher, temperature, world.producing

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """CoresetError for an answer that is NaN, or beyond fp16."""
        logits_PK = as_fp16(answer_pool(self.teacher, views_PCHW, self._world))
        return SoftTargets(logits_PK.to(views_PCHW.device))

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.teacher.sha256, "temperature": self.temperature, "codec": "none"}


class RecordedLabels:
    """The teacher's answers, kept in a file as large as the coreset's while they are used.

    The file is filled with what no answer holds, NaN as a rule: a full disk is an error then, and
    not a crash later, and an answer that is missing cannot be taken for one. It is memory-mapped,
    so that what is answered survives a kill -9. A second file says what the answers belong to; a
    recording of anything else, or one that was cut short, is begun anew, and the report is told.
    The ranks of a world share the asking, and rank 0 has the file.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: ImageSource,
        config: StudentConfig,
        path: Path,
        report: Report,
        *,
        codec: KeptCodec = "dense",
        k: int = 10,
        world: World = ALONE,
    ) -> None:
        self._world = world.producing
        self.teacher, self.temperature, self.path = teacher, config.temperature, path
        self.layout = LabelLayout(
            codec=codec,
            epochs=config.epochs,
            samples=source.samples,
            classes=len(teacher.class_ids),
            k=k,
        )
        self.settings = {
            **label_settings(source, config),
            "teacher": teacher.sha256,
            "student": config.recipe(),
        }
        self._recording = self._open(report) if world.leads else None
        answers = [] if self._recording is None else self._recording.answers
        self._parts = [torch.from_numpy(array) for array in answers]
        basis = self._basis(source, config, report) if codec == "pca" else None
        self._codec = LabelCodec(codec, k=k, temperature=self.temperature, basis=basis)

    def _open(self, report: Report) -> MappedParts:
        told = {**self.settings, **self.layout.describe(), "temperature": self.temperature}
        said = json.dumps(told, sort_keys=True).encode()
        if not self._is_of(said):
            if self.path.is_file():
                report.say(f"labels: {self.path} was cut short or is of other labels: begun anew")
            discard_recorded(self.path)
            _begin(self.path, self.layout)
            replace_file(_belongs_to(self.path), said)
        return MappedParts(self.path, self.layout, recording=True)

    def _is_of(self, said: bytes) -> bool:
        belongs = _belongs_to(self.path)
        return (
            belongs.is_file()
            and belongs.read_bytes() == said
            and self.path.is_file()
            and self.path.stat().st_size == self.layout.bytes
        )

    def _basis(self, source: ImageSource, config: StudentConfig, report: Report) -> Tensor:
        """Rank 0's, of a recording that has it already, or fitted and put there."""
        basis = torch.empty(0)
        if self._recording is not None and self._recording.basis is not None:
            basis = torch.from_numpy(self._recording.basis)
        if self._world.any(bool(basis.isnan().any())):
            answers_MK = self._asked_anew(source, config, fitted_answers(self.layout.k))
            if self._recording is not None:
                basis.copy_(self._fitted(answers_MK, report))
                self.flush()
        return self._world.all_gather_rows(basis).clone()

    def _fitted(self, answers_MK: Tensor, report: Report) -> Tensor:
        """A basis, and what it keeps of answers that it was not fitted to."""
        tested_M = torch.arange(1, 1 + len(answers_MK)) % TESTED == 0
        basis = fit_basis(answers_MK[~tested_M], self.layout.k)
        if bool(tested_M.any()):
            kept = share_kept(answers_MK[tested_M], basis)
            report.say(
                f"labels: {self.layout.k} components keep {100 * kept:.1f} % of the variance of "
                f"{int(tested_M.sum())} answers that they were not fitted to"
            )
        return basis

    def _asked_anew(self, source: ImageSource, config: StudentConfig, wanted: int) -> Tensor:
        """That many of the teacher's logits, or all there are, of every class: fp16, on the CPU.

        Of samples spread over the source, in as many epochs as it takes. Rank 0's alone; all the
        others get none. CoresetError for a logit that is not finite.
        """
        samples_S = spread_out(torch.arange(source.samples), wanted)
        rounds, chunks = -(-wanted // len(samples_S)), -(-len(samples_S) // pool_size(config))
        answers = [torch.empty(0, self.layout.classes, dtype=torch.float16)]
        for epoch in range(min(rounds, config.epochs)):
            for first in range(chunks):
                samples_P = samples_S[first::chunks].contiguous()
                views_PCHW = make_views(source.render(samples_P, epoch), samples_P, epoch, config)
                logits_PK = answer_pool(self.teacher, views_PCHW, self._world)
                if self._recording is not None:
                    answers.append(as_fp16(logits_PK))
        return spread_out(torch.cat(answers), wanted)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """CoresetError for an answer that no codec can hold: NaN, or beyond fp16."""
        kept = self._codec.encode(answer_pool(self.teacher, views_PCHW, self._world))
        if self._recording is not None:
            for part, rows in zip(self._parts, kept.parts, strict=True):
                part[epoch, samples_P] = rows
        return kept.decoded(views_PCHW.device)

    def have(self, pools_of_epoch: Sequence[Tensor], epoch: int) -> list[bool]:
        """Whether every answer of a pool is there, from a recording that was stopped."""
        if self._recording is None:
            return self._world.same([])
        rows = ([part[epoch, samples_P] for part in self._parts] for samples_P in pools_of_epoch)
        return self._world.same([not self._is_missing(rows_P) for rows_P in rows])

    def is_complete(self) -> bool:
        """Whether every answer is there."""
        epochs = zip(*self._parts, strict=True)
        return self._world.same(not any(self._is_missing(parts_N) for parts_N in epochs))

    def _is_missing(self, parts_B: Sequence[Tensor]) -> bool:
        """Whether one of these is."""
        return bool(unanswered(parts_B, self.layout).any())

    def flush(self) -> None:
        if self._recording is not None:
            self._recording.flush()

    def describe(self) -> dict[str, Any]:
        """The same as of the StoredLabels that they become."""
        return _described(self.teacher.sha256, self.temperature, self.layout.codec, self.layout.k)

    def block(self) -> RecordedBlock:
        """Everything recorded, for engine.coreset.attach_labels, which refuses missing answers.

        Rank 0's alone.
        """
        assert self._recording is not None
        return RecordedBlock(
            recording=self._recording, temperature=self.temperature, settings=self.settings
        )

    def discard(self) -> None:
        """Remove the files, once their content is in the coreset."""
        discard_recorded(self.path)


def discard_recorded(path: Path) -> None:
    """Remove what was recorded in `path`, if anything was."""
    _belongs_to(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _belongs_to(path: Path) -> Path:
    """The file that says what the answers in `path` belong to."""
    return path.with_name(f"{path.name}.json")


def _begin(path: Path, layout: LabelLayout) -> None:
    """Make `path` a recording without answers; OSError, one line, on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path, layout.bytes), replacing_file(path) as staged:
        fill_with_missing(staged, layout)


class StoredLabels:
    """Labels of a coreset. Refused when they were made for other views than these.

    `but_for`: what of the source's description may be another than it was then.
    """

    def __init__(
        self,
        stored: SoftLabels,
        source: ImageSource,
        config: StudentConfig,
        *,
        but_for: Collection[str] = (),
    ) -> None:
        self.stored, self.config = stored, config
        wanted = label_settings(source, config)
        then = stored.settings.get("source", {})
        wanted["source"] |= {key: then[key] for key in but_for if key in then}
        _require_fit(stored, wanted, source, config)
        self.temperature, self._labels_N = config.temperature, source.labels_N
        self._epoch, self._pools = -1, list[Tensor]()
        self._pool_of_N = torch.empty(stored.samples, dtype=torch.int64)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """While these are learnt from, the next pool's are read from the disk."""
        targets_P = self.stored.targets(epoch, samples_P, views_PCHW.device)
        self._read_next(int(samples_P[0]), epoch)
        return targets_P

    def _read_next(self, sample: int, epoch: int) -> None:
        """Read the pool after the one with this sample ahead, of the next epoch after the last."""
        if epoch != self._epoch:
            self._epoch, self._pools = epoch, self._pools_of(epoch)
            for number, samples_P in enumerate(self._pools):
                self._pool_of_N[samples_P] = number
        following = int(self._pool_of_N[sample]) + 1
        if following < len(self._pools):
            self.stored.read_ahead(epoch, self._pools[following])
        elif epoch + 1 < self.stored.epochs:
            self.stored.read_ahead(epoch + 1, self._pools_of(epoch + 1)[0])

    def _pools_of(self, epoch: int) -> list[Tensor]:
        return pools(self.config, self._labels_N, epoch)

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """The same as of the RecordedLabels that they came from."""
        teacher = self.stored.settings.get("teacher")
        return _described(teacher, self.temperature, self.stored.codec, self.stored.k)


def _described(teacher: Any, temperature: float, codec: Codec, k: int | None) -> dict[str, Any]:
    kept = {} if codec == "dense" else {"k": k}
    return {"teacher": teacher, "temperature": temperature, "codec": codec, **kept}


def label_settings(source: ImageSource, config: StudentConfig) -> dict[str, Any]:
    """What stored labels belong to: the images and the views of them."""
    return {"source": source.describe(), "views": describe_views(config)}


def _require_fit(
    stored: SoftLabels, wanted: dict[str, Any], source: ImageSource, config: StudentConfig
) -> None:
    size = (stored.samples, stored.classes)
    if size != (source.samples, len(source.class_ids)):
        raise CoresetError(
            f"stored labels: expected {source.samples} samples of {len(source.class_ids)} classes, "
            f"got {size[0]} of {size[1]}: {_AGAIN}"
        )
    if stored.epochs < config.epochs:
        raise CoresetError(
            f"stored labels: expected at least {config.epochs} epochs, got {stored.epochs}: "
            f"train for {stored.epochs} (--epochs {stored.epochs}), or {_AGAIN}"
        )
    if not stored.keeps_logits and stored.temperature != config.temperature:
        raise CoresetError(
            f"stored labels: expected temperature {config.temperature}, got top-k labels at "
            f"{stored.temperature}, which keep no logits: {_AGAIN}"
        )
    for part, now in wanted.items():
        for key, was, asked in differences(stored.settings.get(part, {}), now):
            raise CoresetError(
                f"stored labels were made for {part} with {key} = {was}, now it is {asked}: "
                f"give the same options, or {_AGAIN}"
            )


_AGAIN = "label anew in another --out, or ask the teacher with --labels online"


def record_labels(
    source: ImageSource, labels: RecordedLabels, config: StudentConfig, report: Report
) -> None:
    """Label every view of every epoch without training anyone: `train labels`.

    Goes on from the pool where it was stopped.
    """
    for epoch in range(config.epochs):
        report.progress("labels", epoch, config.epochs, "epochs")
        every = pools(config, source.labels_N, epoch)
        for samples_P, done in zip(every, labels.have(every, epoch), strict=True):
            if done:
                continue
            views_PCHW = make_views(source.render(samples_P, epoch), samples_P, epoch, config)
            labels.targets(samples_P, epoch, views_PCHW)
    labels.flush()
    report.progress("labels", config.epochs, config.epochs, "epochs")
