"""Recorded labels: the teacher's answers, kept in a file while they are used.

The basis of a codec that has one is fitted before the first answer is kept, to answers about
samples of all classes (basis.fitted_answers), which are rendered once more for it.

Legend: E epochs, N samples, K classes, P samples of a pool, M answers that a basis is fitted to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.labels.basis import fitted_answers, spread_out
from ...engine.labels.codecs import Codec, Encoding, SoftTargets, as_fp16
from ...engine.labels.file import LabelLayout, MappedParts, RecordedBlock, fill_with_missing
from ...export.durable import full_disk_explained, replace_file, replacing_file
from ..config import StudentConfig, pool_size
from ..methods.shared import answer_pool
from ..methods.source import ImageSource
from ..run.progress import Report
from ..run.world import ALONE, World
from ..teacher.teacher import Teacher
from .targets import describe_kept, label_settings
from .views import make_views, pools


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
        codec: Codec,
        world: World = ALONE,
    ) -> None:
        self._world = world.producing
        self.teacher, self.temperature, self.path = teacher, config.temperature, path
        self.layout = LabelLayout(
            codec=codec,
            epochs=config.epochs,
            samples=source.samples,
            classes=len(teacher.class_ids),
        )
        self.settings = {
            **label_settings(source, config),
            "teacher": teacher.sha256,
            "student": config.recipe(),
        }
        self._recording = self._open(report) if world.leads else None
        answers = [] if self._recording is None else self._recording.answers
        self._parts = [torch.from_numpy(array) for array in answers]
        basis = self._basis(source, config, report)
        self._encoding = Encoding(codec, self.temperature, basis)

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

    def _basis(self, source: ImageSource, config: StudentConfig, report: Report) -> Tensor | None:
        """Rank 0's, of a recording that has it already, or fitted and put there."""
        fit, k = self.layout.codec.fit, self.layout.codec.k
        if fit is None or k is None:
            return None
        basis = torch.empty(0)
        if self._recording is not None and self._recording.basis is not None:
            basis = torch.from_numpy(self._recording.basis)
        if self._world.any(bool(basis.isnan().any())):
            answers_MK = self._asked_anew(source, config, fitted_answers(k))
            if self._recording is not None:
                fitted, told = fit(answers_MK)
                if told:
                    report.say(f"labels: {told}")
                basis.copy_(fitted)
                self.flush()
        return self._world.all_gather_rows(basis).clone()

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
        kept = self._encoding.encode(answer_pool(self.teacher, views_PCHW, self._world))
        if self._recording is not None:
            for part, rows in zip(self._parts, kept, strict=True):
                part[epoch, samples_P] = rows
        return self._encoding.decode(kept, views_PCHW.device)

    def have(self, pools_of_epoch: Sequence[Tensor], epoch: int) -> list[bool]:
        """Whether every answer of a pool is there, from a recording that was stopped."""
        if self._recording is None:
            return self._world.same([])
        missing = self._recording.some_missing
        return self._world.same([not missing(epoch, pool_P.numpy()) for pool_P in pools_of_epoch])

    def is_complete(self) -> bool:
        """Whether every answer is there."""
        recording, epochs = self._recording, range(self.layout.epochs)
        return self._world.same(
            recording is not None and not any(map(recording.some_missing, epochs))
        )

    def flush(self) -> None:
        if self._recording is not None:
            self._recording.flush()

    def describe(self) -> dict[str, Any]:
        """The same as of the StoredLabels that they become."""
        return describe_kept(self.teacher.sha256, self.temperature, self.layout.codec)

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
