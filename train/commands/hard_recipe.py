"""The recipe of students that learn the classes of a coreset, without a teacher's labels.

The manifest of a coreset with soft labels holds the recipe of its own students, which applies to
hard targets too. Without labels the manifest gives the size and number of images, and a named
recipe the rest, filled in as `train --targets hard` does: the same options give the same students,
except for --refresh, which only labels record.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...engine.coreset.coreset import Coreset
from ...export.config import DeviceName
from ..batching import grouping
from ..config import RECIPES, Recipe, StudentConfig, usual_precision
from ..coreset_options import StudentElsewhere
from ..methods.stored import doped_samples
from ..run.progress import Report
from ..students.from_manifest import student_config
from .planning import SMALL_MODEL_PX


def hard_config(
    coreset: Coreset,
    options: StudentElsewhere,
    report: Report,
    *,
    device: DeviceName,
    **changes: Any,
) -> StudentConfig:
    """The recipe for hard targets with `changes`; None changes nothing.

    Raises ValueError for an option that contradicts the manifest; CoresetError for a manifest with
    labels but without a recipe.
    """
    if coreset.soft_labels() is None:
        config = _filled_in(coreset, options, report, device)
    else:
        _refuse_beside_a_recorded_recipe(coreset, options)
        config = student_config(coreset, device=device)
    changes = {name: value for name, value in changes.items() if value is not None}
    if "precision" in changes:
        config = config.at(changes.pop("precision"))
    if options.cutmix is not None:
        changes["cutmix"] = options.cutmix == "on"
    return replace(config, targets="hard", temperature=1.0, **changes)


def _refuse_beside_a_recorded_recipe(coreset: Coreset, options: StudentElsewhere) -> None:
    for option, value in (("--recipe", options.recipe), ("--factor", options.factor)):
        if value is not None:
            raise ValueError(
                f"{option} {value}: the manifest of {coreset.folder} holds the recipe of its "
                "students, and single options change it: leave it out"
            )


def _filled_in(
    coreset: Coreset, options: StudentElsewhere, report: Report, device: DeviceName
) -> StudentConfig:
    settings, classes = coreset.settings, len(coreset.class_ids)
    recipe = _recipe(options, settings["image_size_px"], report)
    factor = _factor(coreset, options, recipe)
    each = settings.get("samples_per_class", settings["ipc"] * settings["factor"] ** 2)
    ipc, rest = divmod(each, factor**2)
    if rest:
        raise ValueError(
            f"--factor {factor}: expected one whose square divides {each}, the images of a class "
            f"that students of {coreset.folder} see in an epoch: give the --factor of its run"
        )
    student = recipe.student_for(ipc=ipc, factor=factor, classes=classes, network=options.student)
    return replace(
        student.at(usual_precision(device)),
        size_px=settings["image_size_px"],
        group=grouping(classes, each + doped_samples(coreset), student) or 1,
        seed=settings["seed"],
        device=device,
    )


def _recipe(options: StudentElsewhere, size_px: int, report: Report) -> Recipe:
    """The requested recipe. Default: the one that `train` chooses at this size."""
    if options.recipe is not None:
        return RECIPES[options.recipe]
    recipe = RECIPES["small" if size_px <= SMALL_MODEL_PX else "dace"]
    report.say(f"recipe: {recipe.name} ({recipe.about})")
    return recipe


def _factor(coreset: Coreset, options: StudentElsewhere, recipe: Recipe) -> int:
    """r: the manifest's for patches; for views of whole images, the option's or the recipe's."""
    settings = coreset.settings
    if "samples_per_class" in settings:
        return options.factor or recipe.factor_for(settings["image_size_px"])
    if options.factor not in (None, settings["factor"]):
        raise ValueError(
            f"--factor {options.factor}: the patches of {coreset.folder} have factor "
            f"{settings['factor']}: leave it out"
        )
    return settings["factor"]
