"""r x r patches side by side on one canvas: the image that an RDED student sees.

Formula, for canvas pixel (y, x), patch side p and tile t = (y // p) * r + x // p:

    canvas[b, y, x] = patches[rows[b, t], y % p, x % p]

Tiles lie in row-major order (Sun et al. 2024, RDED, section 3.3). Values are only copied.

Bytes per number of s bytes: 2 s, plus 8 per tile. Eager torch moves 4 s (gather, reorder).

Shapes: N patches of p x p pixels; B canvases of r p x r p pixels; C channels.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, require, runs_kernel

PIXELS = (torch.uint8, torch.float16)
NUMBERS_PER_PROGRAM = 1024


def mosaic_reference(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """[B, r p, r p, C] in the patches' dtype, in plain torch."""
    _, p, _, channels = patches_NHWC.shape
    tiles = patches_NHWC[rows].view(len(rows), r, r, p, p, channels)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(len(rows), r * p, r * p, channels)


@triton.jit
def mosaic_kernel(
    out_ptr,
    patches_ptr,
    rows_ptr,
    R: tl.constexpr,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (canvas, block) fills BLOCK numbers of one canvas."""
    index = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    RUN: tl.constexpr = SIDE * CHANNELS
    PITCH: tl.constexpr = R * RUN
    inside = position < R * SIDE * PITCH
    y = position // PITCH
    x = position % PITCH
    tile = (y // SIDE) * R + x // RUN
    row = tl.load(rows_ptr + index * (R * R) + tile, mask=inside, other=0)
    source = row * (SIDE * RUN) + (y % SIDE) * RUN + x % RUN
    value = tl.load(patches_ptr + source, mask=inside)
    tl.store(out_ptr + index * (R * SIDE * PITCH) + position, value, mask=inside)


@torch.library.custom_op("patchbloom::mosaic", mutates_args=())
def mosaic_op(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """``mosaic`` after its checks."""
    if not runs_kernel(patches_NHWC):
        return mosaic_reference(patches_NHWC, rows, r)
    out = _empty_mosaic(patches_NHWC, rows, r)
    _, p, _, channels = patches_NHWC.shape
    blocks = triton.cdiv(r * p * r * p * channels, NUMBERS_PER_PROGRAM)
    sizes = {"R": r, "SIDE": p, "CHANNELS": channels, "BLOCK": NUMBERS_PER_PROGRAM}
    launch(mosaic_kernel, (len(rows), blocks), out, patches_NHWC, rows, **sizes)
    return out


@mosaic_op.register_fake
def _empty_mosaic(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    _, p, _, channels = patches_NHWC.shape
    return patches_NHWC.new_empty((len(rows), r * p, r * p, channels))


def mosaic(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """Arrange patches [N, p, p, C] by int64 rows [B, r r] on canvases [B, r p, r p, C].

    Patches and canvases are uint8 or fp16. ``rows`` must be below N (not checked: that would need a
    sync). No gradient flows. Raises TypeError or ValueError when a dtype, shape, device or layout
    does not fit.
    """
    require("patches_NHWC", patches_NHWC, dtype=PIXELS, shape=("N", "p", "p", "C"))
    _, p, width, _ = patches_NHWC.shape
    if p != width:
        raise ValueError(f"patches_NHWC: expected square patches, got {p} x {width} pixels")
    require("rows", rows, dtype=torch.int64, shape=("B", r * r), like=patches_NHWC)
    return mosaic_op(patches_NHWC, rows, r)
