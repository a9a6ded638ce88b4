"""Method dsco: images made once, whose noise is optimised (optimised.py)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batching import class_batch
from .method import Machine, Made, Making, Method

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...engine.coreset.coreset import Coreset
    from ..plan import Plan
    from .stored import StoredImages


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


def _settings(plan: Plan) -> dict[str, Any]:
    from .optimised import dsco_settings

    return dsco_settings(plan)


def _make(making: Making, parts: Path) -> Made:
    from .optimised import optimise_images

    return optimise_images(making.plan, parts, making.world, making.report)


def _open(coreset: Coreset, machine: Machine) -> AbstractContextManager[StoredImages]:
    from .stored import open_stored

    return open_stored(coreset, machine)


def _options(plan: Plan) -> dict[str, Any]:
    return asdict(plan.dsco)


DSCO = Method(
    name="dsco",
    model="made",
    steps=5,
    check=_check,
    use=_use,
    settings=_settings,
    make=_make,
    open=_open,
    options=_options,
)
