"""Start of an expansion: gather latents from the bank, mix within the class, add noise.

Formula, per sample, with z = bank[row]:

    partner = class_first + min(floor(u * class_count), class_count - 1)    u: Draw.MIXUP_PARTNER
    z       = gamma * z + (1 - gamma) * bank[partner]         gamma = Q(u), u: Draw.MIXUP_WEIGHT
    state   = z + sigma * n                                                 n: Draw.START
    input   = state * model_scale,                 model_scale = 1 / sqrt(sigma^2 + 1)

The first two lines apply only with mixup. The partner is any row of the class, including the
sample's own. By default gamma is uniform on (0, 1), i.e. Beta(1, 1) (DACE, section 3), and
Q(u) = u. If its quantiles at 0, 1 / K, ..., 1 are given, Q is linear between them:

    k = min(floor(u * K), K - 1)        Q(u) = Q_k + (u * K - k) * (Q_(k+1) - Q_k)

Kernel and reference agree on gamma bit for bit: subtracting k is exact, and nothing is fused.
The state is diffusers' (x = z + sigma n); u, gamma and n depend only on (seed, sample, epoch).
Element e of n belongs to element e of the latent in C, H, W order, whatever the memory layout of
the model input.

Bytes per element, for a bank of b-byte and a model input of s-byte numbers:

    b (2 b with mixup), read;    4 + s, written

plus five indices per sample, and two quantiles per program if they are given. Eager torch moves
601 instead of 14 (mixup, b = 4, s = 2), mostly for the noise.

Shapes: N bank rows, sorted by class; B samples; C, H, W of one latent; Q = K + 1 knots.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import launch, require, runs_kernel
from .noise import (
    Draw,
    kernel_words,
    normal_block,
    normal_reference,
    philox_block,
    require_words,
    signed,
    uniform_reference,
    unit_of,
)

FLOATS = (torch.float32, torch.float16)
GROUPS_PER_PROGRAM = 128
"""512 elements: a 4 x 16 x 16 latent is two programs."""


def start_state_reference(
    bank_NCHW: torch.Tensor,
    rows_B: torch.Tensor,
    samples_B: torch.Tensor,
    class_first_B: torch.Tensor,
    class_count_B: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    sigma: float,
    mixup: bool,
    model_scale: float,
    quantiles_Q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(state, model input), both fp32 [B, C, H, W], in plain torch."""
    latents = bank_NCHW[rows_B].float()
    if mixup:
        partner_u = uniform_reference(seed, Draw.MIXUP_PARTNER, samples_B, epoch, 1)[:, 0]
        gamma_B1 = uniform_reference(seed, Draw.MIXUP_WEIGHT, samples_B, epoch, 1)
        if quantiles_Q is not None:
            gamma_B1 = _at_quantile(quantiles_Q, gamma_B1)
        gamma = gamma_B1[:, :, None, None]
        offset_B = torch.minimum((partner_u * class_count_B).long(), class_count_B - 1)
        partners = bank_NCHW[class_first_B + offset_B].float()
        latents = gamma * latents + (1.0 - gamma) * partners
    noise = normal_reference(seed, Draw.START, samples_B, epoch, bank_NCHW.shape[1:])
    state = latents + sigma * noise
    return state, state * model_scale


def _at_quantile(quantiles_Q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Q(u), fp32 in u's shape."""
    last = len(quantiles_Q) - 2
    position = u * (last + 1)
    knot = position.long().clamp_(max=last)
    left = quantiles_Q[knot]
    return left + (position - knot) * (quantiles_Q[knot + 1] - left)


@triton.jit(do_not_specialize=["epoch", "seed_lo", "seed_hi"])
def start_state_kernel(
    state_ptr,
    input_ptr,
    bank_ptr,
    rows_ptr,
    samples_ptr,
    class_first_ptr,
    class_count_ptr,
    quantiles_ptr,
    numel,
    pixels,
    sigma,
    model_scale,
    epoch,
    seed_lo,
    seed_hi,
    START: tl.constexpr,
    PARTNER: tl.constexpr,
    WEIGHT: tl.constexpr,
    MIXUP: tl.constexpr,
    INTERVALS: tl.constexpr,
    NHWC: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program (sample, block) writes 4 GROUPS elements of one latent.

    NHWC: the model input is channels_last. INTERVALS: K, or 0 when gamma is uniform.
    """
    index = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    element = first_group * 4 + tl.arange(0, 4 * GROUPS)
    inside = element < numel
    sample = tl.load(samples_ptr + index)
    row = tl.load(rows_ptr + index)
    latent = tl.load(bank_ptr + row * numel + element, mask=inside).to(tl.float32)
    if MIXUP:
        first = tl.load(class_first_ptr + index)
        count = tl.load(class_count_ptr + index)
        partner_word, _, _, _ = philox_block(0, PARTNER, sample, epoch, seed_lo, seed_hi)
        weight_word, _, _, _ = philox_block(0, WEIGHT, sample, epoch, seed_lo, seed_hi)
        offset = (unit_of(partner_word) * count.to(tl.float32)).to(tl.int64)
        partner = first + tl.minimum(offset, count - 1)
        other = tl.load(bank_ptr + partner * numel + element, mask=inside).to(tl.float32)
        gamma = unit_of(weight_word)
        if INTERVALS:
            position = gamma * INTERVALS
            knot = tl.minimum(position.to(tl.int32), INTERVALS - 1)
            left = tl.load(quantiles_ptr + knot)
            right = tl.load(quantiles_ptr + knot + 1)
            gamma = left + (position - knot.to(tl.float32)) * (right - left)
        latent = gamma * latent + (1.0 - gamma) * other
    group = first_group + tl.arange(0, GROUPS)
    noise = normal_block(group, START, sample, epoch, seed_lo, seed_hi)
    state = latent + sigma * noise
    first_out = index.to(tl.int64) * numel
    tl.store(state_ptr + first_out + element, state, mask=inside)
    if NHWC:
        # Scattered writes, C numbers apart: a latent is a few KiB, so its lines stay in L2.
        element = (element % pixels) * (numel // pixels) + element // pixels
    model_input = (state * model_scale).to(input_ptr.dtype.element_ty)
    tl.store(input_ptr + first_out + element, model_input, mask=inside)


@torch.library.custom_op("patchbloom::start_state_into", mutates_args={"state", "model_input"})
def start_state_into(
    state: torch.Tensor,
    model_input: torch.Tensor,
    bank_NCHW: torch.Tensor,
    rows_B: torch.Tensor,
    samples_B: torch.Tensor,
    class_first_B: torch.Tensor,
    class_count_B: torch.Tensor,
    seed: int,
    epoch: int,
    sigma: float,
    mixup: bool,
    model_scale: float,
    quantiles_Q: torch.Tensor | None,
) -> None:
    """``start_state`` after its checks."""
    inputs = bank_NCHW, rows_B, samples_B, class_first_B, class_count_B
    if not runs_kernel(bank_NCHW):
        results = start_state_reference(
            *inputs,
            seed=seed,
            epoch=epoch,
            sigma=sigma,
            mixup=mixup,
            model_scale=model_scale,
            quantiles_Q=quantiles_Q,
        )
        state.copy_(results[0])
        model_input.copy_(results[1])
        return
    start, *words = kernel_words(seed, Draw.START, epoch)
    numel = math.prod(bank_NCHW.shape[1:])
    launch(
        start_state_kernel,
        (len(rows_B), triton.cdiv(numel, 4 * GROUPS_PER_PROGRAM)),
        state,
        model_input,
        *inputs,
        bank_NCHW if quantiles_Q is None else quantiles_Q,  # unread dummy
        numel,
        math.prod(bank_NCHW.shape[2:]),
        sigma,
        model_scale,
        *words,
        START=start,
        PARTNER=int(Draw.MIXUP_PARTNER),
        WEIGHT=int(Draw.MIXUP_WEIGHT),
        MIXUP=mixup,
        INTERVALS=0 if quantiles_Q is None else len(quantiles_Q) - 1,
        NHWC=not model_input.is_contiguous(),
        GROUPS=GROUPS_PER_PROGRAM,
    )


def start_state(
    bank_NCHW: torch.Tensor,
    rows_B: torch.Tensor,
    samples_B: torch.Tensor,
    class_first_B: torch.Tensor,
    class_count_B: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    sigma: float,
    mixup: bool,
    model_scale: float,
    quantiles_Q: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first state (fp32) and the first model input (``dtype``), both [B, C, H, W].

    ``bank_NCHW`` is fp32 or fp16; the index tensors are int64 on the same device. ``rows_B`` and
    class_first + class_count must stay inside the bank (not checked: that would need a sync).
    ``quantiles_Q`` holds the mixup weight's quantiles: fp32, at least two knots, ascending in
    [0, 1] (not checked either); None: the weight is uniform. The model input is contiguous or
    channels_last. ``out`` = (state, model input) provides buffers, whose dtype and layout then
    apply. No gradient flows. Raises TypeError or ValueError when a dtype, shape, device or layout
    does not fit.
    """
    require("bank_NCHW", bank_NCHW, dtype=FLOATS, shape=("N", "C", "H", "W"))
    require("rows_B", rows_B, dtype=torch.int64, shape=("B",), like=bank_NCHW)
    indices = {"samples_B": samples_B, "class_first_B": class_first_B}
    for name, tensor in {**indices, "class_count_B": class_count_B}.items():
        require(name, tensor, dtype=torch.int64, shape=rows_B.shape, like=bank_NCHW)
    if quantiles_Q is not None:
        require("quantiles_Q", quantiles_Q, dtype=torch.float32, shape=("Q",), like=bank_NCHW)
        if len(quantiles_Q) < 2:
            raise ValueError(f"quantiles_Q: expected 2 knots or more, got {len(quantiles_Q)}")
    sizes = (len(rows_B), *bank_NCHW.shape[1:])
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        state = torch.empty(sizes, dtype=torch.float32, device=bank_NCHW.device)
        model_input = torch.empty(sizes, dtype=dtype, device=state.device, memory_format=layout)
        out = state, model_input
    require("out[0]", out[0], dtype=torch.float32, shape=sizes, like=bank_NCHW)
    dtypes = (*FLOATS, torch.bfloat16)
    require("out[1]", out[1], dtype=dtypes, shape=sizes, like=bank_NCHW, channels_last=True)
    require_words(seed, Draw.START, epoch)
    inputs = bank_NCHW, rows_B, samples_B, class_first_B, class_count_B
    words = signed(seed, 64), epoch
    start_state_into(*out, *inputs, *words, sigma, mixup, model_scale, quantiles_Q)
    return out
