"""A provided teacher: its name in a run, and its accuracy on this data."""

from __future__ import annotations

from pathlib import Path

from ...engine.data.images import ImageSet
from ...export.durable import file_sha256
from ..run.progress import Report
from ..run.world import World
from .evaluation import accuracies
from .teacher import Teacher


def name_of(teacher_source: str) -> str:
    """torchvision:NAME unchanged; the content hash of a file."""
    path = Path(teacher_source).expanduser()
    return f"sha256:{file_sha256(path)}" if path.is_file() else teacher_source


def measure(teacher: Teacher, val: ImageSet, world: World, report: Report) -> float:
    """Validation accuracy of `teacher` in percent; the ranks of `world` share the images."""
    own = teacher.normalisation
    (accuracy,) = accuracies(
        [lambda inputs_BCHW: teacher.logits(inputs_BCHW, own)],
        val,
        size_px=teacher.size_px,
        device=teacher.device,
        normalisation=own,
        world=world,
    )
    report.say(f"teacher: {accuracy:.1f} % of {len(val)} validation images")
    return accuracy
