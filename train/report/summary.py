"""RUN/summary.json: every number of a run, and its provenance."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...engine.labels.codecs import kept_by_option
from ...export.configurations import seen_classes
from ..methods.registry import METHODS
from ..plan import Plan
from ..run.launch import read_launch
from .compute import method_compute
from .page import REAL

SCHEMA = "patchbloom.summary/1"
_VERSIONS = (
    "patchbloom",
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "onnxruntime",
    "nvidia-dali-cuda130",
    "pillow",
)


WEAK_TEACHER = 50.0
"""A note warns of a teacher whose accuracy in percent is lower."""
FASTAI_SPLITS = {(9469, 3925): "Imagenette", (9025, 3929): "ImageWoof"}
"""fast.ai's subsets of ImageNet, by their numbers of training and validation images."""


def mean_and_std(accuracies: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single student), rounded to 0.01."""
    std = round(statistics.stdev(accuracies), 2) if len(accuracies) > 1 else None
    return round(statistics.fmean(accuracies), 2), std


def rounded(value: Any) -> Any:
    """Plain JSON with every float at six significant digits: for people, not for computing on."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def make_summary(
    plan: Plan,
    *,
    command: str,
    teacher: Mapping[str, Any],
    students: Mapping[str, Mapping[str, Any]],
    coresets: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    skipped: Mapping[str, int],
) -> dict[str, Any]:
    """The summary. `students`: results of the student stages by method, `real` included.

    Floats are rounded: percent to 0.01, shares, rates and seconds to 0.1, others to six digits.
    """
    methods = plan.methods
    accuracy = {m: mean_and_std(students[m]["accuracies"]) for m in methods}
    ceiling = mean_and_std(students[REAL]["accuracies"]) if REAL in students else None
    shares = {}
    if ceiling is not None and ceiling[0]:
        shares = {m: round(100 * mean / ceiling[0], 1) for m, (mean, _) in accuracy.items()}
    return {
        "schema": SCHEMA,
        "accuracy": accuracy,
        "ceiling": ceiling,
        "share_of_ceiling": shares,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "images_per_s": {
            m: (rate := students[m]["images_per_s"]) and round(rate, 1) for m in methods
        },
        "evals_per_image": {m: coresets[m]["evals"] for m in methods},
        "compute": {m: rounded(method_compute(plan, m, coresets[m])) for m in methods},
        "bytes": {m: coresets[m]["bytes"] for m in methods},
        "content_sha256": {m: coresets[m]["content_sha256"] for m in methods},
        "skipped_images": dict(skipped),
        "students": rounded(students),
        "teacher": rounded(teacher),
        "data": {
            "name": plan.data_name,
            "sha256": plan.data_sha256,
            "classes": len(plan.class_names),
            "class_names": plan.class_names,
            "training_images": len(plan.train),
            "validation_images": len(plan.val),
        },
        "settings": _settings(plan),
        "notes": [*_notes(plan, coresets), *_about_teacher(teacher["accuracy"], ceiling)],
        "provenance": provenance(command, plan.device),
    }


def _settings(plan: Plan) -> dict[str, Any]:
    """The settings behind the result; None where an option plays no part."""
    student, expand = plan.student, plan.expand
    from_image = expand.start == "image"
    mixup = expand.mixup and from_image
    soft = student.targets == "soft"
    codec = plan.codec if soft and plan.labels != "online" else None
    return {
        **({"val_fraction": plan.val_fraction} if plan.val_fraction else {}),
        "recipe": plan.recipe.name,
        "about": plan.recipe.about,
        "ipc": plan.ipc,
        "dope": plan.dope,
        "factor": plan.factor,
        "patch_px": plan.patch_px,
        "image_size": plan.image_size,
        "model": plan.model and plan.model.name,
        "steps": expand.steps,
        "prompt": plan.prompt,
        "prompts": plan.own_prompts or None,
        **{
            method.name: method.options(plan) if method.name in plan.methods else None
            for method in METHODS.values()
            if method.options is not None
        },
        "rho": expand.rho if from_image else None,
        "mixup": mixup,
        "mixup_weight": expand.mixup_weight if mixup else None,
        "start": expand.start,
        "precision": expand.precision,
        "backend": expand.backend,
        "targets": student.targets,
        "labels": plan.labels if soft else None,
        "codec": codec and codec.name,
        **kept_by_option(codec),
        "student": student.network,
        "epochs": student.epochs,
        "batch": student.batch,
        "student_steps": student.epochs * -(-plan.samples // student.batch),
        "temperature": student.temperature,
        "cutmix": student.cutmix,
        "seed": plan.seed,
        "seeds": plan.seeds,
    }


def provenance(command: str, device: str) -> dict[str, Any]:
    """Who made something, where and with what; it never decides a content hash."""
    return {
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "world_size": read_launch().size,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _VERSIONS}},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _about_teacher(accuracy: float | None, ceiling: Sequence[float | None] | None) -> list[str]:
    """A note on a teacher that holds its students back."""
    if accuracy is None:
        return []
    said = f"The teacher names {accuracy:.1f} % of the validation images right"
    if ceiling is not None and ceiling[0] is not None and accuracy < ceiling[0]:
        return [f"{said}, fewer than the students of fresh real images: train it longer."]
    if accuracy < WEAK_TEACHER:
        return [f"{said}: most labels are wrong, so train it longer or give a better one."]
    return []


def _notes(plan: Plan, coresets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = [
        "One recipe and one number of student steps for all methods; accuracies are of the last "
        "epoch, never of the best."
    ]
    subset = FASTAI_SPLITS.get((len(plan.train), len(plan.val)))
    if subset is not None:
        notes.append(
            f"The split is fast.ai's of {subset}, which is not ImageNet's: most of its validation "
            "images are ImageNet's training images, and a network trained on ImageNet knows them."
        )
    for method, made in coresets.items():
        noted = METHODS[method].noted
        if noted is not None:
            notes.append(noted(plan, made))
    if plan.dope:
        notes.append(
            f"Every coreset was doped with {plan.dope} real images per class, and the ceiling "
            "has as many steps."
        )
    if plan.model is not None:
        seen = seen_classes(plan.model.folder) or ()
        known = sum(name in seen for name in plan.class_names)
        by_model = " and ".join(m for m in plan.methods if METHODS[m].model)
        if known:
            notes.append(
                f"{plan.model.name} was trained on images of {known} of these "
                f"{len(plan.class_names)} classes: part of the gain of {by_model} here may be "
                "what the model remembers of images that are not in the coreset."
            )
    return notes
