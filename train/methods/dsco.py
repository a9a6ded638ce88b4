"""Method dsco: images made once, from optimised noise (dsco_coreset.py)."""

from __future__ import annotations

from dataclasses import asdict
from math import gcd
from typing import TYPE_CHECKING, Any

from ..batching import whole_class_batch
from ..run.settings import settings_by_option
from .method import Method, later

if TYPE_CHECKING:
    from ..plan import Plan


def _check(options: Any) -> None:
    if (options.steps or DSCO.steps) < 2:
        raise ValueError(
            f"--steps {options.steps}: expected 2 or more for dsco, which optimises the noise of "
            "every step but the last"
        )


def _use(options: Any, trained_px: int, classes: int) -> dict[str, Any]:
    batch = options.engine_batch or whole_class_batch(options.ipc, classes)
    return {"size_px": trained_px, "batch": batch, "images_per_prompt": gcd(batch, options.ipc)}


def dsco_settings(plan: Plan) -> dict[str, Any]:
    """Settings that decide the images, by option, for a stage's config: plain JSON."""
    options = {
        f"--dsco.{name.replace('_', '-')}": value for name, value in asdict(plan.dsco).items()
    }
    shared = {"--ipc": plan.ipc, "--seed": plan.seed, "--data": plan.data_sha256}
    return {**options, **shared, **settings_by_option("dsco", plan.describe_generator("dsco"))}


DSCO = Method(
    name="dsco",
    model="made",
    steps=5,
    check=_check,
    use=_use,
    settings=dsco_settings,
    make=later("dsco_coreset.optimise_images"),
    open=later("whole_images.open_stored"),
    options=lambda plan: asdict(plan.dsco),
)
