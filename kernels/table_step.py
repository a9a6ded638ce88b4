"""``sampler.py``'s Euler-ancestral step, bit-identical, for CUDA graphs.

Formula: sampler.py's, with (sigma_down - sigma, sigma_up, next_scale) = table[step].

A CUDA graph freezes host scalars. When each step has its own launch in the graph, the sigmas and
the step may freeze: replays repeat the schedule. The epoch may not: a replay would repeat the
captured epoch's noise. When one captured evaluation (network and step) is replayed for every step,
or one graph serves several schedules, only the seed may freeze. So ``euler_ancestral_table_step``
reads all the others on the device: sigmas from a table [S, 3], step and epoch from one-element
tensors. The seed stays a scalar: a run has one.

Bytes: sampler.py's, plus 28 per program for table, step and epoch. Eager torch moves 595 per
element instead of 12 (s = 2).

Shapes: B samples; C, H, W of one latent; S steps.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch, require, runs_kernel
from .noise import Draw, kernel_words, normal_reference, require_words, signed
from .sampler import GROUPS_PER_PROGRAM, require_step, step_block, step_grid

ANCESTRAL = tl.constexpr(int(Draw.ANCESTRAL))


def euler_ancestral_table_step_reference(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    table_S3: torch.Tensor,
    step_1: torch.Tensor,
    epoch_1: torch.Tensor,
    *,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``euler_ancestral_step_reference`` for row ``step_1`` of the table, bit-identical."""
    slope, sigma_up, next_scale = table_S3[step_1][0].unbind()
    state = state_BCHW + eps_BCHW.float() * slope
    draw_11, epoch_11 = Draw.ANCESTRAL + step_1[:, None], epoch_1[:, None]
    noise = normal_reference(seed, draw_11, samples_B, epoch_11, state_BCHW.shape[1:])
    state = torch.where(sigma_up == 0.0, state, state + sigma_up * noise)
    return state, state * next_scale


@triton.jit(do_not_specialize=["seed_lo", "seed_hi"])
def euler_ancestral_table_step_kernel(
    next_state_ptr,
    next_input_ptr,
    state_ptr,
    eps_ptr,
    samples_ptr,
    table_ptr,
    step_ptr,
    epoch_ptr,
    numel,
    seed_lo,
    seed_hi,
    GROUPS: tl.constexpr,
):
    """``step_block`` with device scalars."""
    step = tl.load(step_ptr)
    epoch = tl.load(epoch_ptr)
    slope = tl.load(table_ptr + step * 3)
    sigma_up = tl.load(table_ptr + step * 3 + 1)
    next_scale = tl.load(table_ptr + step * 3 + 2)
    step_block(
        next_state_ptr, next_input_ptr, state_ptr, eps_ptr, samples_ptr, numel,
        slope, sigma_up, next_scale, step + ANCESTRAL, epoch, seed_lo, seed_hi, GROUPS,
    )  # fmt: skip


def step_table(
    sigmas: Sequence[float],
    sigmas_down: Sequence[float],
    sigmas_up: Sequence[float],
    next_scales: Sequence[float],
    *,
    device: torch.device | str,
) -> torch.Tensor:
    """A schedule for ``euler_ancestral_table_step``: fp32 [S, 3], sigma_down - sigma first.

    The difference is computed in double, then rounded, like ``euler_ancestral_step``'s scalar.
    Raises ValueError when the sequences differ in length.
    """
    slopes = [down - sigma for sigma, down in zip(sigmas, sigmas_down, strict=True)]
    rows = list(zip(slopes, sigmas_up, next_scales, strict=True))
    return torch.tensor(rows, dtype=torch.float32, device=device)


@torch.library.custom_op(
    "patchbloom::euler_ancestral_table_step_into", mutates_args={"next_state", "next_input"}
)
def euler_ancestral_table_step_into(
    next_state: torch.Tensor,
    next_input: torch.Tensor,
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    table_S3: torch.Tensor,
    step_1: torch.Tensor,
    epoch_1: torch.Tensor,
    seed: int,
) -> None:
    """``euler_ancestral_table_step`` after its checks."""
    inputs = state_BCHW, eps_BCHW, samples_B, table_S3, step_1, epoch_1
    if not runs_kernel(state_BCHW):
        results = euler_ancestral_table_step_reference(*inputs, seed=seed)
        next_state.copy_(results[0])
        next_input.copy_(results[1])
        return
    _, _, *words = kernel_words(seed, 0, 0)
    numel = math.prod(state_BCHW.shape[1:])
    kernel, constants = euler_ancestral_table_step_kernel, {"GROUPS": GROUPS_PER_PROGRAM}
    launch(
        kernel, step_grid(state_BCHW), next_state, next_input, *inputs, numel, *words, **constants
    )


def euler_ancestral_table_step(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    table_S3: torch.Tensor,
    step_1: torch.Tensor,
    epoch_1: torch.Tensor,
    *,
    seed: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``euler_ancestral_step``, bit-identical, for a step that only the device knows.

    ``table_S3`` comes from ``step_table``; ``step_1`` and ``epoch_1`` are int64 [1] on the same
    device, in [0, S) and [0, 2^32) (not checked: that would need a sync). A graph of all steps
    gives launch k the slice [k : k + 1] of an arange; a graph of one step adds 1 to ``step_1``. No
    gradient flows. All else is as in ``euler_ancestral_step``.
    """
    require_step(state_BCHW, eps_BCHW, samples_B, out)
    if out is None:
        out = torch.empty_like(state_BCHW), torch.empty_like(eps_BCHW)
    require("table_S3", table_S3, dtype=torch.float32, shape=("S", 3), like=state_BCHW)
    require("step_1", step_1, dtype=torch.int64, shape=(1,), like=state_BCHW)
    require("epoch_1", epoch_1, dtype=torch.int64, shape=(1,), like=state_BCHW)
    require_words(seed, 0, 0)
    inputs = state_BCHW, eps_BCHW, samples_B, table_S3, step_1, epoch_1
    euler_ancestral_table_step_into(*out, *inputs, signed(seed, 64))
    return out
