"""Labels of a run's students: from where they come, and where they are kept.

    RUN/students/METHOD.labels.partial    the teacher's answers, as far as they were asked
    labels.safetensors of the coreset     all of them, with which the file above is removed

Labels that the coreset has are taken over, and no teacher is loaded.
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
    """What of the plan decides the labels, for a stage's config: plain JSON, by option.

    `stored` and `record` make the same labels and students.
    """
    if plan.student.targets == "hard":
        return {}
    if plan.labels == "online":
        return {"--labels": "online"}
    return {"--labels": "record or stored", **codec_options(plan.codec)}


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """Labels of the students of one source. All ranks of the run's world call the same."""

    plan: Plan
    run: RunFolder
    report: Report
    teacher: Callable[[], Teacher]
    """Loads it, the first time that it is asked."""
    method: str
    source: ImageSource
    coreset: Coreset | None
    """None for the ceiling, whose labels are not kept."""

    def choose(self) -> Labels:
        """Stored ones where the coreset has them, else the teacher's, kept if that is asked for.

        With hard targets the classes, and the coreset's labels stay as they are. CoresetError when
        the coreset has labels of another --codec.
        """
        plan = self.plan
        if plan.student.targets == "hard":
            return HardLabels(self.source, plan.student)
        if self.coreset is None or plan.labels == "online":
            return OnlineLabels(self.teacher(), plan.student.temperature, self.run.world)
        stored = self._stored(self.coreset)
        return self._recorded() if stored is None else stored

    def store(self) -> None:
        """Put labels of every view of every epoch into the coreset, unless it has them.

        CoresetError when it has labels of another --codec.
        """
        if self.coreset is not None and self._stored(self.coreset) is None:
            self.keep(self._recorded())

    def keep(self, labels: Labels) -> None:
        """Put recorded labels into the coreset, after asking for those that are missing.

        Others are there already, or are not to be kept.
        """
        if self.coreset is None or not isinstance(labels, RecordedLabels):
            return
        if not labels.is_complete():
            record_labels(self.source, labels, self.plan.student, self.report)
        if self.run.world.leads:
            attach_labels(self.coreset.folder, labels.block())
            labels.discard()
        self.run.world.barrier()

    def _recorded(self) -> RecordedLabels:
        return RecordedLabels(
            *(self.teacher(), self.source, self.plan.student, self._recording(), self.report),
            codec=self.plan.codec,
            world=self.run.world,
        )

    def _stored(self, coreset: Coreset) -> StoredLabels | None:
        stored = coreset.soft_labels()
        if stored is None:
            return None
        if stored.codec != self.plan.codec:
            asked, kept = _spelled(self.plan.codec), _spelled(stored.codec)
            raise CoresetError(
                f"{coreset.folder} holds labels of {kept}, asked for {asked}: "
                f"give {kept}, or another --out"
            )
        if self.run.world.leads:
            discard_recorded(self._recording())  # of a run that was killed in between
        return StoredLabels(stored, self.source, self.plan.student)

    def _recording(self) -> Path:
        return self.run.folder / "students" / f"{self.method}.labels.partial"


def _spelled(codec: Codec) -> str:
    return " ".join(f"{option} {value}" for option, value in codec_options(codec).items())
