"""Method dsco: images made once, whose noise is optimised (optimised.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..batching import class_batch
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
    return {
        "size_px": trained_px,
        "batch": options.engine_batch or class_batch(classes, options.ipc),
        "images_per_prompt": None,
    }


def _options(plan: Plan) -> dict[str, Any]:
    return asdict(plan.dsco)


DSCO = Method(
    name="dsco",
    model="made",
    steps=5,
    check=_check,
    use=_use,
    settings=later("optimised.dsco_settings"),
    make=later("optimised.optimise_images"),
    open=later("stored.open_stored"),
    options=_options,
)
