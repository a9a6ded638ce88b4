"""--skip-corrupt: images that cannot be decoded are found, named, counted and left out.

A run that stopped at such an image goes on without it, given --skip-corrupt: what it had begun is
begun anew, as it was of other images. What it had ended is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...engine.data.images import ImageSet, check_no_class_emptied, stream_center
from ..data.folder import images_sha256
from ..plan import Plan
from ..run.folder import RunError, RunFolder, StageResult
from ..run.progress import Report
from ..run.shared import SharedRun
from ..teacher.training import CHECKPOINT
from .checks import check_images_per_class


def leave_out_damaged(plan: Plan, run: SharedRun, report: Report) -> tuple[Plan, dict[str, int]]:
    """The plan without such images, and how many of each split were left out.

    Every file is decoded once, in a stage of its own: what comes after sees whole images only.
    Raises InputError when a class has none left, ValueError when it has too few, RunError for a
    teacher that was trained with images that are now left out.
    """

    def find() -> StageResult:
        return StageResult({s.split: _damaged(s, plan, report) for s in (plan.train, plan.val)})

    found = run.stage("data", {"--data": plan.data_sha256}, find)
    train, val = (_without(images, found[images.split]) for images in (plan.train, plan.val))
    check_images_per_class(train, plan.methods, ipc=plan.ipc, factor=plan.factor, doped=plan.dope)
    if any(found.values()) and run.own is not None:
        _begin_anew(plan, run.own, report, train)
    left = replace(plan, train=train, val=val, data_sha256=images_sha256(train, val))
    return left, {split: len(paths) for split, paths in found.items()}


def _begin_anew(plan: Plan, run: RunFolder, report: Report, train: ImageSet) -> None:
    """Forget what was begun of all images, of which some are damaged: it can never end.

    A teacher that was brought along has only been measured, and is measured again. The checkpoint
    of one that is trained here stays when `train`, what is left of the training images, is all.
    """
    checkpoint = [] if len(train) == len(plan.train) else [run.folder / "teacher" / CHECKPOINT]
    stages = (("teacher", plan.teacher_source is not None, checkpoint), ("coreset", False, []))
    for name, may_be_done, leftovers in stages:
        record = run.read(name)
        if record is None or record["config"]["--data"] != plan.data_sha256:
            continue
        if record["state"] == "done" and not may_be_done:
            raise RunError(
                f"the {name} stage of {run.folder} was run with images that --skip-corrupt leaves "
                "out: start again with --overwrite, or choose another --out"
            )
        run.forget(name, leftovers)
        report.say(f"{name}: begun anew, without the images that are left out")


def _damaged(images: ImageSet, plan: Plan, report: Report) -> list[str]:
    stream = stream_center(images, size_px=plan.image_size, device=plan.device, skip_corrupt=True)
    done = 0
    for batch in stream:
        done += len(batch.labels_B)
        report.progress(f"decode {images.split}", done, len(images), "images")
    paths = sorted(images.paths[index] for index in stream.skipped)
    for path in paths:
        report.say(f"skipped, it cannot be decoded: {images.root / path}")
    return paths


def _without(images: ImageSet, paths: list[str]) -> ImageSet:
    left_out = set(paths)
    kept = np.array([path not in left_out for path in images.paths])
    labels = images.labels[kept]
    check_no_class_emptied(images, labels)
    whole = tuple(path for path in images.paths if path not in left_out)
    return replace(images, paths=whole, labels=labels)
