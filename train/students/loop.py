"""Train students on rendered images, one per seed, all from the same pools, and evaluate them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...engine.data.images import ImageSet
from ...export.documents import Finite, check_document
from ..config import CHANGES_NO_RESULT, StudentConfig
from ..labels.targets import Labels
from ..labels.views import describe_views
from ..methods.source import ImageSource
from ..run.checkpoint import CheckpointError, Checkpoints, read_tensors, require_same, write_tensors
from ..run.progress import Report
from ..run.world import ALONE, World
from ..teacher.evaluation import Score, evaluate
from .lockstep import Lockstep

SCHEMA = "patchbloom.student/1"


class _Finished(BaseModel):
    config: dict[str, Any]
    seed: int
    accuracy: Finite | None
    losses: list[Finite]
    by_class: list[Finite] | None = None
    curve: list[list[Finite]] = []


@dataclass(frozen=True)
class StudentResult:
    """A student after its last epoch."""

    seed: int
    accuracy: float | None
    """Top-1 on the whole validation split, in percent (0-100); None without one."""
    by_class: Sequence[float] | None
    """The same for each class."""
    curve: Sequence[Sequence[float]]
    """Epochs learned and accuracy in percent of every measurement, up to the last epoch."""
    losses: tuple[float, ...]
    """Mean KL divergence of each epoch, in nats."""
    path: Path
    """Its weights: safetensors."""
    images_per_s: float | None
    """Images rendered and learned per second; None when the students were trained earlier."""


def train_students(
    source: ImageSource,
    labels: Labels,
    config: StudentConfig,
    *,
    seeds: Sequence[int],
    val_set: ImageSet | None,
    folder: Path,
    report: Report,
    name: str = "student",
    world: World = ALONE,
) -> list[StudentResult]:
    """Train one student per seed; `folder` gets NAME-seedS.safetensors for each.

    Checkpoints are written beside them: a killed training resumes with the same result (bitwise on
    the CPU). Without `val_set` no accuracy is measured. Raises CheckpointError for a checkpoint of
    another config, ValueError for a loss that is not finite, a batch that does not fit into memory,
    or a validation set with other classes. All ranks of `world` call this with the same `folder`;
    only rank 0 writes to it.
    """
    if val_set is not None and tuple(val_set.class_ids) != tuple(source.class_ids):
        raise ValueError(
            f"validation: expected the coreset's {len(source.class_ids)} classes "
            f"({', '.join(source.class_ids[:3])}, …), got {len(val_set.class_ids)} "
            f"({', '.join(val_set.class_ids[:3])}, …) in {val_set.root}"
        )
    paths = [folder / f"{name}-seed{seed}.safetensors" for seed in seeds]
    identity = _identity(source, labels, config, seeds)
    if world.once(lambda: all(path.is_file() for path in paths)):
        return _finished(paths, identity, world, None)
    checkpoints = Checkpoints(folder, name, config.checkpoints_kept)
    training = Lockstep(source, labels, config, seeds, checkpoints, identity, report, world)
    evaluation = None if val_set is None else partial(_evaluate, training, val_set)
    training.run(name, evaluation)
    scores = [None] * len(paths) if evaluation is None else evaluation()
    for student, path, score in zip(training.students, paths, scores, strict=True):
        metadata = {
            "schema": SCHEMA,
            "config": identity,
            "seed": student.seed,
            "class_ids": source.class_ids,
            "accuracy": score and score.accuracy,
            "losses": student.losses,
        }
        if score is not None:
            metadata["by_class"] = score.by_class
            metadata["curve"] = [*student.curve, [config.epochs, score.accuracy]]
        if world.leads:
            write_tensors(path, student.network.state_dict(), metadata)
    if world.leads:
        checkpoints.remove()
    return _finished(paths, identity, world, training.images_per_s)


def described(results: Sequence[StudentResult]) -> dict[str, Any]:
    """The results as a stage keeps them, plain JSON: a list entry per student."""
    return {
        "accuracies": [result.accuracy for result in results],
        "class_accuracies": [result.by_class for result in results],
        "curves": [result.curve for result in results],
        "losses": [result.losses for result in results],
        "seeds": [result.seed for result in results],
    }


def brief(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's result for the command's output: without a number for every class."""
    return {k: v for k, v in stage.items() if k not in ("class_accuracies", "provenance")}


def _finished(
    paths: Sequence[Path], identity: dict[str, Any], world: World, rate: float | None
) -> list[StudentResult]:
    """Results from the students' files; raises CheckpointError for one of another config."""

    def read() -> list[dict[str, Any]]:
        found = [read_tensors(path)[1] for path in paths]
        for path, metadata in zip(paths, found, strict=True):
            check_document(metadata, str(path), CheckpointError, "remove it", _Finished)
            require_same(path, metadata["config"], identity)
        return found

    return [
        StudentResult(
            told["seed"],
            told["accuracy"],
            told.get("by_class"),
            told.get("curve", []),
            tuple(told["losses"]),
            path,
            rate,
        )
        for path, told in zip(paths, world.once(read), strict=True)
    ]


def _evaluate(training: Lockstep, val_set: ImageSet) -> list[Score]:
    """How the students do on the validation images; all ranks call it."""
    networks = [student.network for student in training.students]
    for network in networks:  # BatchNorm buffers differ between ranks: take rank 0's
        training.world.send(network.buffers())
    return evaluate(
        networks,
        val_set,
        size_px=training.config.size_px,
        device=training.device,
        precision=training.config.precision,
        world=training.world,
    )


def _identity(
    source: ImageSource, labels: Labels, config: StudentConfig, seeds: Sequence[int]
) -> dict[str, Any]:
    """Everything that decides the students, except the pixels."""
    unimportant = ("device", *CHANGES_NO_RESULT)
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
