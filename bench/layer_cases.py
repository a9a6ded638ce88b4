"""Cases on layers of SDXL-Turbo: GroupNorm with and without SiLU, GEGLU.

Byte formulas: kernels/group_norm.py and geglu.py. Names give images x channels x side in pixels,
or rows x outputs. The peer is torch's own layer on the same tensors, as diffusers runs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from kernel_case import Case, model_dtype
from patchbloom.kernels.geglu import geglu
from patchbloom.kernels.group_norm import group_norm, plan_slabs

GROUPS, EPS, WIDTH = 32, 1e-6, 2560
TOLERANCE = 3e-2
"""An fp16 ulp and a half of the largest values, which are below 32."""


def layer_cases(device: str, batch: int, side: int, *, compiled: bool) -> list[Case]:
    """Layers of the decoder, a quarter of the batch at once, and of the UNet, for images of
    ``side`` pixels."""
    return [
        norm_case(device, batch // 4, 128, side, silu=True, compiled=compiled),
        norm_case(device, batch // 4, 512, side // 2, silu=True, compiled=compiled),
        norm_case(device, batch, 320, side // 8, silu=True, compiled=compiled),
        norm_case(device, batch, 640, side // 16, silu=False, compiled=compiled),
        geglu_case(device, batch * (side // 16) ** 2, compiled=compiled),
    ]


def norm_case(
    device: str, batch: int, channels: int, side: int, *, silu: bool, compiled: bool
) -> Case:
    """GroupNorm of 32 groups on channels_last images."""
    shape, dtype = (batch, channels, side, side), model_dtype(device)
    images = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.rand(2, channels, device=device).to(dtype)
    in_slabs = plan_slabs(side**2, channels // GROUPS, GROUPS)[2] > 0

    def stock() -> torch.Tensor:
        normal = F.group_norm(images, GROUPS, weight, bias, EPS)
        return F.silu(normal) if silu else normal

    return Case(
        name=f"group_norm{', SiLU' if silu else ''} {batch} x {channels} x {side}",
        kernel=lambda: group_norm(images, GROUPS, weight, bias, eps=EPS, silu=silu),
        reference=stock,
        moved_bytes=(3 if in_slabs else 2) * images.numel() * images.itemsize,
        tolerance=TOLERANCE,
        speedup=None,
        compiled=compiled,
    )


def geglu_case(device: str, rows: int, *, compiled: bool) -> Case:
    """The gate of the UNet's middle level."""
    states = torch.randn(rows, 2 * WIDTH, device=device).to(model_dtype(device))

    def stock() -> torch.Tensor:
        value, gate = states.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return Case(
        name=f"geglu {rows} x {WIDTH}",
        kernel=lambda: geglu(states),
        reference=stock,
        moved_bytes=3 * rows * WIDTH * states.itemsize,
        tolerance=TOLERANCE,
        speedup=None,
        compiled=compiled,
    )
