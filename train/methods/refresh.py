"""Fewer expansions per epoch: a share of the samples is expanded anew, the others are shown again.

A sample with phase f, of N samples ranked by Draw.REFRESH (f = rank mod q), share = p / q:

    count(e) = floor((f + e p) / q);   its image at epoch e is that of the first epoch e' with
    count(e') = count(e),              e' = max(0, ceil((count(e) q - f) / p))

so every epoch makes p / q of the images, to one sample, each is as old as q / p epochs at most, and
which epoch's image is seen follows from (seed, sample, epoch): a resumed training makes what it
lacks again. Crops, flips and CutMix stay new at every epoch. This is lossy, and off by default.

Legend: N samples in all, P samples asked for, H W image size.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...engine.data.images import to_pixels, to_unit
from ...kernels.noise import Draw, uniform
from .source import ImageSource

FINEST = 1000  # shares are rounded to a multiple of a fraction with at most this denominator


class Refreshed:
    """A source of which `share` is rendered anew per epoch; the rest is kept as 8-bit pixels.

    Holds N·3·H·W bytes of the host's memory, from the first epoch on. `share` in (0, 1).
    """

    def __init__(self, source: ImageSource, share: float, seed: int) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share {share:g}: expected more than 0 and less than 1")
        self.source, self.share = source, Fraction(share).limit_denominator(FINEST)
        self.samples, self.labels_N = source.samples, source.labels_N
        self.class_ids = source.class_ids
        u_N = uniform(seed, Draw.REFRESH, torch.arange(source.samples), 0, 1)[:, 0]
        ranks_N = torch.argsort(torch.argsort(u_N, stable=True))
        self._phases_N = ranks_N % self.share.denominator
        self._made_at_N = torch.full((source.samples,), -1, dtype=torch.int64)
        self._kept_NHWC = torch.empty(0, dtype=torch.uint8)
        self._device = torch.device("cpu")

    def shown(self, samples_P: Tensor, epoch: int) -> Tensor:
        """The epoch whose image each sample shows at `epoch`: int64 [P]."""
        p, q = self.share.numerator, self.share.denominator
        phases_P = self._phases_N[samples_P]
        counts_P = (phases_P + epoch * p) // q
        return (-((phases_P - counts_P * q) // p)).clamp_min(0)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """fp32 [P, 3, H, W] in [-1, 1], in steps of 1 / 127.5."""
        shown_P = self.shown(samples_P, epoch)
        stale_P = self._made_at_N[samples_P] != shown_P
        for made_at in shown_P[stale_P].unique().tolist():  # one epoch, but after a resume
            self._make(samples_P[stale_P & (shown_P == made_at)], made_at)
        return to_unit(self._kept_NHWC[samples_P].to(self._device))

    def _make(self, samples_M: Tensor, epoch: int) -> None:
        images_MCHW = self.source.render(samples_M, epoch)
        pixels_MHWC = to_pixels(images_MCHW)
        if not len(self._kept_NHWC):
            shape = (self.samples, *pixels_MHWC.shape[1:])
            self._kept_NHWC = torch.zeros(shape, dtype=torch.uint8)
            self._device = images_MCHW.device
        self._kept_NHWC[samples_M] = pixels_MHWC.cpu()
        self._made_at_N[samples_M] = epoch

    def describe(self) -> dict[str, Any]:
        """The source's own, and the share."""
        return {**self.source.describe(), "refresh": float(self.share)}
