"""Patches of the data, chosen once: the coresets of dace, rded, random and upsample.

A kind of choice is `random`, without a teacher, or one of --select; methods of one kind share it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, write_coreset
from ...engine.select.patches import PatchSelection, select_patches
from ..plan import Plan
from ..run.progress import Report
from ..run.world import World
from ..teacher.normalisation import IMAGENET
from ..teacher.patch_teacher import patch_teacher
from ..teacher.teacher import Teacher
from .open import describe_model


def select(
    plan: Plan, kind: str, teacher: Teacher | None, world: World, report: Report
) -> PatchSelection:
    """Choose the patches of every class; all ranks of `world` call it and share the scoring.

    `teacher` is None for the kind `random` alone. Raises as patch_teacher and select_patches do.
    """
    asked, diversity = None, None
    if teacher is not None:
        asked, diversity = patch_teacher(
            teacher, plan.select, plan.scoring, plan.patch_px, plan.candidates
        )
    return select_patches(
        plan.train,
        asked,
        ipc=plan.ipc,
        factor=plan.factor,
        image_size_px=plan.image_size,
        crops=plan.recipe.crops,
        pool_per_class=plan.recipe.pool_per_class,
        seed=plan.seed,
        method="random" if kind == "random" else "lowest-loss",
        diversity=diversity,
        scoring=plan.scoring,
        device=plan.device,
        threads=world.threads,
        peers=world,
        progress=lambda done, total: report.progress(f"patches, {kind}", done, total, "images"),
        canvas_rgb=(IMAGENET if teacher is None else teacher.normalisation).rgb(),
    )


def selection_settings(plan: Plan) -> dict[str, Any]:
    """All that decides which patches are chosen, for the stage's config: plain JSON, by option."""
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


def write_selected(
    plan: Plan,
    method: str,
    kind: str,
    selection: PatchSelection,
    folder: Path,
    *,
    teacher: dict[str, Any],
    provenance: dict[str, Any],
) -> Coreset:
    """Write the coreset of a method of this kind, in place of what a killed run left."""
    scored, diverse = kind != "random", kind not in ("random", "lowest-loss")
    return write_coreset(
        folder,
        patches_NHWC=selection.patches_NHWC,
        labels_N=selection.labels_N,
        class_ids=plan.train.class_ids,
        class_names=plan.class_names,
        settings={
            "method": method,
            "seed": plan.seed,
            "image_size_px": plan.image_size,
            "factor": plan.factor,
            "patch_px": plan.patch_px,
            "ipc": plan.ipc,
            "data_sha256": plan.data_sha256,
            "selection": kind,
            "crops": plan.recipe.crops if scored else 1,
            "pool_per_class": plan.recipe.pool_per_class if scored else None,
            "scoring": plan.scoring if scored else None,
            **({"candidates": plan.candidates} if diverse else {}),
        },
        model=describe_model(plan, plan.expand) if method == "dace" else None,
        teacher=teacher,
        provenance={
            **provenance,
            "patches": _origins(selection, plan.train.paths),
            "skipped_images": list(selection.skipped),
        },
        overwrite=True,
    )


def _origins(selection: PatchSelection, paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of every patch, in sample order: its image, where it was cut, and the teacher's loss."""
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
