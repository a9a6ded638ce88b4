"""r x r patches side by side on one canvas: the picture that a student of RDED sees.

Formula, for canvas pixel (y, x) and patch side p:

    canvas[b, y, x] = patches[rows[b, (y // p) * r + x // p], y % p, x % p]

so the tiles of ``rows`` lie in row-major order (Sun et al. 2024, RDED, section 3.3). A patch
shuffle is a permuted ``rows``.

Shapes: N patches of p x p pixels; B canvases of r p x r p pixels; C channels.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, require, runs_kernel

BYTES_PER_PROGRAM = 1024


def mosaic_reference(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """uint8 [B, r p, r p, C], in plain torch."""
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
    """Program (canvas, block) copies BLOCK bytes of one canvas."""
    index = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    RUN: tl.constexpr = SIDE * CHANNELS
    PITCH: tl.constexpr = R * RUN
    inside = position < R * SIDE * PITCH
    y = position // PITCH
    x = position % PITCH
    tile = (y // SIDE) * R + x // RUN
    patch = tl.load(rows_ptr + index * (R * R) + tile, mask=inside, other=0)
    source = patch * (SIDE * RUN) + (y % SIDE) * RUN + x % RUN
    value = tl.load(patches_ptr + source, mask=inside)
    tl.store(out_ptr + index * (R * SIDE * PITCH) + position, value, mask=inside)


def mosaic(patches_NHWC: torch.Tensor, rows: torch.Tensor, r: int) -> torch.Tensor:
    """uint8 patches [N, p, p, C] and int64 rows [B, r r] to uint8 canvases [B, r p, r p, C].

    ``rows`` stay inside the patches (not checked: that would need a sync). Raises TypeError or
    ValueError for a dtype, shape, device or layout that does not fit.
    """
    require("patches_NHWC", patches_NHWC, dtype=torch.uint8, shape=("N", "p", "p", "C"))
    _, p, width, channels = patches_NHWC.shape
    if p != width:
        raise ValueError(f"patches_NHWC: expected square patches, got {p} x {width} pixels")
    require("rows", rows, dtype=torch.int64, shape=("B", r * r), like=patches_NHWC)
    if not runs_kernel(patches_NHWC):
        return mosaic_reference(patches_NHWC, rows, r)
    sizes = (len(rows), r * p, r * p, channels)
    out = torch.empty(sizes, dtype=torch.uint8, device=patches_NHWC.device)
    blocks = triton.cdiv(r * p * r * p * channels, BYTES_PER_PROGRAM)
    constants = {"R": r, "SIDE": p, "CHANNELS": channels, "BLOCK": BYTES_PER_PROGRAM}
    launch(mosaic_kernel, (len(rows), blocks), out, patches_NHWC, rows, **constants)
    return out
