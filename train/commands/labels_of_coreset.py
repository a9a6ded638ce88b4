"""`train labels --coreset DIR`: a teacher's soft labels for a coreset that was built by hand.

    .NAME.HASH.labels.partial    beside DIR: the answers so far, which the same command goes on with

The coreset is left alone until all answers are there. Views and recipe are those of `train student
--coreset` without labels; the manifest then holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, attach_labels, open_coreset
from ...engine.coreset.manifest import LABELS
from ...engine.errors import CoresetError
from ...engine.expand.backends import resolve_device
from ...export.durable import json_sha256, take_lock
from ..config import StudentConfig
from ..coreset_options import LabelsElsewhere
from ..labels.recording import RecordedLabels, discard_recorded, record_labels
from ..report.summary import provenance
from ..run.progress import Report
from ..students.from_manifest import load_recorded_teacher, open_recorded_source
from .checks import check_network
from .student_from_coreset import without_labels


def label_coreset(options: LabelsElsewhere, line: str) -> dict[str, Any]:
    """Store the labels; returns the printed result, plain JSON.

    Raises ValueError or OSError, one clear line, for a coreset that has labels already, a teacher
    or network that does not fit, a full disk, and what `open_recorded_source` raises.
    """
    with Report() as report, _locked(options.coreset.expanduser()) as coreset:
        if coreset.soft_labels() is not None and not options.overwrite:
            raise CoresetError(
                f"{coreset.folder} holds soft labels already: give --overwrite to replace them"
            )
        codec = options.label_codec(len(coreset.class_ids))
        config = _config(coreset, options, report)
        teacher = load_recorded_teacher(coreset, options.teacher, config.device)
        path = _recording(coreset)
        with open_recorded_source(coreset, options, options.backend, config) as source:
            labels = RecordedLabels(teacher, source, config, path, report, codec=codec)
            record_labels(source, labels, config, report)
        told = {**provenance(line, config.device), "teacher": teacher.describe()}
        labelled = attach_labels(coreset.folder, labels.block(), provenance={"labels": told})
        discard_recorded(path)
    return {
        "coreset": labelled.content_sha256,
        "method": coreset.settings["method"],
        "teacher": teacher.sha256,
        "temperature": config.temperature,
        **labels.layout.describe(),
        "bytes": labelled.bytes()["labels"],
    }


def _config(coreset: Coreset, options: LabelsElsewhere, report: Report) -> StudentConfig:
    """Views and recipe of the students that the labels are for."""
    config = without_labels(coreset, options, report, resolve_device(options.device))
    check_network("--student", config.network, len(coreset.class_ids), config.size_px)
    given = {"epochs": options.epochs, "batch": options.batch}
    if options.cutmix is not None:
        given["cutmix"] = options.cutmix == "on"
    return replace(config, **{name: value for name, value in given.items() if value is not None})


@contextmanager
def _locked(folder: Path) -> Iterator[Coreset]:
    """The coreset, which no other process may label meanwhile."""
    coreset = open_coreset(folder)
    path = _beside(coreset, "lock")
    try:
        lock = take_lock(path)
    except TimeoutError:
        raise CoresetError(f"another process labels {folder}: wait for it, or end it") from None
    try:
        yield coreset
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _recording(coreset: Coreset) -> Path:
    """Its name holds the hash of what is labelled: another coreset in the folder begins anew."""
    files = {name: entry for name, entry in coreset.manifest["files"].items() if name != LABELS}
    labelled = [files, coreset.settings, coreset.manifest["model"]]
    return _beside(coreset, f"{json_sha256(labelled)[:16]}.labels.partial")


def _beside(coreset: Coreset, ending: str) -> Path:
    folder = coreset.folder.resolve()
    return folder.with_name(f".{folder.name}.{ending}")
