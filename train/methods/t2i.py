"""Method t2i: images generated once from a prompt (t2i_coreset.py), and their variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..batching import fitting_batch
from ..run.settings import settings_by_option
from .method import Method, later

if TYPE_CHECKING:
    from ..plan import Plan

MOST_STEPS = 4


def _check(options: Any) -> None:
    if (options.steps or T2I.steps) > MOST_STEPS:
        raise ValueError(
            f"--steps {options.steps}: expected {MOST_STEPS} at most for t2i: leave it out "
            "for 1, or give the methods runs of their own"
        )


def _use(options: Any, trained_px: int, classes: int) -> dict[str, Any]:
    return {
        "size_px": options.generate_size or trained_px,
        "batch": options.engine_batch or fitting_batch(classes),
        "images_per_prompt": 1,
    }


def round_settings(plan: Plan) -> dict[str, Any]:
    """Settings that decide the images of a round."""
    shared = {"--seed": plan.seed, "--image-size": plan.image_size}
    return {**shared, "classes": list(plan.class_names), **_generator_settings(plan)}


def _settings(plan: Plan) -> dict[str, Any]:
    """Settings that decide which images are generated, and how many, for the stage's config."""
    kept = {"--budget-seconds": plan.budget_seconds, "--variants": plan.variants}
    return {**kept, **_generator_settings(plan)}


def _generator_settings(plan: Plan) -> dict[str, Any]:
    return settings_by_option("t2i", plan.describe_generator("t2i"))


def _options(plan: Plan) -> dict[str, Any]:
    use = plan.use["t2i"]
    return {
        "steps": use.steps,
        "generate_size": use.size_px,
        "variants": plan.variants,
        "budget_seconds": plan.budget_seconds,
    }


def _announced(plan: Plan) -> str:
    use = plan.use["t2i"]
    count = plan.generated or f"as many as fit into {plan.budget_seconds:g} s"
    shown = f", each with {plan.variants} variants" if plan.variants else ""
    return (
        f"t2i: images per class: {count}, made at {use.size_px} px in {use.steps} "
        f"step(s), kept at {plan.image_size} px{shown}"
    )


def _noted(plan: Plan, made: Mapping[str, Any]) -> str:
    count, variants = made["generated"], plan.variants
    return (
        f"t2i: {count} generated images per class, each with {variants} variants: "
        f"IPC {count * (1 + variants)}. {plan.use['t2i'].steps} evaluation(s) made "
        f"each of them, once, at {made['images_per_s']:.1f} images/s; its epochs take none."
    )


T2I = Method(
    name="t2i",
    model="made",
    steps=1,
    sized_by="--generate-size",
    check=_check,
    use=_use,
    settings=_settings,
    make=later("t2i_coreset.make_generated"),
    open=later("whole_images.open_stored"),
    options=_options,
    announced=_announced,
    noted=_noted,
)
