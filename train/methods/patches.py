"""Coresets of patches, chosen once: methods dace, rded, random and upsample.

The kind of choice is `random`, without a teacher, or a value of --select; methods of one kind share
its patches.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

from ...engine.select.diversity import DiverseChoice
from ...engine.select.patches import PatchSelection, select_patches
from ..plan import Plan
from ..plugins import is_function, load_function
from ..teacher.normalisation import IMAGENET
from ..teacher.teacher import patch_teacher
from .method import Made, Making


def make_random(making: Making, _: Path) -> Made:
    """Random patches, without a teacher."""
    return _made(making, "random")


def make_scored(making: Making, _: Path) -> Made:
    """Patches that --select chooses. Raises the errors of patch_teacher and select_patches."""
    return _made(making, making.plan.select)


def make_expanded(making: Making, _: Path) -> Made:
    """The patches of `make_scored`, for the model to expand."""
    return _made(making, making.plan.select, model=making.plan.describe_model("dace"))


def _made(making: Making, kind: str, model: dict[str, Any] | None = None) -> Made:
    """A coreset of patches of this kind, which are selected once per run."""
    if kind not in making.selections:
        making.selections[kind] = _select(making, kind)
    plan, selection = making.plan, making.selections[kind]
    scored, diverse = kind != "random", kind in get_args(DiverseChoice)
    return Made(
        images_NHWC=selection.patches_NHWC,
        settings={
            "factor": plan.factor,
            "patch_px": plan.patch_px,
            "ipc": plan.ipc,
            "selection": kind,
            "crops": plan.recipe.crops if scored else 1,
            "pool_per_class": plan.recipe.pool_per_class if scored else None,
            "scoring": plan.scoring if scored else None,
            **({"candidates": plan.candidates} if diverse else {}),
        },
        model=model,
        provenance={
            "patches": origins(selection, plan.train.paths),
            "skipped_images": list(plan.damaged),
        },
    )


def _select(making: Making, kind: str) -> PatchSelection:
    """Choose the patches of every class; ranks share the scoring."""
    plan, world, report = making.plan, making.world, making.report
    teacher = None if kind == "random" else making.teacher()
    asked, diversity = None, None
    if teacher is not None:
        rule: Any = kind
        candidates = plan.candidates
        if is_function(kind):  # sees the best crop of every image in the pool
            rule, candidates = load_function(kind), plan.recipe.pool_per_class
        asked, diversity = patch_teacher(teacher, rule, plan.scoring, plan.patch_px, candidates)
    return select_patches(
        plan.train,
        asked,
        per_class=plan.samples_per_class,
        patch_px=plan.patch_px,
        image_size_px=plan.image_size,
        crops=plan.recipe.crops,
        pool_per_class=plan.recipe.pool_per_class,
        seed=plan.seed,
        diversity=diversity,
        scoring=plan.scoring,
        device=plan.device,
        threads=world.threads,
        peers=world,
        progress=lambda done, total: report.progress(f"patches, {kind}", done, total, "images"),
        canvas_rgb=(IMAGENET if teacher is None else teacher.normalisation).rgb(),
    )


def selection_settings(plan: Plan) -> dict[str, Any]:
    """Settings that decide which patches are chosen, by option, for the stage's config."""
    return {
        "--seed": plan.seed,
        "--ipc": plan.ipc,
        "--factor": plan.factor,
        "--image-size": plan.image_size,
        "--crops": plan.recipe.crops,
        "--pool-per-class": plan.recipe.pool_per_class,
        "--scoring": plan.scoring,
        "--select": plan.select,
        "--candidates": plan.candidates,
    }


def origins(selection: PatchSelection, paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """Per patch, in sample order: its image, its box, and the teacher's loss."""
    rows = zip(
        selection.source_index_N.tolist(),
        selection.boxes_N4.tolist(),
        selection.losses_N.tolist(),
        strict=True,
    )
    return [
        {
            "image": paths[index],
            "top_left_height_width": box,
            "loss": None if math.isnan(loss) else round(loss, 6),
        }
        for index, box, loss in rows
    ]
