"""--skip-corrupt: images that cannot be decoded are found, named, counted and left out.

A run that was begun with them cannot go on without them, and is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...engine.data.images import ImageSet, check_no_class_emptied, stream_center
from ..data.folder import images_sha256
from ..plan import Plan
from ..run.folder import RunError, RunFolder, StageResult
from ..run.progress import Report
from .checks import check_images_per_class


def leave_out_damaged(plan: Plan, run: RunFolder, report: Report) -> tuple[Plan, dict[str, int]]:
    """The plan without such images, and how many of each split were left out.

    Every file is decoded once, in a stage of its own: what comes after sees whole images only.
    Raises InputError when a class has none left, ValueError when it has too few, RunError for a
    run that was begun with images that are now left out.
    """

    def find() -> StageResult:
        return StageResult({s.split: _damaged(s, plan, report) for s in (plan.train, plan.val)})

    found = run.stage("data", {"--data": plan.data_sha256}, find)
    train, val = (_without(images, found[images.split]) for images in (plan.train, plan.val))
    check_images_per_class(train, plan.methods, ipc=plan.ipc, factor=plan.factor, doped=plan.dope)
    if any(found.values()):
        _refuse_stages_of_all(plan, run)
    left = replace(plan, train=train, val=val, data_sha256=images_sha256(train, val))
    return left, {split: len(paths) for split, paths in found.items()}


def _refuse_stages_of_all(plan: Plan, run: RunFolder) -> None:
    for name in ("teacher", "coreset"):
        record = run.read(name)
        if record is not None and record["config"]["--data"] == plan.data_sha256:
            raise RunError(
                f"the {name} stage of {run.folder} was run with images that --skip-corrupt leaves "
                "out: start again with --overwrite, or choose another --out"
            )


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
