"""The gate of a GEGLU layer (Shazeer 2020; diffusers' ``GEGLU``), with the exact gelu.

Formula, for rows that hold D values and then D gates:

    out = value * gate * (1 + erf(gate / sqrt(2))) / 2

Bytes per s-byte output number: 2 s read, s written. Eager torch moves 5 s: gelu's result is
written and read once more.

Shapes: X any leading axes; D outputs of a row.
"""

import torch
import triton
import triton.language as tl

from .launch import FLOATS, launch, require, runs_kernel

ROWS_PER_PROGRAM = 4
COLUMNS_PER_PROGRAM = 512
"""SDXL's D are 2560 and 5120: no lane is idle."""


def geglu_reference(x_X2D: torch.Tensor) -> torch.Tensor:
    """fp32 [X, D], in plain torch."""
    value, gate = x_X2D.float().chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


@triton.jit
def geglu_kernel(out_ptr, x_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (block of rows, block of columns) writes ROWS x COLUMNS numbers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    place = x_ptr + row.to(tl.int64) * (2 * width) + column
    value = tl.load(place, mask=inside, other=0).to(tl.float32)
    gate = tl.load(place + width, mask=inside, other=0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))
    out = out_ptr + row.to(tl.int64) * width + column
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("patchbloom::geglu", mutates_args=())
def geglu_op(x_X2D: torch.Tensor) -> torch.Tensor:
    """``geglu`` after its checks."""
    out = _empty_gated(x_X2D)
    if not runs_kernel(x_X2D):
        return out.copy_(geglu_reference(x_X2D))
    width = out.shape[-1]
    rows = out.numel() // max(width, 1)
    grid = triton.cdiv(rows, ROWS_PER_PROGRAM), triton.cdiv(width, COLUMNS_PER_PROGRAM)
    sizes = {"ROWS": ROWS_PER_PROGRAM, "COLUMNS": COLUMNS_PER_PROGRAM}
    launch(geglu_kernel, grid, out, x_X2D, rows, width, **sizes)
    return out


@geglu_op.register_fake
def _empty_gated(x_X2D: torch.Tensor) -> torch.Tensor:
    return x_X2D.new_empty((*x_X2D.shape[:-1], x_X2D.shape[-1] // 2))


def geglu(x_X2D: torch.Tensor) -> torch.Tensor:
    """Values times gelu of gates, [X, D] in x's dtype, from rows [X, 2 D]; no gradients.

    Raises TypeError or ValueError unless x is contiguous fp32, fp16 or bf16 with even rows.
    """
    require("x_X2D", x_X2D, dtype=FLOATS, shape=("X",) * (x_X2D.ndim - 1) + ("2D",))
    if x_X2D.shape[-1] % 2:
        raise ValueError(f"x_X2D: expected rows of even length, got {x_X2D.shape[-1]}")
    return geglu_op(x_X2D)
