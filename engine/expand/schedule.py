"""SDXL-Turbo's noise schedule, and the evaluations that (steps, rho) selects.

The numbers come from diffusers' EulerAncestralDiscreteScheduler. As in its img2img pipeline, the
last int(S · rho) of S steps are run: S = 5, rho = 0.8 gives t = 799, 599, 399, 199. With sigma the
noise level of a step and sigma_to the next one (0 after the last):

    state    x = z + sigma · n,  model input x / sqrt(sigma² + 1)
    step     x ← x + eps · (sigma_down - sigma) + sigma_up · n
    sigma_up² = sigma_to² (sigma² - sigma_to²) / sigma²,  sigma_down² = sigma_to² - sigma_up²
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import EulerAncestralDiscreteScheduler

from ..config import Start


@dataclass(frozen=True)
class Schedule:
    """One value per evaluation, in order; Python floats of fp32 values."""

    start_sigma: float
    """The first state is z + start_sigma · n, with z = 0 when the start is noise."""
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    sigmas_down: tuple[float, ...]
    sigmas_up: tuple[float, ...]
    model_scales: tuple[float, ...]
    """1 / sqrt(sigma² + 1): turns a state into the model's input."""

    @property
    def evals(self) -> int:
        """UNet evaluations per image."""
        return len(self.timesteps)


def make_schedule(
    scheduler_config: Mapping[str, Any], *, steps: int, rho: float, start: Start = "image"
) -> Schedule:
    """Read the schedule of (steps, rho) from a model's `scheduler_config.json`.

    Start "noise" runs all steps and ignores rho. Raises ValueError for a rho that gives no
    evaluation; `find_model` has refused other schedulers.
    """
    evals = steps if start == "noise" else min(int(steps * rho), steps)
    if evals < 1:
        raise ValueError(
            f"rho {rho:g} of {steps} steps rounds to 0 evaluations: "
            f"rho must be at least {math.ceil(1e4 / steps) / 1e4:g}, "
            f"or the steps at least {math.ceil(1 / rho)}"
        )
    scheduler: Any = EulerAncestralDiscreteScheduler.from_config(dict(scheduler_config))
    scheduler.set_timesteps(steps)
    first = steps - evals
    sigma, sigma_to = scheduler.sigmas[first:-1], scheduler.sigmas[first + 1 :]
    sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
    sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
    start_sigma = scheduler.init_noise_sigma if start == "noise" else sigma[0]
    return Schedule(
        start_sigma=float(start_sigma),
        timesteps=tuple(scheduler.timesteps[first:].tolist()),
        sigmas=tuple(sigma.tolist()),
        sigmas_down=tuple(sigma_down.tolist()),
        sigmas_up=tuple(sigma_up.tolist()),
        model_scales=tuple(((sigma**2 + 1) ** -0.5).tolist()),
    )
