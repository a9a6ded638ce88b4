"""Finished runs, as `train compare` reads them. Torch-free.

RUN/summary.json          of `train`; RUN/stages/*.json has settings that it omits
RUN/stages/student.json   of `train student --coreset`, which writes no summary
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ...export.documents import read_json
from .page import SUMMARY, ReportError, Students

REMEDY = "finish the run again with --resume"
OMITTED = {
    *("data", "patches", "teacher", "coreset", "doped_sha256", "method"),  # identities
    *("about", "evals", "sigmas", "timesteps", "weights_bytes"),  # other settings decide them
    *("seed", "seeds", "validation images"),
}


class _Data(BaseModel):
    name: str
    sha256: str
    classes: int


class _Summary(BaseModel):
    students: dict[str, Students] = Field(min_length=1)
    teacher: dict[str, Any]
    data: _Data
    settings: dict[str, Any]
    content_sha256: dict[str, str]
    provenance: dict[str, Any]


class _Stage(BaseModel):
    config: dict[str, Any]


class _Elsewhere(Students):
    render: dict[str, Any]
    provenance: dict[str, Any]


class _StudentStage(_Stage):
    state: Literal["done"]
    result: _Elsewhere


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    settings: dict[str, Any]
    """Settings that decide its results, without seeds."""
    origin: dict[str, Any]
    """Seeds, teacher and machine: runs that differ in these alone belong together."""
    images: dict[str, Any]
    """The facts that two runs must share to be comparable, as far as they are recorded."""
    students: dict[str, dict[int, float]]
    """Accuracy in percent by method and student seed."""
    coresets: dict[str, str]
    """Content hash by method; the ceiling, `real`, has none."""

    def unlike(self, other: Run) -> list[str]:
        """Why accuracies of the two cannot be compared; empty when they can."""
        both = [key for key in self.images if key in other.images]
        if not {"data sha256", "validation images"} & set(both):
            return ["no record says whether the images are the same"]
        told = [(key, *(str(run.images[key])[:12] for run in (self, other))) for key in both]
        return [f"other {key} ({mine}, not {its})" for key, mine, its in told if mine != its]

    def differs_in_seeds_alone(self, other: Run) -> bool:
        """Whether all its students are others, and every setting is the same."""
        same = (self.settings, self.images) == (other.settings, other.images)
        return same and not {*self.origin["student_seeds"]} & {*other.origin["student_seeds"]}


def read_run(folder: Path) -> Run:
    """Raises ReportError, one line, for a folder that holds no finished run or a damaged one."""
    if (folder / SUMMARY).is_file():
        return _whole_run(folder)
    if (folder / "stages" / "student.json").is_file():
        return _students_alone(folder)
    if (folder / "run.json").is_file():
        raise ReportError(f"{folder} has no {SUMMARY}, it is not finished: finish it with --resume")
    raise ReportError(f"{folder} is no run folder, it has no {SUMMARY}: give a finished run")


def _whole_run(folder: Path) -> Run:
    summary = read_json(folder / SUMMARY, ReportError, REMEDY, _Summary)
    data, teacher, settings = summary["data"], summary["teacher"], _by_name(summary["settings"])
    for path in sorted(folder.glob("stages/*.json")):
        if path.stem not in ("data", "report"):
            settings |= _by_name(read_json(path, ReportError, REMEDY, _Stage)["config"]) | settings
    settings["teacher"] = teacher.get("architecture")
    if not teacher.get("losses"):  # not trained here from the run's seed
        settings["teacher_sha256"] = teacher.get("sha256")
    return Run(
        settings=settings,
        origin={
            "data": data["name"],
            "seed": summary["settings"].get("seed"),
            **_origin(summary, next(iter(summary["students"].values()))),
            "teacher_sha256": teacher.get("sha256"),
            "teacher_accuracy": teacher.get("accuracy"),
        },
        images={
            "data sha256": data["sha256"],
            "classes": data["classes"],
            "image size": settings.get("image_size"),
            **_validation_images(folder / "images.safetensors"),
        },
        students={method: _by_seed(each) for method, each in summary["students"].items()},
        coresets=summary["content_sha256"],
    )


def _students_alone(folder: Path) -> Run:
    remedy = "run its command again, with --data"
    path = folder / "stages" / "student.json"
    stage = read_json(path, ReportError, remedy, _StudentStage)
    config, result = stage["config"], stage["result"]
    method, coreset = str(result["render"].get("method")), str(config.get("--coreset"))
    known = {key: value for key, value in config.items() if value is not None}
    return Run(
        settings=_by_name(known | result["render"]) | {"coreset": coreset},
        origin=_origin(result, result),
        images={
            "image size": config.get("--image-size"),
            "validation images": config.get("validation images"),
        },
        students={method: _by_seed(result)},
        coresets={method: coreset},
    )


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that summary.json gives them: `--image-size` is image_size."""
    names = {key: key.removeprefix("--").removeprefix("student.") for key in config}
    named = {name.replace("-", "_"): config[key] for key, name in names.items()}
    return {name: value for name, value in named.items() if name.split(".")[-1] not in OMITTED}


def _origin(described: Mapping[str, Any], students: Mapping[str, Any]) -> dict[str, Any]:
    return {"student_seeds": students["seeds"], "machine": described["provenance"].get("device")}


def _by_seed(students: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(students["seeds"], students["accuracies"], strict=True))


def _validation_images(record: Path) -> dict[str, str]:
    """As `train student --coreset` hashes them, from the record that a run keeps of its images."""
    if not record.is_file():
        return {}
    digest = hashlib.sha256()
    try:
        tensors = load_file(record)
        names = tensors["names"].tobytes().split(b"\0")
        for name, (size_bytes, *_) in zip(names, tensors["stats"].tolist(), strict=True):
            digest.update(b"%s %d\n" % (name, size_bytes) if name.startswith(b"val/") else b"")
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ReportError(f"{record} is damaged: {REMEDY}") from None
    return {"validation images": digest.hexdigest()}
