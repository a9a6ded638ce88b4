"""Checks before a launch, and the choice between kernel and reference.

A launcher runs the Triton kernel on CUDA tensors and the torch reference on CPU tensors. With
``TRITON_INTERPRET=1`` (Triton's own switch, set before ``import triton``) CPU tensors too go
through the kernel, in Triton's interpreter: this tests the kernels without a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether the kernel (True) or the reference (False) computes on this tensor's device."""
    if tensor.is_cuda:
        return True
    if tensor.device.type != "cpu":
        raise ValueError(f"expected tensors on cpu or cuda, got {tensor.device}; move them first")
    return bool(knobs.runtime.interpret)


def require(
    name: str,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | str],
    like: torch.Tensor | None = None,
    channels_last: bool = False,
) -> None:
    """Raise unless ``tensor`` is contiguous with this dtype and shape, on ``like``'s device.

    A string in ``shape`` names an axis of any length; ``channels_last`` allows that layout too.
    Raises TypeError for the dtype, ValueError for anything else.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {names}, got {got}; convert it with .to()")
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, sizes, strict=True)
    )
    if not fits:
        expected = ", ".join(str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(sizes)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got {tensor.device}; move it first")
    if channels_last and tensor.is_contiguous(memory_format=torch.channels_last):
        return
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor; call .contiguous() first")


def launch(
    kernel: Any, grid: tuple[int, ...], out: torch.Tensor, *args: Any, **constants: Any
) -> None:
    """Run a Triton kernel on ``out``'s device; do nothing when ``out`` is empty.

    Multiply-adds are not fused, whatever Triton's default: results then round as the reference's
    do, and these kernels are memory-bound. ``kernel`` is untyped because Triton's decorator keeps
    the signature of the device code.
    """
    if out.numel():
        with torch.cuda.device_of(out):
            kernel[grid](out, *args, **constants, enable_fp_fusion=False)
