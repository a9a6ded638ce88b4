"""Images that a coreset keeps whole: of methods t2i and dsco, and the real ones that doping adds.

engine/coreset/shown.py says which of them, or of their variants (variants.py), a sample shows in an
epoch. Variants are drawn anew in every epoch. An epoch shows J of the G images of a class: r² times
ipc, or r² times G for doped images, as many views of an image as other methods take of the r²
patches in its place. Legend: K classes, P samples asked for, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...engine.coreset.coreset import Coreset
from ...engine.coreset.shown import shown
from ...engine.data.images import (
    STANDARD_RESIZE_RATIO,
    ImageSet,
    center_boxes,
    stream_crops,
    to_pixels,
    to_unit,
)
from ..plan import Plan
from .source import ImageSource, Machine, one_by_one
from .variants import augment, draw_variants

AUGMENTED_TOGETHER = 64  # images: variants take 30 bytes of scratch per byte of them


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """Images as they are, the same in every epoch, and variants of them where there are any."""

    method: str
    images_NHWC: Tensor
    """uint8 [K·G, S, S, 3], class after class, on the device to render on."""
    class_ids: tuple[str, ...]
    samples_per_class: int
    """J."""
    variants: int = 0
    """Augmented images beside each image itself."""
    seed: int = 0
    """Of the variants."""

    @property
    def samples(self) -> int:
        return len(self.class_ids) * self.samples_per_class

    @property
    def labels_N(self) -> Tensor:
        return torch.arange(len(self.class_ids)).repeat_interleave(self.samples_per_class)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        parts = samples_P.split(AUGMENTED_TOGETHER)
        return torch.cat([to_unit(self._shown(samples_B, epoch)) for samples_B in parts])

    def _shown(self, samples_B: Tensor, epoch: int) -> Tensor:
        """uint8 [B, S, S, 3]."""
        images, each = len(self.images_NHWC) // len(self.class_ids), self.samples_per_class
        image_B, variant_B = shown(
            samples_B % each, epoch, each=each, images=images, variants=self.variants
        )
        rows_B = samples_B // each * images + image_B
        shown_BHWC = self.images_NHWC[rows_B.to(self.images_NHWC.device)]
        varied_B = variant_B > 0
        if varied_B.any():
            variants = draw_variants(self.seed, samples_B[varied_B], epoch)
            varied_B = varied_B.to(shown_BHWC.device)
            shown_BHWC[varied_B] = augment(shown_BHWC[varied_B], variants)
        return shown_BHWC

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        return one_by_one(samples_P)

    def describe(self) -> dict[str, Any]:
        described = {"method": self.method, "size_px": self.images_NHWC.shape[1]}
        varied = {"variants": self.variants, "seed": self.seed} if self.variants else {}
        return described | varied


@dataclass(frozen=True, kw_only=True)
class Doped:
    """Any method's images, and in every class real ones after them.

    Of a sample's number within its class, those below the source's are the source's own.
    """

    source: ImageSource
    real: StoredImages

    @property
    def samples(self) -> int:
        return self.source.samples + self.real.samples

    @property
    def labels_N(self) -> Tensor:
        return torch.cat([self.source.labels_N, self.real.labels_N]).sort(stable=True).values

    @property
    def class_ids(self) -> tuple[str, ...]:
        return self.source.class_ids

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """fp32 [P, 3, S, S] in [-1, 1], on the source's device.

        The source is asked for its own part alone, and not at all when that is empty.
        """
        own = self.source.samples // len(self.class_ids)
        class_P, number_P = samples_P // self._each(), samples_P % self._each()
        is_own_P = number_P < own
        parts: list[tuple[Tensor, Tensor]] = []
        if is_own_P.any():
            asked_P = (class_P * own + number_P)[is_own_P]
            parts.append((is_own_P, self.source.render(asked_P, epoch)))
        if not is_own_P.all():
            asked_P = (class_P * self.real.samples_per_class + number_P - own)[~is_own_P]
            parts.append((~is_own_P, self.real.render(asked_P, epoch)))
        shown_PCHW = torch.empty_like(parts[0][1][:1]).repeat(len(samples_P), 1, 1, 1)
        for rows_P, images in parts:
            shown_PCHW[rows_P.to(shown_PCHW.device)] = images
        return shown_PCHW

    def _each(self) -> int:
        """Samples of a class."""
        return self.samples // len(self.class_ids)

    def describe(self) -> dict[str, Any]:
        """The source's own, and how many real images a class has."""
        images = len(self.real.images_NHWC) // len(self.class_ids)
        return {**self.source.describe(), "doped_images_per_class": images}


def with_doped(source: ImageSource, coreset: Coreset, device: str) -> ImageSource:
    """The source and the real images of its coreset; as it is where there are none."""
    if not coreset.doped_per_class:
        return source
    real = StoredImages(
        method="doped",
        images_NHWC=coreset.doped().to(device),
        class_ids=coreset.class_ids,
        samples_per_class=doped_samples(coreset),
    )
    return Doped(source=source, real=real)


def doped_samples(coreset: Coreset) -> int:
    """Samples of a class and epoch that are real images."""
    return coreset.settings["doping"]["samples_per_class"] if coreset.doped_per_class else 0


def read_whole(images: ImageSet, positions: np.ndarray, size_px: int, device: str) -> Tensor:
    """These images as validation sees them: uint8 [len(positions), S, S, 3] on the CPU."""
    stream = stream_crops(
        images,
        positions,
        center_boxes(STANDARD_RESIZE_RATIO, size_px),
        crops=1,
        size_px=size_px,
        device=device,
    )
    return torch.cat([crops.pixels_BPHWC[:, 0].cpu() for crops in stream])


def as_stored(images_BCHW: Tensor, size_px: int) -> Tensor:
    """Made images, fp32 in [-1, 1], of any size → uint8 [B, S, S, 3] on the CPU; bicubic."""
    if images_BCHW.shape[-1] != size_px:
        images_BCHW = interpolate(
            images_BCHW, (size_px, size_px), mode="bicubic", antialias=True, align_corners=False
        )
    return to_pixels(images_BCHW).cpu().contiguous()


def whole_settings(plan: Plan, method: str) -> dict[str, Any]:
    """What the manifest says of a coreset of images that a model made once.

    Its patches are images. No student needs the model, which counts no bytes: the settings name it.
    """
    return {
        "factor": 1,
        "patch_px": plan.image_size,
        "samples_per_class": plan.samples_per_class,
        "generator": plan.describe_generator(method),
    }


def open_stored(coreset: Coreset, machine: Machine) -> AbstractContextManager[StoredImages]:
    """The images of a coreset that keeps them whole, and variants where there are any."""
    settings = coreset.settings
    return nullcontext(
        StoredImages(
            method=settings["method"],
            images_NHWC=coreset.patches().to(machine.device),
            class_ids=coreset.class_ids,
            samples_per_class=settings["samples_per_class"],
            variants=settings.get("variants", 0),
            seed=settings["seed"],
        )
    )
