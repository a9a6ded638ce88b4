"""Images to student inputs: clamp, crop, resize, flip, normalise and CutMix in one pass.

Formula, torchvision's ``resized_crop(antialias=False)`` followed by a flip and ``normalize``, per
output row i of S and box (top, left, height, width):

    y = top + clamp((i + 0.5) * height / S - 0.5, 0, height - 1),     x alike, with j -> S - 1 - j
    out = (bilinear(clamp(image, -1, 1), y, x) / 2 + 0.5 - mean) / std                 if flipped

CutMix: inside a box of output pixels, an image shows its partner's view, with the partner's own
box and flip:

    out[b, i, j] = view[partners[b] if (i, j) in pasted[b] else b, i, j]

Bytes per image, for images of i-byte and views of s-byte numbers, with or without CutMix:

    i C height width of its box, read (fewer where S < height / 2 skips rows);    s C S^2, written

plus 17 for box and flip, and 40 more with CutMix, which reads pasted pixels from the partner's box
instead. Eager torch moves 17 times as much, or 20 times with CutMix (512 to 224 px, boxes of 42 %
of the area, i = s = 2), in 8 and 11 passes.

Shapes: B images; C channels; H, W source and S output sides in pixels; boxes_B4 holds
(top, left, height, width) in source pixels, top and left from 0; pasted_B4 holds the same in whole
output pixels and may extend past the edge.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import grid_sample

from .launch import FLOATS, launch, require, runs_kernel

PIXELS_PER_PROGRAM = 256


@lru_cache(maxsize=32)
def _normalisation(
    mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) for values in [-1, 1], cached on the device: no copy inside a step."""
    scale = torch.tensor([0.5 / std for std in std_C], device=device, dtype=torch.float32)
    shift = [(0.5 - mean) / std for mean, std in zip(mean_C, std_C, strict=True)]
    return scale, torch.tensor(shift, device=device, dtype=torch.float32)


def _sampling_grid(
    images_BCHW: torch.Tensor, boxes_B4: torch.Tensor, flips_B: torch.Tensor, size_px: int
) -> torch.Tensor:
    """Where ``grid_sample`` samples each output pixel: [B, S, S, (x, y)].

    It takes positions as g = (2 x + 1) / W - 1. They are already inside the box, so its border rule
    never applies.
    """
    height, width = images_BCHW.shape[-2:]
    steps = torch.arange(size_px, device=boxes_B4.device) + 0.5
    top, left, box_height, box_width = boxes_B4[:, :, None].unbind(1)
    zero = boxes_B4.new_zeros(())
    y_BS = top + torch.clamp(steps * (box_height / size_px) - 0.5, zero, box_height - 1.0)
    x_BS = left + torch.clamp(steps * (box_width / size_px) - 0.5, zero, box_width - 1.0)
    x_BS = torch.where(flips_B[:, None], x_BS.flip(1), x_BS)
    grid_BSS2 = boxes_B4.new_empty(len(boxes_B4), size_px, size_px, 2)
    grid_BSS2[..., 0] = ((2.0 * x_BS + 1.0) / width - 1.0)[:, None, :]
    grid_BSS2[..., 1] = ((2.0 * y_BS + 1.0) / height - 1.0)[:, :, None]
    return grid_BSS2


def _pasted(pasted_B4: torch.Tensor, size_px: int) -> torch.Tensor:
    """Which output pixels show the partner: bool [B, 1, S, S]."""
    along = torch.arange(size_px, device=pasted_B4.device)
    top, left, height, width = pasted_B4[:, :, None].unbind(1)
    rows_BS = (along >= top) & (along < top + height)
    columns_BS = (along >= left) & (along < left + width)
    return rows_BS[:, None, :, None] & columns_BS[:, None, None, :]


def student_input_reference(
    images_BCHW: torch.Tensor,
    boxes_B4: torch.Tensor,
    flips_B: torch.Tensor,
    size_px: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    *,
    cutmix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """fp32 [B, C, S, S], in plain torch."""
    grid_BSS2 = _sampling_grid(images_BCHW, boxes_B4, flips_B, size_px)
    clamped = images_BCHW.float().clamp(-1.0, 1.0)
    sampled = grid_sample(clamped, grid_BSS2, "bilinear", "border", align_corners=False)
    scale, shift = _normalisation(tuple(mean_C), tuple(std_C), images_BCHW.device)
    views = sampled.mul_(scale[:, None, None]).add_(shift[:, None, None])
    if cutmix is None:
        return views
    partners_B, pasted_B4 = cutmix
    return torch.where(_pasted(pasted_B4, size_px), views[partners_B], views)


@triton.jit
def clamped_load(ptr, offset, inside):
    """Load decoder values, clamped to [-1, 1]."""
    value = tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(value, -1.0), 1.0)


@triton.jit
def student_input_kernel(
    out_ptr,
    images_ptr,
    boxes_ptr,
    flips_ptr,
    scale_ptr,
    shift_ptr,
    partners_ptr,
    pasted_ptr,
    height,
    width,
    size,
    CUTMIX: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (image, block) writes BLOCK pixels of every channel, channels last."""
    index = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size * size
    i = pixel // size
    j = pixel % size
    source = index
    if CUTMIX:
        pasted_row = i - tl.load(pasted_ptr + index * 4)
        pasted_column = j - tl.load(pasted_ptr + index * 4 + 1)
        pasted = (pasted_row >= 0) & (pasted_row < tl.load(pasted_ptr + index * 4 + 2))
        pasted &= (pasted_column >= 0) & (pasted_column < tl.load(pasted_ptr + index * 4 + 3))
        source = tl.where(pasted, tl.load(partners_ptr + index), index)
    top = tl.load(boxes_ptr + source * 4)
    left = tl.load(boxes_ptr + source * 4 + 1)
    box_height = tl.load(boxes_ptr + source * 4 + 2)
    box_width = tl.load(boxes_ptr + source * 4 + 3)
    flip = tl.load(flips_ptr + source) != 0
    j = tl.where(flip, size - 1 - j, j).to(tl.float32)
    y = (i.to(tl.float32) + 0.5) * (box_height / size) - 0.5
    x = (j + 0.5) * (box_width / size) - 0.5
    y = top + tl.minimum(tl.maximum(y, 0.0), box_height - 1.0)
    x = left + tl.minimum(tl.maximum(x, 0.0), box_width - 1.0)
    row = tl.floor(y)
    column = tl.floor(x)
    fy = y - row
    fx = x - column
    y0 = tl.minimum(tl.maximum(row.to(tl.int32), 0), height - 1)
    x0 = tl.minimum(tl.maximum(column.to(tl.int32), 0), width - 1)
    y1 = tl.minimum(y0 + 1, height - 1)
    x1 = tl.minimum(x0 + 1, width - 1)
    for channel in tl.static_range(CHANNELS):  # pyright: ignore[reportGeneralTypeIssues]
        plane = images_ptr + (source * CHANNELS + channel) * height * width
        top_left = clamped_load(plane, y0 * width + x0, inside)
        top_right = clamped_load(plane, y0 * width + x1, inside)
        low_left = clamped_load(plane, y1 * width + x0, inside)
        low_right = clamped_load(plane, y1 * width + x1, inside)
        upper = top_left + fx * (top_right - top_left)
        value = upper + fy * (low_left + fx * (low_right - low_left) - upper)
        value = value * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
        out = out_ptr + (index * size * size + pixel) * CHANNELS + channel
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("patchbloom::student_input", mutates_args=())
def student_input_op(
    images_BCHW: torch.Tensor,
    boxes_B4: torch.Tensor,
    flips_B: torch.Tensor,
    partners_B: torch.Tensor | None,
    pasted_B4: torch.Tensor | None,
    size_px: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``student_input`` after its checks."""
    cutmix = None if partners_B is None or pasted_B4 is None else (partners_B, pasted_B4)
    inputs = images_BCHW, boxes_B4, flips_B
    out = _empty_student_input(*inputs, partners_B, pasted_B4, size_px, mean_C, std_C, dtype)
    if not runs_kernel(images_BCHW):
        return out.copy_(student_input_reference(*inputs, size_px, mean_C, std_C, cutmix=cutmix))
    batch, channels, height, width = images_BCHW.shape
    launch(
        student_input_kernel,
        (batch, triton.cdiv(size_px * size_px, PIXELS_PER_PROGRAM)),
        out,
        *inputs,
        *_normalisation(tuple(mean_C), tuple(std_C), images_BCHW.device),
        *(cutmix or (boxes_B4, boxes_B4)),  # unread without CutMix
        height,
        width,
        size_px,
        CUTMIX=cutmix is not None,
        CHANNELS=channels,
        BLOCK=PIXELS_PER_PROGRAM,
    )
    return out


@student_input_op.register_fake
def _empty_student_input(
    images_BCHW: torch.Tensor,
    boxes_B4: torch.Tensor,
    flips_B: torch.Tensor,
    partners_B: torch.Tensor | None,
    pasted_B4: torch.Tensor | None,
    size_px: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    sizes = (*images_BCHW.shape[:2], size_px, size_px)
    layout, device = torch.channels_last, images_BCHW.device
    return torch.empty(sizes, dtype=dtype, device=device, memory_format=layout)


@torch.library.custom_op("patchbloom::student_input_backward", mutates_args=())
def student_input_backward(
    grad_BCSS: torch.Tensor,
    images_BCHW: torch.Tensor,
    boxes_B4: torch.Tensor,
    flips_B: torch.Tensor,
    partners_B: torch.Tensor | None,
    pasted_B4: torch.Tensor | None,
    std_C: Sequence[float],
) -> torch.Tensor:
    """The images' gradient, in plain torch on every device: no stage trains through views yet."""
    size_px = grad_BCSS.shape[-1]
    scale, _ = _normalisation((0.0,) * len(std_C), tuple(std_C), images_BCHW.device)
    grad = grad_BCSS.float() * scale[:, None, None]
    if partners_B is not None and pasted_B4 is not None:
        inside = _pasted(pasted_B4, size_px)
        own = grad.masked_fill(inside, 0.0)
        grad = own.index_add_(0, partners_B, grad.masked_fill(~inside, 0.0))
    grid_BSS2 = _sampling_grid(images_BCHW, boxes_B4, flips_B, size_px)
    images = images_BCHW.float()
    # bilinear, border, align_corners=False; gradient of the images, not of the grid
    backward = torch.ops.aten.grid_sampler_2d_backward
    grad, _ = backward(grad, images, grid_BSS2, 0, 1, False, (True, False))
    return grad.masked_fill(images.abs() > 1.0, 0.0).to(images_BCHW.dtype)


@student_input_backward.register_fake
def _empty_gradient(grad_BCSS: torch.Tensor, images_BCHW: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(images_BCHW)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.std_C = inputs[7]


def _backward(ctx: Any, grad_BCSS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradient = student_input_backward(grad_BCSS, *ctx.saved_tensors, ctx.std_C)
    return gradient, *(None,) * 8


student_input_op.register_autograd(_backward, setup_context=_keep_for_backward)


def student_input(
    images_BCHW: torch.Tensor,
    boxes_B4: torch.Tensor,
    flips_B: torch.Tensor,
    size_px: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    *,
    cutmix: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Crop, resize, flip and normalise images in [-1, 1]: [B, C, size_px, size_px].

    ``images_BCHW`` is fp32, fp16 or bf16 (values outside [-1, 1] are clamped). ``boxes_B4`` is fp32
    (top, left, height, width) in pixels, inside the image and at least one pixel per side (not
    checked: that would need a sync). ``flips_B`` is bool, applied after the resize. ``mean_C`` and
    ``std_C`` are in [0, 1] units. ``cutmix`` = (partners_B, pasted_B4), both int64: rows of the
    images (not checked either) and boxes of output pixels. The result is channels_last; gradients
    flow to the images. Raises TypeError or ValueError when an argument does not fit.
    """
    require("images_BCHW", images_BCHW, dtype=FLOATS, shape=("B", "C", "H", "W"))
    batch, channels = images_BCHW.shape[:2]
    require("boxes_B4", boxes_B4, dtype=torch.float32, shape=(batch, 4), like=images_BCHW)
    require("flips_B", flips_B, dtype=torch.bool, shape=(batch,), like=images_BCHW)
    if not len(mean_C) == len(std_C) == channels:
        raise ValueError(
            f"mean_C, std_C: expected {channels} numbers each, got {len(mean_C)} and {len(std_C)}"
        )
    partners_B, pasted_B4 = cutmix or (None, None)
    if partners_B is not None and pasted_B4 is not None:
        require("partners_B", partners_B, dtype=torch.int64, shape=(batch,), like=images_BCHW)
        require("pasted_B4", pasted_B4, dtype=torch.int64, shape=(batch, 4), like=images_BCHW)
    inputs = images_BCHW, boxes_B4, flips_B, partners_B, pasted_B4
    return student_input_op(*inputs, size_px, mean_C, std_C, dtype)
