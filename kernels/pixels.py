"""Patches to encoder inputs: uint8 to images in [-1, 1], resized in the same pass.

Formula, torch's bicubic ``interpolate(align_corners=False)`` without antialias (a = -0.75), per
output row i of S (columns alike), p source rows:

    y = (i + 0.5) * p / S - 0.5;   taps at floor(y) - 1 ... floor(y) + 2, clamped to the patch
    out = clamp(sum(weight * pixel) / 127.5 - 1, -1, 1)

Bytes per image of s-byte numbers: p^2 C read, s S^2 C written. Eager torch moves 44 bytes instead
of 2.25 per output number in 7 passes (S = 2 p, s = 2).

Shapes: N patches; C channels; H, W, p source and S output sides in pixels.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import interpolate

from .launch import launch, require, runs_kernel

PIXELS_PER_PROGRAM = 256


def upsample_patches_reference(patches_NHWC: torch.Tensor, size_px: int) -> torch.Tensor:
    """fp32 [N, C, S, S] in [-1, 1], in plain torch."""
    pixels = patches_NHWC.permute(0, 3, 1, 2).float()
    size = (size_px, size_px)
    upsampled = interpolate(pixels, size=size, mode="bicubic", align_corners=False)
    return upsampled.contiguous().div_(127.5).sub_(1.0).clamp_(-1.0, 1.0)


@triton.jit
def cubic_weights(t):
    """Weights of the four taps at distances 1 + t, t, 1 - t, 2 - t; a = -0.75."""
    far_0 = 1.0 + t
    near_1 = 1.0 - t
    far_1 = 2.0 - t
    w0 = ((-0.75 * far_0 + 3.75) * far_0 - 6.0) * far_0 + 3.0
    w1 = (1.25 * t - 2.25) * t * t + 1.0
    w2 = (1.25 * near_1 - 2.25) * near_1 * near_1 + 1.0
    w3 = ((-0.75 * far_1 + 3.75) * far_1 - 6.0) * far_1 + 3.0
    return w0, w1, w2, w3


@triton.jit
def cubic_row(row_ptr, x, w0, w1, w2, w3, width, channels, inside):
    """One row's four taps around column x, clamped to the patch."""
    last = width - 1
    x0 = tl.minimum(tl.maximum(x - 1, 0), last) * channels
    x1 = tl.minimum(tl.maximum(x, 0), last) * channels
    x2 = tl.minimum(x + 1, last) * channels
    x3 = tl.minimum(x + 2, last) * channels
    value = w0 * tl.load(row_ptr + x0, mask=inside, other=0).to(tl.float32)
    value += w1 * tl.load(row_ptr + x1, mask=inside, other=0).to(tl.float32)
    value += w2 * tl.load(row_ptr + x2, mask=inside, other=0).to(tl.float32)
    value += w3 * tl.load(row_ptr + x3, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def upsample_kernel(
    out_ptr,
    patches_ptr,
    height,
    width,
    size,
    scale_y,
    scale_x,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (patch, block) writes BLOCK pixels of every channel of one output image."""
    index = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size * size
    y = ((pixel // size).to(tl.float32) + 0.5) * scale_y - 0.5
    x = ((pixel % size).to(tl.float32) + 0.5) * scale_x - 0.5
    row = tl.floor(y).to(tl.int32)
    column = tl.floor(x).to(tl.int32)
    fy = y - row.to(tl.float32)
    fx = x - column.to(tl.float32)
    source = patches_ptr + index * height * width * CHANNELS
    last_row = height - 1
    pitch = width * CHANNELS
    v0, v1, v2, v3 = cubic_weights(fy)
    h0, h1, h2, h3 = cubic_weights(fx)
    for channel in tl.static_range(CHANNELS):  # pyright: ignore[reportGeneralTypeIssues]
        plane = source + channel
        r0 = plane + tl.minimum(tl.maximum(row - 1, 0), last_row) * pitch
        r1 = plane + tl.minimum(tl.maximum(row, 0), last_row) * pitch
        r2 = plane + tl.minimum(row + 1, last_row) * pitch
        r3 = plane + tl.minimum(row + 2, last_row) * pitch
        value = v0 * cubic_row(r0, column, h0, h1, h2, h3, width, CHANNELS, inside)
        value += v1 * cubic_row(r1, column, h0, h1, h2, h3, width, CHANNELS, inside)
        value += v2 * cubic_row(r2, column, h0, h1, h2, h3, width, CHANNELS, inside)
        value += v3 * cubic_row(r3, column, h0, h1, h2, h3, width, CHANNELS, inside)
        value = tl.minimum(tl.maximum(value / 127.5 - 1.0, -1.0), 1.0)
        out = out_ptr + (index * CHANNELS + channel) * size * size + pixel
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("patchbloom::upsample_patches", mutates_args=())
def upsample_patches_op(
    patches_NHWC: torch.Tensor, size_px: int, dtype: torch.dtype
) -> torch.Tensor:
    """``upsample_patches`` after its checks."""
    if not runs_kernel(patches_NHWC):
        return upsample_patches_reference(patches_NHWC, size_px).to(dtype)
    number, height, width, channels = patches_NHWC.shape
    out = _empty_upsampled(patches_NHWC, size_px, dtype)
    launch(
        upsample_kernel,
        (number, triton.cdiv(size_px * size_px, PIXELS_PER_PROGRAM)),
        out,
        patches_NHWC,
        height,
        width,
        size_px,
        height / size_px,
        width / size_px,
        CHANNELS=channels,
        BLOCK=PIXELS_PER_PROGRAM,
    )
    return out


@upsample_patches_op.register_fake
def _empty_upsampled(patches_NHWC: torch.Tensor, size_px: int, dtype: torch.dtype) -> torch.Tensor:
    number, _, _, channels = patches_NHWC.shape
    return patches_NHWC.new_empty((number, channels, size_px, size_px), dtype=dtype)


def upsample_patches(
    patches_NHWC: torch.Tensor, size_px: int, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 patches [N, p, p, C] to ``dtype`` images [N, C, size_px, size_px] in [-1, 1].

    Raises TypeError or ValueError when a dtype, shape or layout does not fit.
    """
    require("patches_NHWC", patches_NHWC, dtype=torch.uint8, shape=("N", "H", "W", "C"))
    return upsample_patches_op(patches_NHWC, size_px, dtype)
