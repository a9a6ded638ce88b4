"""Make a coreset of patches, by a rule of one's own or one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from patchbloom.coreset import Coreset
from patchbloom.engine.config import RECIPE_PX, usual_px
from patchbloom.engine.coreset.coreset import write_coreset
from patchbloom.engine.coreset.manifest import LEFTOVERS, MANIFEST, require_replaceable
from patchbloom.engine.data.images import ImageSet
from patchbloom.engine.data.names import display_names
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.engine.select.diversity import Diversity, Rule, rule_name
from patchbloom.engine.select.patches import PatchSelection, select_patches
from patchbloom.engine.select.scores import TeacherFn
from patchbloom.export.config import DeviceName
from patchbloom.export.models import find_model
from patchbloom.model import model_entry
from patchbloom.train.config import RECIPES, Choice, Recipe, usual_recipe
from patchbloom.train.coreset_options import DataOptions, check_names
from patchbloom.train.data.forms import open_data
from patchbloom.train.methods.patches import origins
from patchbloom.train.report.summary import provenance
from patchbloom.train.run.progress import Report
from patchbloom.train.teacher.given import load_teacher
from patchbloom.train.teacher.normalisation import IMAGENET
from patchbloom.train.teacher.teacher import Teacher, patch_teacher
from torch import nn


def select(
    data: str | Path,
    *,
    ipc: int,
    val_fraction: float | None = None,
    rule: Rule | Choice | None = None,
    teacher: nn.Module | str | None = None,
    out: str | Path = "coreset",
    model: str | None = "sdxl-tiny",
    size_px: int | None = None,
    factor: int | None = None,
    seed: int = 0,
    shapes_per_class: int = 1000,
    device: DeviceName = "auto",
    overwrite: bool = False,
) -> Coreset:
    """Choose ipc · factor² patches of each class of a data set, and write a coreset folder.

    data: any form of `train --data`: a folder with train/<class>/, "hf:NAME", shards, …, or
    "shapes", the generated set, with `shapes_per_class` training images per class. val_fraction: as
    --val-fraction; patches come from the other images.
    rule: a function (seen, losses, count) → indices of `count` candidates of one class, see
    engine.select.diversity.Rule; or a choice of `train --select`, which needs a teacher. Default:
    the lowest losses, without a teacher random patches. The manifest holds its name.
    teacher: a module for images of `size_px` px with ImageNet's normalisation or its own attribute
    `normalisation`, (mean, std), or a ready one as --teacher names it. model: what expands the
    patches; None: they are enlarged. size_px and factor: defaults as in `train`.

    Raises ValueError or OSError, one clear line, before any image is read where that can be.

    >>> def most_colourful(seen, losses, count):  # without a teacher it sees uint8 [C, H, W, 3]
    ...     return seen.std(axis=(1, 2, 3)).argsort()[::-1][:count]
    >>> core = patchbloom.select("data", ipc=1, rule=most_colourful, out="mine")
    >>> core.settings["selection"].endswith(":most_colourful")
    True
    """
    on, out = resolve_device(device), Path(out).expanduser()
    require_replaceable(out, overwrite, "a coreset", MANIFEST, "patchbloom.coreset/", LEFTOVERS)
    source = None if model is None else find_model(model)
    size_px = size_px or (RECIPE_PX if source is None else usual_px(source.trained_px()))
    recipe = RECIPES[usual_recipe(size_px)]
    factor = factor or recipe.factor_for(size_px)
    if size_px % factor:
        raise ValueError(f"factor {factor}: expected a divisor of the image size, {size_px} px")
    with Report() as report:
        where = DataOptions(val_fraction=val_fraction)
        (images,) = open_data(str(data), ("train",), report, where, shapes_per_class)
        ids, names, judge = images.class_ids, display_names(images.class_ids), None
        if teacher is not None:
            named = {"network": recipe.teacher.network, "size_px": size_px, "device": on}
            judge = load_teacher(teacher, ids, **named)
        kind = rule or ("lowest-loss" if judge else None)
        settings = {
            "method": "dace" if source else "upsample",
            **{"seed": seed, "image_size_px": size_px, "patch_px": size_px // factor},
            **{"factor": factor, "ipc": ipc},
            "selection": rule_name(kind) if callable(kind) else kind or "random",
            "crops": recipe.crops if judge else 1,
            "pool_per_class": recipe.pool_per_class if kind else None,
            "scoring": recipe.scoring if judge else None,
            **({"val_fraction": val_fraction} if val_fraction else {}),
        }
        chosen = _chosen(images, judge, kind, recipe, settings, on, report)
    written = write_coreset(
        out,
        patches_NHWC=chosen.patches_NHWC,
        class_ids=ids,
        class_names=names,
        settings=settings,
        model=None if model is None else model_entry(model, size_px=size_px, device=on),
        teacher=judge.describe() if judge else None,
        provenance={
            **provenance("patchbloom.select", on),
            "patches": origins(chosen, images.paths),
        },
        overwrite=overwrite,
    )
    return Coreset(written.folder, written.manifest)


def _chosen(
    images: ImageSet,
    judge: Teacher | None,
    kind: Rule | Choice | None,
    recipe: Recipe,
    settings: dict[str, Any],
    device: str,
    report: Report,
) -> PatchSelection:
    """The patches of all classes."""
    asked, diversity = _judged(judge, kind, recipe, settings["patch_px"])
    return select_patches(
        images,
        asked,
        per_class=settings["ipc"] * settings["factor"] ** 2,
        patch_px=settings["patch_px"],
        image_size_px=settings["image_size_px"],
        crops=recipe.crops,
        pool_per_class=recipe.pool_per_class,
        seed=settings["seed"],
        diversity=diversity,
        scoring=recipe.scoring,
        canvas_rgb=(judge.normalisation if judge else IMAGENET).rgb(),
        device=device,
        progress=lambda done, total: report.progress("patches", done, total, "images"),
    )


def _judged(
    judge: Teacher | None, kind: Rule | Choice | None, recipe: Recipe, patch_px: int
) -> tuple[TeacherFn | None, Diversity | None]:
    """The teacher's function and the choice among candidates; a rule sees the whole pool."""
    pool = recipe.pool_per_class
    if callable(kind):
        if judge is None:
            return None, Diversity(choice=kind, features=0, candidates=pool)
        return patch_teacher(judge, kind, recipe.scoring, patch_px, pool)
    if kind is None:
        return None, None
    check_names([kind], get_args(Choice), "rule")
    if judge is None:
        raise ValueError(f"rule {kind!r} needs a teacher: give one, or a rule that is a function")
    return patch_teacher(judge, kind, recipe.scoring, patch_px, Diversity.candidates)
