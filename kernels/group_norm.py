"""GroupNorm, with or without SiLU, of images whose pixels are rows of channels (channels_last).

Formula, over the P pixels and C / G channels of a group (biased variance, as torch's GroupNorm):

    y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias;   out = y or y / (1 + exp(-y))

A group's own channels are 8 to 160 bytes of each row, so:

- a group of at most `ON_CHIP` numbers stays in registers: one launch, one read, one write;
- otherwise whole rows are read twice, in slabs of pixels: the first launch writes each slab's mean
  and squared deviations per group, the second merges them (Chan et al. 1979) and writes the result.

Statistics are fp32. Sums have one order, without atomics, which depends on an image's shape alone
(and on a base address that is a multiple of 16 bytes, as fresh tensors have).

Bytes per s-byte number: 2 s on chip, 3 s in slabs (and 8 per slab and group, which every program of
the image reads from L2). Eager torch before 2.15 moves 9 s on channels_last tensors: a copy to
NCHW, mean and variance, normalisation, SiLU, and a copy back for the next convolution.

Shapes: B images; C channels; X spatial axes, any number of them, P pixels together; G groups.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import FLOATS, launch, runs_kernel

ON_CHIP = 32768
"""Padded numbers of a group that stay in registers: 64 for each of 512 threads. SDXL's UNet at
224 px fits whole."""
TILE = 8192
"""Padded numbers that a program reads at once, if it can choose: 32 for each of 256 threads."""
MOST_SLABS = 64
"""The second launch reads 256 bytes per slab (32 groups) in every program."""


def group_norm_reference(
    x_BCX: torch.Tensor,
    groups: int,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    *,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """fp32 [B, C, X], in plain torch; in two passes, because torch's own takes E[x^2] - E[x]^2."""
    grouped_BGN = x_BCX.float().unflatten(1, (groups, -1)).flatten(2)
    deviation_BGN = grouped_BGN - grouped_BGN.mean(2, keepdim=True)
    variance = deviation_BGN.square().mean(2, keepdim=True)
    normal_BCX = (deviation_BGN * torch.rsqrt(variance + eps)).view(x_BCX.shape)
    axis_C1 = (-1, *[1] * (x_BCX.ndim - 2))
    y_BCX = normal_BCX * weight_C.float().view(axis_C1) + bias_C.float().view(axis_C1)
    return torch.nn.functional.silu(y_BCX) if silu else y_BCX


@triton.jit
def tile_places(
    left, first_group, GROUP_COUNT: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Offsets [PIXELS, GROUPS, WIDTH] from the tile's first pixel, and which of them exist.

    ``left`` pixels are left from there. Also the channels [1, GROUPS, WIDTH], and which exist.
    """
    pixel = tl.arange(0, PIXELS)[:, None, None].to(tl.int64)
    group = first_group + tl.arange(0, GROUPS)[None, :, None]
    inner = tl.arange(0, WIDTH)[None, None, :]
    channel = group * CHANNELS + inner
    known = (group < GROUP_COUNT) & (inner < CHANNELS)
    return pixel * (GROUP_COUNT * CHANNELS) + channel, (pixel < left) & known, channel, known


@triton.jit
def tile_moments(x, inside, count):
    """Mean and sum of squared deviations of each group's ``count`` numbers, [GROUPS]."""
    mean = tl.sum(tl.sum(x, 2), 0) / count
    deviation = tl.where(inside, x - mean[None, :, None], 0.0)
    return mean, tl.sum(tl.sum(deviation * deviation, 2), 0)


@triton.jit
def normalise(x, mean, variance, eps, weight, bias, SILU: tl.constexpr):
    """The formula; mean and variance are [GROUPS], weight and bias [1, GROUPS, WIDTH]."""
    scale = weight * tl.rsqrt(variance + eps)[None, :, None]
    y = (x - mean[None, :, None]) * scale + bias
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def group_norm_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, pixels, eps,
    GROUP_COUNT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Program (image, block of groups) normalises all pixels of its groups."""
    start = tl.program_id(0).to(tl.int64) * pixels * (GROUP_COUNT * CHANNELS)
    offset, inside, channel, known = tile_places(
        pixels, tl.program_id(1) * GROUPS, GROUP_COUNT, CHANNELS, PIXELS, GROUPS, WIDTH
    )
    x = tl.load(x_ptr + start + offset, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=known, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=known, other=0).to(tl.float32)
    count = tl.cast(pixels * CHANNELS, tl.float32)  # Triton makes a constant of a single pixel
    mean, squares = tile_moments(x, inside, count)
    y = normalise(x, mean, squares / count, eps, weight, bias, SILU)
    tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slab_moments_kernel(
    moments_ptr, x_ptr, pixels, slab,
    GROUP_COUNT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (image, slab, block of groups) writes the slab's moments [B, slabs, 2, G]."""
    image = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(2) * GROUPS
    begin = tl.program_id(1) * slab
    end = tl.minimum(begin + slab, pixels)
    mean = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    for at in range(begin, end, PIXELS):
        offset, inside, _, _ = tile_places(
            end - at, first_group, GROUP_COUNT, CHANNELS, PIXELS, GROUPS, WIDTH
        )
        start = (image * pixels + at) * (GROUP_COUNT * CHANNELS)
        x = tl.load(x_ptr + start + offset, mask=inside, other=0).to(tl.float32)
        before = ((at - begin) * CHANNELS).to(tl.float32)
        count = (tl.minimum(end - at, PIXELS) * CHANNELS).to(tl.float32)
        tile_mean, tile_squares = tile_moments(x, inside, count)
        step = tile_mean - mean
        share = count / (before + count)
        mean += step * share
        squares += tile_squares + step * step * (before * share)
    group = first_group + tl.arange(0, GROUPS)
    row = (image * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(moments_ptr + row * GROUP_COUNT + group, mean, mask=group < GROUP_COUNT)
    tl.store(moments_ptr + (row + 1) * GROUP_COUNT + group, squares, mask=group < GROUP_COUNT)


@triton.jit
def merge_moments(
    moments_ptr, image, first_group, slabs, pixels, slab,
    GROUP_COUNT: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of an image's groups, [GROUPS], from its slabs'."""
    index = tl.arange(0, SLABS)[:, None]
    group = first_group + tl.arange(0, GROUPS)[None, :]
    there = (index < slabs) & (group < GROUP_COUNT)
    place = moments_ptr + (image * slabs + index) * (2 * GROUP_COUNT) + group
    means = tl.load(place, mask=there, other=0)
    squares = tl.load(place + GROUP_COUNT, mask=there, other=0)
    held = tl.minimum(tl.maximum(pixels - index * slab, 0), slab)
    share = held.to(tl.float32) / pixels.to(tl.float32)
    mean = tl.sum(means * share, 0)
    step = means - tl.expand_dims(mean, 0)
    within = tl.sum(squares, 0) / (pixels * CHANNELS).to(tl.float32)
    return mean, within + tl.sum(step * step * share, 0)


@triton.jit
def slab_normalise_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, moments_ptr, pixels, slab, eps,
    GROUP_COUNT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLABS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Program (image, slab, block of groups) normalises its pixels by the image's moments."""
    image = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(2) * GROUPS
    begin = tl.program_id(1) * slab
    end = tl.minimum(begin + slab, pixels)
    mean, variance = merge_moments(
        moments_ptr, image, first_group, tl.num_programs(1), pixels, slab,
        GROUP_COUNT, CHANNELS, GROUPS, SLABS,
    )  # fmt: skip
    for at in range(begin, end, PIXELS):
        offset, inside, channel, known = tile_places(
            end - at, first_group, GROUP_COUNT, CHANNELS, PIXELS, GROUPS, WIDTH
        )
        start = (image * pixels + at) * (GROUP_COUNT * CHANNELS)
        x = tl.load(x_ptr + start + offset, mask=inside, other=0).to(tl.float32)
        weight = tl.load(weight_ptr + channel, mask=known, other=0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=known, other=0).to(tl.float32)
        y = normalise(x, mean, variance, eps, weight, bias, SILU)
        tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan_slabs(pixels: int, channels: int, groups: int) -> tuple[dict[str, int], int, int]:
    """A program's tile and warps, pixels per slab, slabs per image; 0 slabs: all stays on chip.

    ``channels`` are those of one group. An image's shape decides, never the batch.
    """
    width, padded = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    on_chip = width * padded <= ON_CHIP
    pixels_at_once = padded if on_chip else 1
    groups_at_once = triton.next_power_of_2(groups)
    while groups_at_once > 1 and groups_at_once * pixels_at_once * width > TILE:
        groups_at_once //= 2
    if not on_chip:
        pixels_at_once = max(1, TILE // (groups_at_once * width))
    tile = {
        "GROUP_COUNT": groups, "CHANNELS": channels,
        "PIXELS": pixels_at_once, "GROUPS": groups_at_once, "WIDTH": width,
        "num_warps": min(16, max(1, pixels_at_once * groups_at_once * width // 1024)),
    }  # fmt: skip
    slab = triton.cdiv(triton.cdiv(pixels, pixels_at_once), MOST_SLABS) * pixels_at_once
    return tile, slab, 0 if on_chip else triton.cdiv(pixels, slab)


@torch.library.custom_op("patchbloom::group_norm_silu", mutates_args=())
def group_norm_op(
    x_BCX: torch.Tensor,
    groups: int,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """``group_norm`` after its checks."""
    out = torch.empty_like(x_BCX)
    if not runs_kernel(x_BCX):
        named = x_BCX, groups, weight_C, bias_C
        return out.copy_(group_norm_reference(*named, eps=eps, silu=silu))
    (batch, channels), pixels = x_BCX.shape[:2], math.prod(x_BCX.shape[2:])
    tile, slab, slabs = plan_slabs(pixels, channels // groups, groups)
    blocks = triton.cdiv(groups, tile["GROUPS"])
    ours = x_BCX, weight_C, bias_C
    if not slabs:
        grid = batch, blocks
        launch(group_norm_kernel, grid, out, *ours, pixels, eps, **tile, SILU=silu)
        return out
    grid = batch, slabs, blocks
    moments = x_BCX.new_empty((batch, slabs, 2, groups), dtype=torch.float32)
    launch(slab_moments_kernel, grid, moments, x_BCX, pixels, slab, **tile)
    constants = {**tile, "SLABS": triton.next_power_of_2(slabs), "SILU": silu}
    launch(slab_normalise_kernel, grid, out, *ours, moments, pixels, slab, eps, **constants)
    return out


group_norm_op.register_fake(lambda x_BCX, *_: torch.empty_like(x_BCX))


def group_norm(
    x_BCX: torch.Tensor,
    groups: int,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    *,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """GroupNorm, then SiLU if ``silu``, in x's dtype and layout; no gradients.

    ``x_BCX`` is fp32, fp16 or bf16 with its channels innermost in memory: a channels_last
    [B, C, H, W], or ``.transpose(1, 2)`` of a contiguous [B, P, C]. Raises TypeError or ValueError
    when a dtype, shape or layout does not fit.
    """
    channels = x_BCX.shape[1]
    for name, tensor in {"x_BCX": x_BCX, "weight_C": weight_C, "bias_C": bias_C}.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor is not x_BCX and tensor.shape != (channels,):
            raise ValueError(f"{name}: expected shape [{channels}], got {list(tensor.shape)}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    if not x_BCX.movedim(1, -1).is_contiguous():
        raise ValueError(
            "x_BCX: expected channels innermost in memory, got strides "
            f"{x_BCX.stride()}; call .contiguous(memory_format=torch.channels_last) first"
        )
    return group_norm_op(x_BCX, groups, weight_C, bias_C, eps, silu)
