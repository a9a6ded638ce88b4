"""Method dace: the diffusion model's expansion of the teacher's choice of patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .method import Machine, Made, Making, Method
from .upsample import takes_patches

if TYPE_CHECKING:
    from ...engine.coreset.coreset import Coreset
    from ..plan import Plan
    from .source import Expansions


def _check(options: Any) -> None:
    steps = options.steps or DACE.steps
    if options.start == "image" and int(steps * options.rho) < 1:
        raise ValueError(
            f"--rho {options.rho:g} of --steps {steps} rounds to 0 evaluations: "
            f"give --rho {1 / steps:g} or more, or more --steps"
        )


def _settings(plan: Plan) -> dict[str, Any]:
    from ..run.folder import settings_by_option

    return settings_by_option("model", plan.describe_model("dace"))


def _rendering(plan: Plan) -> dict[str, Any]:
    return {"--refresh": plan.refresh, **_settings(plan)}


def _make(making: Making, _: Path) -> Made:
    from .patches import chosen

    return chosen(making, making.plan.select, model=making.plan.describe_model("dace"))


@contextmanager
def _open(coreset: Coreset, machine: Machine) -> Iterator[Expansions]:
    from ...engine.expand.naming import prompts_of
    from .source import Expansions, open_expander

    if machine.expand is None:
        raise ValueError("method dace: expected how to use its model, got nothing")
    with open_expander(
        machine.model,
        machine.expand,
        machine.world,
        patches_NHWC=coreset.patches(),
        labels_N=coreset.labels_N,
        prompts_K=prompts_of(coreset),
    ) as expander:
        yield Expansions(expander=expander, labels_N=coreset.labels_N, class_ids=coreset.class_ids)


DACE = Method(
    name="dace",
    takes=takes_patches,
    model="rendered",
    steps=5,
    sized_by="--image-size",
    check=_check,
    settings=_settings,
    rendering=_rendering,
    make=_make,
    open=_open,
)
