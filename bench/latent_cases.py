"""Cases on latents: noise, first state and sampler steps of a batch.

Byte formulas: kernels/noise.py, latents.py, sampler.py and table_step.py. Names give
samples x channels x rows x columns. Model inputs and eps have ``model_dtype``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_case import Case, model_dtype
from patchbloom.engine.expand.schedule import make_schedule
from patchbloom.kernels.latents import start_state, start_state_reference
from patchbloom.kernels.noise import Draw, normal, normal_reference
from patchbloom.kernels.sampler import euler_ancestral_step, euler_ancestral_step_reference
from patchbloom.kernels.table_step import (
    euler_ancestral_table_step,
    euler_ancestral_table_step_reference,
    step_table,
)
from torch import Tensor

SEED, EPOCH = 1, 2
SCHEDULER = Path(__file__).parents[1] / "export/sdxl_turbo/scheduler/scheduler_config.json"
SCHEDULE = make_schedule(json.loads(SCHEDULER.read_text()), steps=5, rho=0.8)
START: dict[str, Any] = {
    "seed": SEED, "epoch": EPOCH, "sigma": SCHEDULE.start_sigma, "mixup": True,
    "model_scale": SCHEDULE.model_scales[0],
}  # fmt: skip
STEP: dict[str, Any] = {
    "sigma": 4.0, "sigma_down": 2.0, "sigma_up": 1.5, "next_scale": 0.4,
    "seed": SEED, "step": 1, "epoch": EPOCH,
}  # fmt: skip
START_TOLERANCE, STEP_TOLERANCE = 5e-3, 2e-2
"""More than half an fp16 ulp of the largest values: model inputs are below 8, states below 64."""


@dataclass(frozen=True)
class Latents:
    """The tensors that the operations read."""

    bank: Tensor
    eps: Tensor
    rows: Tensor
    classes: tuple[Tensor, Tensor]
    """First row and number of rows of each sample's class; eight rows per class."""
    table: Tensor
    steps: Tensor
    epoch: Tensor


def random_latents(device: str, batch: int, side: int) -> Latents:
    """Random inputs for ``batch`` latents [4, side, side]."""
    rows = torch.arange(batch, device=device)
    bank, eps = torch.randn(2, batch, 4, side, side, device=device)
    next_scales = *SCHEDULE.model_scales[1:], 1.0
    columns = SCHEDULE.sigmas, SCHEDULE.sigmas_down, SCHEDULE.sigmas_up, next_scales
    return Latents(
        bank,
        eps.to(model_dtype(device)),
        rows,
        (rows // 8 * 8, torch.full_like(rows, 8)),
        step_table(*columns, device=device),
        torch.arange(SCHEDULE.evals, device=device),
        torch.full((1,), EPOCH, device=device),
    )


def noise_case(device: str, batch: int, shape: tuple[int, ...], *, compiled: bool) -> Case:
    """fp32 normals [batch, *shape]."""
    rows = torch.arange(batch, device=device)
    count = batch * math.prod(shape)
    return Case(
        name=f"noise {' x '.join(map(str, (batch, *shape)))}",
        kernel=lambda: normal(SEED, Draw.START, rows, EPOCH, shape),
        reference=lambda: normal_reference(SEED, Draw.START, rows, EPOCH, shape),
        moved_bytes=4 * count,
        tolerance=1e-5,
        normals=count,
        latent_sized=count < 2**21,
        compiled=compiled,
    )


def latent_cases(device: str, batch: int, side: int, *, compiled: bool) -> list[Case]:
    """Noise, first state, and the sampler step with sigmas from the host and from the device."""
    half = model_dtype(device)
    given = random_latents(device, batch, side)
    bank, eps, rows = given.bank, given.eps, given.rows
    named = given.table, given.steps[1:2], given.epoch
    numel, s = bank.numel(), half.itemsize
    where = f"{batch} x 4 x {side} x {side}"
    sized: dict[str, Any] = {"latent_sized": True, "compiled": compiled}
    return [
        noise_case(device, batch, (4, side, side), compiled=compiled),
        Case(
            name=f"start_state {where}",
            kernel=lambda: start_state(bank, rows, rows, *given.classes, **START, dtype=half),
            reference=lambda: start_state_reference(bank, rows, rows, *given.classes, **START),
            moved_bytes=(2 * 4 + 4 + s) * numel,
            tolerance=START_TOLERANCE,
            **sized,
        ),
        Case(
            name=f"euler_ancestral_step {where}",
            kernel=lambda: euler_ancestral_step(bank, eps, rows, **STEP),
            reference=lambda: euler_ancestral_step_reference(bank, eps, rows, **STEP),
            moved_bytes=(4 + s + 4 + s) * numel,
            tolerance=STEP_TOLERANCE,
            **sized,
        ),
        Case(
            name=f"euler_ancestral_table_step {where}",
            kernel=lambda: euler_ancestral_table_step(bank, eps, rows, *named, seed=SEED),
            reference=lambda: euler_ancestral_table_step_reference(
                bank, eps, rows, *named, seed=SEED
            ),
            moved_bytes=(4 + s + 4 + s) * numel,
            tolerance=STEP_TOLERANCE,
            **sized,
        ),
    ]
