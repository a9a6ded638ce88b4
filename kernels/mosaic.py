"""r x r patches side by side on one canvas: the image that an RDED student sees.

Formula, for canvas pixel (y, x), patch side p and tile t = (y // p) * r + x // p:

    mosaic:   canvas[b, y, x] = patches[rows[b, t], y % p, x % p]
    shuffle:  out[b, y, x]    = canvas[b, (s // r) * p + y % p, (s % r) * p + x % p],
                                                                       s = order[b, t]

Tiles lie in row-major order (Sun et al. 2024, RDED, section 3.3), so a shuffle of the mosaic of
``rows`` is the mosaic of the permuted ``rows``. Values are only copied.

Bytes per number of s bytes: 2 s, plus 8 per tile. Eager torch moves 4 s for a mosaic (gather,
reorder) and 6 s for a shuffle (reorder, gather, reorder).

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


def shuffle_patches_reference(
    canvas_BHWC: torch.Tensor, order: torch.Tensor, r: int
) -> torch.Tensor:
    """[B, H, W, C] in the canvas's dtype, in plain torch."""
    batch, side, _, channels = canvas_BHWC.shape
    tiles = canvas_BHWC.view(batch, r, side // r, r, side // r, channels).transpose(2, 3)
    patches_NHWC = tiles.reshape(batch * r * r, side // r, side // r, channels)
    first_B1 = torch.arange(batch, device=order.device)[:, None] * (r * r)
    return mosaic_reference(patches_NHWC, first_B1 + order, r)


@triton.jit
def mosaic_kernel(
    out_ptr,
    source_ptr,
    rows_ptr,
    SHUFFLE: tl.constexpr,
    R: tl.constexpr,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (canvas, block) fills BLOCK numbers of one canvas; SHUFFLE: from a canvas."""
    index = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    RUN: tl.constexpr = SIDE * CHANNELS
    PITCH: tl.constexpr = R * RUN
    inside = position < R * SIDE * PITCH
    y = position // PITCH
    x = position % PITCH
    tile = (y // SIDE) * R + x // RUN
    row = tl.load(rows_ptr + index * (R * R) + tile, mask=inside, other=0)
    if SHUFFLE:
        source = index * (R * SIDE * PITCH) + (row // R) * (SIDE * PITCH) + (row % R) * RUN
        source += (y % SIDE) * PITCH + x % RUN
    else:
        source = row * (SIDE * RUN) + (y % SIDE) * RUN + x % RUN
    value = tl.load(source_ptr + source, mask=inside)
    tl.store(out_ptr + index * (R * SIDE * PITCH) + position, value, mask=inside)


def _launch(
    source: torch.Tensor, rows: torch.Tensor, r: int, p: int, shuffle: bool
) -> torch.Tensor:
    channels = source.shape[-1]
    out = source.new_empty((len(rows), r * p, r * p, channels))
    blocks = triton.cdiv(r * p * r * p * channels, NUMBERS_PER_PROGRAM)
    sizes = {"R": r, "SIDE": p, "CHANNELS": channels, "BLOCK": NUMBERS_PER_PROGRAM}
    launch(mosaic_kernel, (len(rows), blocks), out, source, rows, SHUFFLE=shuffle, **sizes)
    return out


@torch.library.custom_op("patchbloom::mosaic", mutates_args=())
def mosaic_op(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """``mosaic`` after its checks."""
    if runs_kernel(patches_NHWC):
        return _launch(patches_NHWC, rows, r, patches_NHWC.shape[1], shuffle=False)
    return mosaic_reference(patches_NHWC, rows, r)


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


@torch.library.custom_op("patchbloom::shuffle_patches", mutates_args=())
def shuffle_patches_op(canvas_BHWC: torch.Tensor, order: torch.Tensor, r: int) -> torch.Tensor:
    """``shuffle_patches`` after its checks."""
    if runs_kernel(canvas_BHWC):
        return _launch(canvas_BHWC, order, r, canvas_BHWC.shape[1] // r, shuffle=True)
    return shuffle_patches_reference(canvas_BHWC, order, r)


@shuffle_patches_op.register_fake
def _empty_shuffle(canvas_BHWC: torch.Tensor, order: torch.Tensor, r: int) -> torch.Tensor:
    return torch.empty_like(canvas_BHWC)


def shuffle_patches(canvas_BHWC: torch.Tensor, order: torch.Tensor, r: int) -> torch.Tensor:
    """Reorder the r x r tiles of canvases [B, H, H, C], each canvas in its own order.

    The canvases are uint8 or fp16 and H is a multiple of r; ``.permute(0, 2, 3, 1)`` turns
    channels_last images into canvases. ``order`` is int64 [B, r r] in [0, r r), such as the ranks
    of Draw.PATCH_SHUFFLE's uniforms (not checked: that would need a sync). No gradient flows.
    Raises TypeError or ValueError when a dtype, shape, device or layout does not fit.
    """
    require("canvas_BHWC", canvas_BHWC, dtype=PIXELS, shape=("B", "H", "H", "C"))
    batch, height, width, _ = canvas_BHWC.shape
    if height != width or height % r:
        raise ValueError(
            f"canvas_BHWC: expected squares of {r} x {r} tiles, got {height} x {width} pixels"
        )
    require("order", order, dtype=torch.int64, shape=(batch, r * r), like=canvas_BHWC)
    return shuffle_patches_op(canvas_BHWC, order, r)
