"""A teacher that was brought along: the name that it has in a run, and how good it is here."""

from __future__ import annotations

from pathlib import Path

from ...engine.data.images import ImageSet
from ...export.durable import file_sha256
from ..run.progress import Report
from ..run.world import World
from .evaluation import accuracies
from .teacher import Teacher


def name_of(teacher_source: str) -> str:
    """torchvision:NAME as it is; a file by its content."""
    path = Path(teacher_source).expanduser()
    return f"sha256:{file_sha256(path)}" if path.is_file() else teacher_source


def measure(teacher: Teacher, val: ImageSet, world: World, report: Report) -> float:
    """Its accuracy on this validation split, in percent; the ranks of `world` share the images."""
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
