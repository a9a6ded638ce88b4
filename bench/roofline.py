"""Reached speed and needed arithmetic: the two halves of "percent of roofline".

Reached: the speed of a large product of random matrices in each precision in use (on a CPU that of
a large convolution if it is faster), and of a large copy, read and written, all in the measuring
process. Needed: engine/expand/image_work.py at the benchmark's shapes. This is arithmetic only: an
engine at 100 % would spend no time on anything else. Additional work of a peer is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from measure import time_us
from patchbloom.engine.expand.image_work import ImageWork
from patchbloom.export.config import EIGHT_BITS, Precision
from patchbloom.export.models import DTYPES, ModelSource, resolve_vae_precision
from peer_names import split_name
from torch.nn.functional import conv2d

SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices: fills the device, at most 0.1 s per product on two cores."""
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
CONVOLUTION = (8, 256, 32)
"""Images, channels and side of the 3 × 3 convolution: 9.7 GFLOP."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Speeds that a device reached in this process."""

    flops: dict[Precision, float]
    """Operations per second of a matrix product, or on a CPU of a convolution if it is faster."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written."""

    def row(self) -> dict[str, Any]:
        """Columns of a result row: TFLOP/s by precision, GB/s."""
        return {
            "reached_tflops": {name: round(each / 1e12, 3) for name, each in self.flops.items()},
            "copy_gb_per_s": round(self.copy_bytes_per_s / 1e9, 1),
        }


def floor_s(
    work: ImageWork, roofline: Roofline, precision: Precision, vae_precision: Precision
) -> float:
    """Seconds that the arithmetic of an image takes at the roofline."""
    denoiser_s = work.evals * work.denoiser / roofline.flops[precision]
    return denoiser_s + work.decoder / roofline.flops[vae_precision]


def work_row(work: ImageWork) -> dict[str, Any]:
    """Columns of a result row, in GFLOP."""
    return {
        "denoiser_gflop": round(work.denoiser / 1e9, 3),
        "decoder_gflop": round(work.decoder / 1e9, 3),
        "evals": work.evals,
        "image_gflop": round(work.flops / 1e9, 3),
    }


def measure_roofline(device: str, precisions: Iterable[Precision]) -> Roofline:
    """Time the operations and the copy, in under 3 s, with torch's current threads."""
    return Roofline(
        flops={each: arithmetic_flops(device, each) for each in sorted(set(precisions))},
        copy_bytes_per_s=copy_bytes_per_s(device),
    )


def arithmetic_flops(device: str, precision: Precision) -> float:
    """Operations per second of a product, or on a CPU of a convolution if it is faster.

    On a CPU two libraries compute them: on one core of an AMD EPYC, MKL's product reaches
    90 GFLOP/s in fp32, without AVX-512, and oneDNN's convolution 235. On a GPU a convolution may
    use TF32.
    """
    reached = matmul_flops(device, precision)
    return max(reached, convolution_flops(device, precision)) if device == "cpu" else reached


def matmul_flops(device: str, precision: Precision) -> float:
    """Operations per second of a square product; fp32 is true fp32, torch's default, not TF32."""
    side = SIDES[device]
    # Random numbers: on zeros a GPU draws less power and clocks higher.
    a, b = torch.randn(2, side, side, device=device).to(DTYPES[precision])
    out = torch.empty_like(a)
    return 2 * side**3 / (time_us(lambda: torch.mm(a, b, out=out), device)["p50"] / 1e6)


def convolution_flops(device: str, precision: Precision) -> float:
    """Operations per second of a 3 × 3 convolution, channels last."""
    count, channels, side = CONVOLUTION
    placed = {"device": device, "dtype": DTYPES[precision], "memory_format": torch.channels_last}
    images_BCHW = torch.randn(count, channels, side, side).to(**placed)
    weight_OCkk = torch.randn(channels, channels, 3, 3).to(**placed)
    work = 2 * 9 * count * (channels * side) ** 2
    with torch.no_grad():
        timed = time_us(lambda: conv2d(images_BCHW, weight_OCkk, padding=1), device)
    return work / (timed["p50"] / 1e6)


def copy_bytes_per_s(device: str) -> float:
    """Bytes per second of a copy, read plus written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_us(lambda: target.copy_(source), device)["p50"] / 1e6)


def peer_precisions(name: str, model: ModelSource, usual: Precision) -> tuple[Precision, Precision]:
    """Precisions of a peer's denoiser and decoder; its name may end in one, as "ort-bf16" does.

    Eight bits are held against the roofline of bf16, which torch can measure.
    """
    peer, named = split_name(name)
    precision: Precision = "bf16" if named in EIGHT_BITS else named or usual
    if peer == "diffusers-upcast":
        return precision, "fp32"
    return precision, resolve_vae_precision(model, precision)
