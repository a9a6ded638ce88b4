"""Open the images of a coreset as its students see them: shared by ranks, refreshed, doped.

    SharedImages    every rank renders a part (pools.py)
    Refreshed       --refresh: a share of the images is rendered anew per epoch
    Doped           --dope: real images follow the method's own in every class

Legend: N samples in all, P requested samples, M samples to make, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...engine.coreset.coreset import Coreset
from ...engine.data.crops import to_pixels, to_unit
from ...kernels.noise import Draw, uniform
from ..plan import Plan
from ..run.world import ALONE, World
from .pools import SharedImages
from .registry import method_of
from .source import Expansions, ImageSource, Machine, RealImages
from .whole_images import StoredImages

FINEST = 1000  # a share is rounded to a fraction with at most this denominator


@contextmanager
def open_source(plan: Plan, coreset: Coreset | None, world: World = ALONE) -> Iterator[ImageSource]:
    """The images of a coreset; without one real images, the ceiling. Frees the model at the end.

    All ranks of `world` call it, rank 0 first: it builds the engine that the others load. They
    share the rendering, so all request the same images in the same order.
    """
    if coreset is None:
        classes = len(plan.class_names)
        own = RealImages(
            images=plan.train,
            labels_N=torch.arange(classes).repeat_interleave(plan.samples // classes),
            size_px=plan.image_size,
            seed=plan.seed,
            device=plan.device,
            threads=world.threads,
        )
        yield own if world.size == 1 else SharedImages(own, world.producing)
        return
    machine = Machine(device=plan.device, world=world, model=plan.model, expand=plan.expand)
    with open_coreset_source(coreset, machine, plan.refresh) as source:
        yield source


@contextmanager
def open_coreset_source(
    coreset: Coreset, machine: Machine, refresh: float = 1.0
) -> Iterator[ImageSource]:
    """The images of a coreset; `refresh`: share of a model's images rendered anew per epoch."""
    method, world = method_of(coreset), machine.world
    with method.open(coreset, machine) as own:
        source = own
        # Other images cost less than their gather: kernels on pixels that every rank has.
        if world.size > 1 and isinstance(own, Expansions):
            source = SharedImages(own, world.producing)
        if method.model == "rendered" and refresh < 1:
            source = Refreshed(source, refresh, coreset.settings["seed"])
        yield with_doped(source, coreset, machine.device)


def own_part(source: ImageSource) -> ImageSource:
    """The method's own source, which renders in this process alone."""
    while isinstance(source, Doped | Refreshed | SharedImages):
        source = source.source
    return source


class Refreshed:
    """A source of which `share` is rendered anew per epoch; the rest is kept as 8-bit pixels.

    Lossy. The N samples are ranked by Draw.REFRESH; one with phase f = rank mod q, share = p / q:

        count(e) = floor((f + e p) / q);   its image at epoch e is that of the first epoch e' with
        count(e') = count(e),              e' = max(0, ceil((count(e) q - f) / p))

    So every epoch makes p / q of the images (give or take one), none is older than q / p epochs,
    and the epoch of an image follows from (seed, sample, epoch): a resumed training makes again
    what it lacks. Crops, flips and CutMix are new in every epoch.

    Holds N·3·H·W bytes of host memory from the first epoch on. `share` in (0, 1).
    """

    def __init__(self, source: ImageSource, share: float, seed: int) -> None:
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
        for made_at in shown_P[stale_P].unique().tolist():  # several only after a resume
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
        """The source's description and the share."""
        return {**self.source.describe(), "refresh": float(self.share)}


class Doped:
    """Any method's images, followed by real ones in every class."""

    def __init__(self, source: ImageSource, real: StoredImages) -> None:
        self.source, self.real, self.class_ids = source, real, source.class_ids
        self.samples = source.samples + real.samples
        self.labels_N = torch.cat([source.labels_N, real.labels_N]).sort(stable=True).values

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """fp32 [P, 3, H, W] in [-1, 1], on the source's device.

        Each source renders its own part, and nothing when that is empty.
        """
        own = self.source.samples // len(self.class_ids)
        real = self.real.samples_per_class
        class_P, number_P = samples_P // (own + real), samples_P % (own + real)
        own_P = number_P < own
        parts: list[tuple[Tensor, Tensor]] = []
        if own_P.any():
            requested = (class_P * own + number_P)[own_P]
            parts.append((own_P, self.source.render(requested, epoch)))
        if not own_P.all():
            requested = (class_P * real + number_P - own)[~own_P]
            parts.append((~own_P, self.real.render(requested, epoch)))
        shown_PCHW = torch.empty_like(parts[0][1][:1]).repeat(len(samples_P), 1, 1, 1)
        for rows_P, images in parts:
            shown_PCHW[rows_P.to(shown_PCHW.device)] = images
        return shown_PCHW

    def describe(self) -> dict[str, Any]:
        """The source's description and the number of real images per class."""
        images = len(self.real.images_NHWC) // len(self.class_ids)
        return {**self.source.describe(), "doped_images_per_class": images}


def with_doped(source: ImageSource, coreset: Coreset, device: str) -> ImageSource:
    """The source with the real images of its coreset; unchanged where there are none."""
    if not coreset.doped_per_class:
        return source
    real = StoredImages(
        method="doped",
        images_NHWC=coreset.doped().to(device),
        class_ids=coreset.class_ids,
        samples_per_class=coreset.doped_samples_per_class,
    )
    return Doped(source, real)
