"""Where the labels of a run's students come from, and where they are stored.

    RUN/students/METHOD.labels.partial    the teacher's answers so far
    labels.safetensors of the coreset     all of them; the file above is then removed

Labels that the coreset already has are used, and no teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, attach_labels
from ...engine.errors import CoresetError
from ...engine.labels.codecs import Codec, codec_options
from ..methods.source import ImageSource
from ..plan import Plan
from ..run.folder import RunFolder
from ..run.progress import Report
from ..teacher.teacher import Teacher
from .hard import HardLabels
from .recording import RecordedLabels, discard_recorded, record_labels
from .targets import Labels, OnlineLabels, StoredLabels


def label_settings(plan: Plan) -> dict[str, Any]:
    """The part of a stage's config that decides the labels: plain JSON, by option.

    `stored` and `record` make the same labels and students.
    """
    if plan.student.targets == "hard":
        return {}
    if plan.labels == "online":
        return {"--labels": "online"}
    return {"--labels": "record or stored", **codec_options(plan.codec)}


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """Labels of the students of one source. All ranks of the run's world call the same methods."""

    plan: Plan
    run: RunFolder
    report: Report
    teacher: Callable[[], Teacher]
    """Loads it at the first call."""
    method: str
    source: ImageSource
    coreset: Coreset | None
    """None for the ceiling, whose labels are not stored."""

    def choose(self) -> Labels:
        """The coreset's labels if it has some, else the teacher's, recorded unless --labels online.

        With hard targets the classes; the coreset's labels are left alone. Raises CoresetError when
        the coreset has labels of another --codec.
        """
        student = self.plan.student
        if student.targets == "hard":
            return HardLabels(self.source, student)
        if self.coreset is None or self.plan.labels == "online":
            return OnlineLabels(self.teacher(), student.temperature, self.run.world)
        stored = self.coreset.soft_labels()
        if stored is None:
            made_of = (self.teacher(), self.source, student, self._recording(), self.report)
            return RecordedLabels(*made_of, codec=self.plan.codec, world=self.run.world)
        if stored.codec != self.plan.codec:
            asked, kept = _spelled(self.plan.codec), _spelled(stored.codec)
            raise CoresetError(
                f"{self.coreset.folder} holds labels of {kept}, asked for {asked}: "
                f"give {kept}, or another --out"
            )
        if self.run.world.leads:
            discard_recorded(self._recording())  # a run killed while storing labels leaves it
        return StoredLabels(stored, self.source, student)

    def keep(self, labels: Labels) -> None:
        """Complete recorded labels and store them in the coreset; other labels are not stored."""
        if self.coreset is None or not isinstance(labels, RecordedLabels):
            return
        if not labels.is_complete():
            record_labels(self.source, labels, self.plan.student, self.report)
        if self.run.world.leads:
            attach_labels(self.coreset.folder, labels.block())
            discard_recorded(self._recording())
        self.run.world.barrier()

    def _recording(self) -> Path:
        return self.run.folder / "students" / f"{self.method}.labels.partial"


def _spelled(codec: Codec) -> str:
    return " ".join(f"{option} {value}" for option, value in codec_options(codec).items())
