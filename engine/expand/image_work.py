"""Floating-point operations of one image, counted (FlopCounterMode) on meta tensors.

The count is the least that an image costs, whoever makes it: the denoiser, once per eval, and the
decoder, with the keys and values of the prompt given. A multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...export.config import EngineSpec
from ...export.graphs import Graph, make_graphs
from ...export.models import TOKENS, ModelSource, load_parts


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """Floating-point operations of one image."""

    denoiser: float
    """Operations per eval."""
    decoder: float
    evals: int

    @property
    def flops(self) -> float:
        """Operations of all evals and the decoder."""
        return self.evals * self.denoiser + self.decoder


def count_image_work(model: ModelSource, *, size_px: int, evals: int, batch: int = 1) -> ImageWork:
    """Operations per image of `size_px` in a batch; computes nothing and reads no weights."""
    spec = EngineSpec(size_px=size_px, batch=batch)
    architecture = replace(model, weights="random")
    parts = load_parts(architecture, precision=spec.precision, device="meta")
    _, denoiser, decoder = make_graphs(parts, spec, tokens=TOKENS)
    return ImageWork(
        denoiser=_flops(denoiser) / batch,
        decoder=_flops(decoder) / decoder.inputs[0].shape[0],
        evals=evals,
    )


def _flops(graph: Graph) -> int:
    inputs = [torch.empty(port.shape, dtype=port.dtype, device="meta") for port in graph.inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph.module(*inputs)
    return counter.get_total_flops()
