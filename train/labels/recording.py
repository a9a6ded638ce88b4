"""Recorded labels: the teacher's answers, stored in a file while students learn from them.

The basis of a codec that has one is fitted before the first answer is stored, to answers about
samples of all classes (basis.fitted_answers), which are rendered once more for it.

Legend: E epochs, N samples, K classes, P samples of a pool, M answers that a basis is fitted to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.labels.basis import fitted_answers, spread_out
from ...engine.labels.codecs import Codec, Encoding, SoftTargets, as_fp16
from ...engine.labels.file import LabelLayout, MappedParts, RecordedBlock, fill_with_missing
from ...export.durable import full_disk_explained, replace_file, replacing_file
from ..config import StudentConfig, pool_size
from ..methods.pools import answer_pool
from ..methods.source import ImageSource
from ..run.progress import Report
from ..run.world import ALONE, World
from ..teacher.teacher import Teacher
from .targets import describe_stored, labelled_views
from .views import pools, render_views

BASIS = "basis"


class RecordedLabels:
    """The teacher's answers, stored in a file as large as the coreset's labels.

    The file is first filled with a value that no answer contains, usually NaN: a full disk is then
    an error and not a later crash, and a missing answer cannot pass for one. It is memory-mapped,
    so answers survive a kill -9. A second file describes what was labelled; a recording of
    anything else, or a truncated one, is started again, and the report says so. A third file has a
    checksum of each answered pool and of the basis: what differs from it is asked again. The ranks
    of a world share the teacher's work; rank 0 has the files.
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
            **labelled_views(source, config),
            "teacher": teacher.sha256,
            "student": config.recipe(),
        }
        self._report, self._sums = report, dict[str, str]()
        self._pools = partial(pools, config, source.labels_N)
        self._recording = self._open(report) if world.leads else None
        self._encoding = Encoding(codec, self.temperature, self._basis(source, config, report))

    def _open(self, report: Report) -> MappedParts:
        """Resume the recording, or begin one. Raises OSError, one line, on a full disk."""
        path, description, size = self.path, _description(self.path), self.layout.bytes
        settings = {**self.settings, **self.layout.describe(), "temperature": self.temperature}
        described = json.dumps(settings, sort_keys=True).encode()
        whole = path.is_file() and path.stat().st_size == size
        if not (whole and description.is_file() and description.read_bytes() == described):
            if path.is_file():
                report.say(f"labels: {path} is truncated or holds other labels: starting over")
            discard_recorded(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with full_disk_explained(path, size), replacing_file(path) as staged:
                fill_with_missing(staged, self.layout)
            replace_file(_checksums(path), b"")
            replace_file(description, described)
        recording = MappedParts(path, self.layout, recording=True)
        if _checksums(path).is_file():
            lines = _checksums(path).read_text(errors="replace").splitlines()
            self._sums = {key: found for key, _, found in (line.rpartition(" ") for line in lines)}
        else:  # an earlier version began it: its answers are taken as they are
            self._trust(recording)
        return recording

    def _trust(self, recording: MappedParts) -> None:
        if recording.basis is not None and not np.isnan(recording.basis).any():
            self._note(BASIS, [recording.basis])
        for epoch in range(self.layout.epochs):
            for samples_P in self._pools(epoch):
                if not recording.some_missing(epoch, samples_P.numpy()):
                    self._note(*_answers(recording, epoch, samples_P))

    def _note(self, key: str, parts: Iterable[np.ndarray]) -> None:
        """Keep the checksum of a pool's answers, or of the basis."""
        self._sums[key] = _checksum(parts)
        with full_disk_explained(self.path, 4096), _checksums(self.path).open("a") as stream:
            stream.write(f"{key} {self._sums[key]}\n")

    def _is_sound(self, key: str, parts: Iterable[np.ndarray]) -> bool:
        """Whether these answers, or the basis, are as they were noted; tells it when not."""
        noted = self._sums.get(key)
        if noted == _checksum(parts):
            return True
        if noted is not None:
            del self._sums[key]
            self._report.say(f"labels: {self.path} is damaged ({key}): that part is made again")
        return False

    def _basis(self, source: ImageSource, config: StudentConfig, report: Report) -> Tensor | None:
        """Rank 0's basis on all ranks: the recording's, or fitted now and stored there."""
        fit, k = self.layout.codec.fit, self.layout.codec.k
        if fit is None or k is None:
            return None
        basis, sound = torch.empty(0, dtype=torch.float32), True
        if self._recording is not None and self._recording.basis is not None:
            basis = torch.from_numpy(self._recording.basis)
            sound = self._is_sound(BASIS, [self._recording.basis])
        if self._world.any(not sound):
            answers_MK = self._answers_to_fit(source, config, fitted_answers(k))
            if self._recording is not None:
                fitted, note = fit(answers_MK)
                if note:
                    report.say(f"labels: {note}")
                basis.copy_(fitted)
                self._recording.flush()
                self._note(BASIS, [basis.numpy()])
        return self._world.all_gather_rows(basis).clone()

    def _answers_to_fit(self, source: ImageSource, config: StudentConfig, wanted: int) -> Tensor:
        """At most `wanted` of the teacher's logits, about every class: fp16 [M, K], on the CPU.

        The samples are spread over the source, in as many epochs as needed. Other ranks than 0 get
        no rows. Raises CoresetError for a logit that is not finite.
        """
        samples_S = spread_out(torch.arange(source.samples), wanted)
        rounds, chunks = -(-wanted // len(samples_S)), -(-len(samples_S) // pool_size(config))
        answers = [torch.empty(0, self.layout.classes, dtype=torch.float16)]
        for epoch in range(min(rounds, config.epochs)):
            for first in range(chunks):
                samples_P = samples_S[first::chunks].contiguous()
                views_PCHW = render_views(source, samples_P, epoch, config)
                logits_PK = answer_pool(self.teacher, views_PCHW, self._world)
                if self._recording is not None:
                    answers.append(as_fp16(logits_PK))
        return spread_out(torch.cat(answers), wanted)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """Raises CoresetError for an answer that no codec can hold: NaN, or beyond fp16."""
        kept = self._encoding.encode(answer_pool(self.teacher, views_PCHW, self._world))
        if self._recording is not None:
            for part, rows in zip(self._recording.answers, kept, strict=True):
                part[epoch, samples_P.numpy()] = rows.numpy()
            self._note(*_answers(self._recording, epoch, samples_P))
        return self._encoding.decode(kept, views_PCHW.device)

    def have(self, pools_of_epoch: Sequence[Tensor], epoch: int) -> list[bool]:
        """Whether the recording has every answer of a pool, undamaged, for each pool."""
        return self._world.once(
            lambda: [
                self._is_sound(*_answers(self._file, epoch, samples_P))
                for samples_P in pools_of_epoch
            ]
        )

    def is_complete(self) -> bool:
        """Whether the recording has every answer, undamaged."""
        epochs = range(self.layout.epochs)
        return all(all(self.have(self._pools(epoch), epoch)) for epoch in epochs)

    def describe(self) -> dict[str, Any]:
        """The same as the StoredLabels that they become."""
        return describe_stored(self.teacher.sha256, self.temperature, self.layout.codec)

    def block(self) -> RecordedBlock:
        """All answers for engine.coreset.attach_labels, which refuses missing ones; rank 0 only."""
        return RecordedBlock(
            recording=self._file, temperature=self.temperature, settings=self.settings
        )

    @property
    def _file(self) -> MappedParts:
        """Rank 0 only."""
        assert self._recording is not None
        return self._recording


def discard_recorded(path: Path) -> None:
    """Remove the recording at `path`, if there is one."""
    for each in (_description(path), _checksums(path), path):
        each.unlink(missing_ok=True)


def _description(path: Path) -> Path:
    """The file that describes what the answers in `path` belong to."""
    return path.with_name(f"{path.name}.json")


def _checksums(path: Path) -> Path:
    """The file of checksums: `epoch E, sample S SUM`, S the first of its pool; the last counts."""
    return path.with_name(f"{path.name}.sums")


def _answers(file: MappedParts, epoch: int, samples_P: Tensor) -> tuple[str, list[np.ndarray]]:
    """A pool's key among the checksums, and its answers."""
    rows_P = samples_P.numpy()
    return f"epoch {epoch}, sample {rows_P[0]}", [part[epoch, rows_P] for part in file.answers]


def _checksum(parts: Iterable[np.ndarray]) -> str:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return f"{checksum:08x}"


def record_labels(
    source: ImageSource, labels: RecordedLabels, config: StudentConfig, report: Report
) -> None:
    """Label every view of every epoch, without students; resumes at the pool where it stopped."""
    for epoch in range(config.epochs):
        report.progress("labels", epoch, config.epochs, "epochs")
        every = pools(config, source.labels_N, epoch)
        for samples_P, done in zip(every, labels.have(every, epoch), strict=True):
            if not done:
                views_PCHW = render_views(source, samples_P, epoch, config)
                labels.targets(samples_P, epoch, views_PCHW)
    report.progress("labels", config.epochs, config.epochs, "epochs")
