"""What the device reaches and what an image needs: the two halves of "percent of roofline".

Reached: a large matrix product of random numbers in each precision in use, on a CPU a large
convolution too, of which the faster counts, and a large copy, read and written, all in the process
of the measurement. Needed: the floating-point operations of the
model's own networks at the benchmark's shapes, counted (FlopCounterMode) while they run on tensors
without memory. That is arithmetic alone, a multiplication and an addition as two: an engine at
100 % would spend no time on anything else.

What is counted is what an image must cost, whoever makes it: the denoiser, once per eval, and the
decoder, with the keys and values of its prompt given. Work that a peer does besides is not to its
credit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import time_us
from patchbloom.export.config import EngineSpec, Precision
from patchbloom.export.graphs import Graph, make_graphs
from patchbloom.export.models import (
    DTYPES,
    TOKENS,
    ModelSource,
    load_parts,
    resolve_vae_precision,
)
from peer_names import split_name
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices: enough to fill the device, at most 0.1 s a product on two cores."""
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
CONVOLUTION = (8, 256, 32)
"""Images, channels and side of the 3 × 3 convolution: 9.7 GFLOP."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a device reached in this process."""

    flops: dict[Precision, float]
    """Operations per second of a matrix product, on a CPU of a convolution where that is faster."""
    copy_bytes_per_s: float
    """Read and written."""

    def row(self) -> dict[str, Any]:
        """For a result: TFLOP/s by precision, GB/s."""
        return {
            "reached_tflops": {name: round(each / 1e12, 3) for name, each in self.flops.items()},
            "copy_gb_per_s": round(self.copy_bytes_per_s / 1e9, 1),
        }


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """Floating-point operations of one image."""

    denoiser: float
    """Of one eval."""
    decoder: float
    evals: int

    @property
    def flops(self) -> float:
        """Of all evals and the decoder."""
        return self.evals * self.denoiser + self.decoder

    def floor_s(self, roofline: Roofline, precision: Precision, vae_precision: Precision) -> float:
        """Seconds that the arithmetic of an image takes at the roofline."""
        denoiser_s = self.evals * self.denoiser / roofline.flops[precision]
        return denoiser_s + self.decoder / roofline.flops[vae_precision]

    def row(self) -> dict[str, Any]:
        """For a result: GFLOP."""
        return {
            "denoiser_gflop": round(self.denoiser / 1e9, 3),
            "decoder_gflop": round(self.decoder / 1e9, 3),
            "evals": self.evals,
            "image_gflop": round(self.flops / 1e9, 3),
        }


def measure_roofline(device: str, precisions: Iterable[Precision]) -> Roofline:
    """Time the operations and the copy, in under 3 s; torch's threads are as they are."""
    return Roofline(
        flops={each: arithmetic_flops(device, each) for each in sorted(set(precisions))},
        copy_bytes_per_s=copy_bytes_per_s(device),
    )


def arithmetic_flops(device: str, precision: Precision) -> float:
    """Operations per second of a product, on a CPU of a convolution where that is faster.

    There they are of two libraries: on a core of an AMD EPYC MKL's product reaches 90 GFLOP/s in
    fp32, without AVX-512, and oneDNN's convolution 235. On a GPU a convolution may be TF32.
    """
    reached = matmul_flops(device, precision)
    return max(reached, convolution_flops(device, precision)) if device == "cpu" else reached


def matmul_flops(device: str, precision: Precision) -> float:
    """Operations per second of a square product; fp32 is fp32, torch's default, and not TF32."""
    side = SIDES[device]
    # Not zeros, on which a GPU is faster: it draws less power, and so clocks higher.
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
    """What a copy reaches: read and written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_us(lambda: target.copy_(source), device)["p50"] / 1e6)


def count_image_work(model: ModelSource, *, size_px: int, batch: int, evals: int) -> ImageWork:
    """Operations of an image of `size_px` in a batch; nothing is computed and no weight is read."""
    spec = EngineSpec(size_px=size_px, batch=batch)
    architecture = replace(model, weights="random")
    parts = load_parts(architecture, precision=spec.precision, device="meta")
    _, denoiser, decoder = make_graphs(parts, spec, tokens=TOKENS)
    return ImageWork(
        denoiser=_flops(denoiser) / batch, decoder=_flops(decoder) / batch, evals=evals
    )


def _flops(graph: Graph) -> int:
    inputs = [torch.empty(port.shape, dtype=port.dtype, device="meta") for port in graph.inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph.module(*inputs)
    return counter.get_total_flops()


def peer_precisions(name: str, model: ModelSource, usual: Precision) -> tuple[Precision, Precision]:
    """Of a peer's denoiser and decoder: its name may end in a precision, as "ort-bf16" does."""
    peer, named = split_name(name)
    precision = named or usual
    if peer == "diffusers-upcast":
        return precision, "fp32"
    return precision, resolve_vae_precision(model, precision)
