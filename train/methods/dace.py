"""Method dace: patches that the teacher chose, expanded by the diffusion model in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..run.settings import settings_by_option
from .method import Method, later

if TYPE_CHECKING:
    from ..plan import Plan


def _check(options: Any) -> None:
    steps = options.steps or DACE.steps
    if options.start == "image" and int(steps * options.rho) < 1:
        raise ValueError(
            f"--rho {options.rho:g} of --steps {steps} rounds to 0 evaluations: "
            f"give --rho {1 / steps:g} or more, or more --steps"
        )


def _settings(plan: Plan) -> dict[str, Any]:
    return settings_by_option("model", plan.describe_model("dace"))


def _rendering(plan: Plan) -> dict[str, Any]:
    return {"--refresh": plan.refresh, **_settings(plan)}


DACE = Method(
    name="dace",
    takes="patches",
    model="rendered",
    steps=5,
    sized_by="--image-size",
    check=_check,
    settings=_settings,
    rendering=_rendering,
    make=later("patches.make_expanded"),
    open=later("source.open_expansions"),
)
