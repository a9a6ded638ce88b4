"""One Euler-ancestral step and the scaling for the next network call.

Formula (Karras et al. 2022; k-diffusion's ``sample_euler_ancestral``; diffusers'
``EulerAncestralDiscreteScheduler``), for a network that predicts eps:

    state = state + eps * (sigma_down - sigma) + sigma_up * n          n: Draw.ANCESTRAL + step
    input = state * next_scale,                 next_scale = 1 / sqrt(next sigma^2 + 1)

With sigma_up == 0, as in the last step of a full schedule, no noise is drawn.

Bytes per element, with s-byte eps and model input: 4 + s read, 4 + s written, plus 8 per sample.
Eager torch moves 583 instead of 12 (s = 2), mostly for the noise.

``table_step.py`` takes the same step, but reads the sigmas, step and epoch on the device.

Shapes: B samples; C, H, W of one latent.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import FLOATS, launch, require, runs_kernel
from .noise import Draw, kernel_words, normal_block, normal_reference, require_words, signed

GROUPS_PER_PROGRAM = 128
"""512 elements: a 4 x 16 x 16 latent is two programs."""


def euler_ancestral_step_reference(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    *,
    sigma: float,
    sigma_down: float,
    sigma_up: float,
    next_scale: float,
    seed: int,
    step: int,
    epoch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(next state, next model input), both fp32 [B, C, H, W], in plain torch."""
    state = state_BCHW + eps_BCHW.float() * (sigma_down - sigma)
    if sigma_up != 0.0:
        draw = Draw.ANCESTRAL + step
        noise = normal_reference(seed, draw, samples_B, epoch, state_BCHW.shape[1:])
        state = state + sigma_up * noise
    return state, state * next_scale


@triton.jit
def step_block(
    next_state_ptr,
    next_input_ptr,
    state_ptr,
    eps_ptr,
    samples_ptr,
    numel,
    slope,
    sigma_up,
    next_scale,
    draw,
    epoch,
    seed_lo,
    seed_hi,
    GROUPS: tl.constexpr,
):
    """Program (sample, block) steps 4 GROUPS elements; next_state may be state itself."""
    index = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    element = first_group * 4 + tl.arange(0, 4 * GROUPS)
    inside = element < numel
    offset = index.to(tl.int64) * numel + element
    state = tl.load(state_ptr + offset, mask=inside)
    eps = tl.load(eps_ptr + offset, mask=inside).to(tl.float32)
    state += eps * slope
    if sigma_up != 0.0:
        sample = tl.load(samples_ptr + index)
        group = first_group + tl.arange(0, GROUPS)
        state += sigma_up * normal_block(group, draw, sample, epoch, seed_lo, seed_hi)
    tl.store(next_state_ptr + offset, state, mask=inside)
    model_input = (state * next_scale).to(next_input_ptr.dtype.element_ty)
    tl.store(next_input_ptr + offset, model_input, mask=inside)


@triton.jit(do_not_specialize=["draw", "epoch", "seed_lo", "seed_hi"])
def euler_ancestral_step_kernel(
    next_state_ptr,
    next_input_ptr,
    state_ptr,
    eps_ptr,
    samples_ptr,
    numel,
    slope,
    sigma_up,
    next_scale,
    draw,
    epoch,
    seed_lo,
    seed_hi,
    GROUPS: tl.constexpr,
):
    """``step_block`` with host scalars."""
    step_block(
        next_state_ptr, next_input_ptr, state_ptr, eps_ptr, samples_ptr, numel,
        slope, sigma_up, next_scale, draw, epoch, seed_lo, seed_hi, GROUPS,
    )  # fmt: skip


def require_step(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Raise TypeError or ValueError unless the tensors fit a step (scalar or table)."""
    require("state_BCHW", state_BCHW, dtype=torch.float32, shape=("B", "C", "H", "W"))
    sizes = state_BCHW.shape
    require("eps_BCHW", eps_BCHW, dtype=FLOATS, shape=sizes, like=state_BCHW)
    require("samples_B", samples_B, dtype=torch.int64, shape=sizes[:1], like=state_BCHW)
    if out is not None:
        require("out[0]", out[0], dtype=torch.float32, shape=sizes, like=state_BCHW)
        require("out[1]", out[1], dtype=FLOATS, shape=sizes, like=state_BCHW)


def step_grid(state_BCHW: torch.Tensor) -> tuple[int, int]:
    """Grid of ``step_block``: (samples, blocks per sample)."""
    return len(state_BCHW), triton.cdiv(math.prod(state_BCHW.shape[1:]), 4 * GROUPS_PER_PROGRAM)


@torch.library.custom_op(
    "patchbloom::euler_ancestral_step_into", mutates_args={"next_state", "next_input"}
)
def euler_ancestral_step_into(
    next_state: torch.Tensor,
    next_input: torch.Tensor,
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    sigma: float,
    sigma_down: float,
    sigma_up: float,
    next_scale: float,
    seed: int,
    step: int,
    epoch: int,
) -> None:
    """``euler_ancestral_step`` after its checks."""
    if not runs_kernel(state_BCHW):
        results = euler_ancestral_step_reference(
            state_BCHW,
            eps_BCHW,
            samples_B,
            sigma=sigma,
            sigma_down=sigma_down,
            sigma_up=sigma_up,
            next_scale=next_scale,
            seed=seed,
            step=step,
            epoch=epoch,
        )
        next_state.copy_(results[0])
        next_input.copy_(results[1])
        return
    launch(
        euler_ancestral_step_kernel,
        step_grid(state_BCHW),
        next_state,
        next_input,
        state_BCHW,
        eps_BCHW,
        samples_B,
        math.prod(state_BCHW.shape[1:]),
        sigma_down - sigma,
        sigma_up,
        next_scale,
        *kernel_words(seed, Draw.ANCESTRAL + step, epoch),
        GROUPS=GROUPS_PER_PROGRAM,
    )


@torch.library.custom_op("patchbloom::euler_ancestral_step", mutates_args=())
def euler_ancestral_step_op(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    sigma: float,
    sigma_down: float,
    sigma_up: float,
    next_scale: float,
    seed: int,
    step: int,
    epoch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``euler_ancestral_step_into`` new buffers: torch differentiates only functional operators."""
    out = torch.empty_like(state_BCHW), torch.empty_like(eps_BCHW)
    inputs = state_BCHW, eps_BCHW, samples_B
    scalars = sigma, sigma_down, sigma_up, next_scale
    euler_ancestral_step_into(*out, *inputs, *scalars, seed, step, epoch)
    return out


@euler_ancestral_step_op.register_fake
def _empty_step(
    state_BCHW: torch.Tensor, eps_BCHW: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(state_BCHW), torch.empty_like(eps_BCHW)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.eps_dtype = inputs[1].dtype
    sigma, sigma_down, _, ctx.next_scale = inputs[3:7]
    ctx.slope = sigma_down - sigma


def _backward(
    ctx: Any, grad_state: torch.Tensor, grad_input: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The step is linear in state and eps; the noise depends on neither."""
    grad = grad_state + grad_input.float() * ctx.next_scale
    return grad, (grad * ctx.slope).to(ctx.eps_dtype), *(None,) * 8


euler_ancestral_step_op.register_autograd(_backward, setup_context=_keep_for_backward)


def euler_ancestral_step(
    state_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    samples_B: torch.Tensor,
    *,
    sigma: float,
    sigma_down: float,
    sigma_up: float,
    next_scale: float,
    seed: int,
    step: int,
    epoch: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state (fp32) and the next model input (eps's dtype, or ``out``'s), [B, C, H, W].

    ``state_BCHW`` is fp32; ``eps_BCHW`` is fp32, fp16 or bf16; both are contiguous. ``out`` =
    (state, model input) provides buffers; ``out[0]`` may be ``state_BCHW``. Gradients flow to state
    and eps only without ``out``. Raises TypeError or ValueError when a dtype, shape, device or
    layout does not fit.
    """
    require_step(state_BCHW, eps_BCHW, samples_B, out)
    require_words(seed, Draw.ANCESTRAL + step, epoch)
    scalars = sigma, sigma_down, sigma_up, next_scale
    arguments = state_BCHW, eps_BCHW, samples_B, *scalars, signed(seed, 64), step, epoch
    if out is None:
        return euler_ancestral_step_op(*arguments)
    euler_ancestral_step_into(*out, *arguments)
    return out
