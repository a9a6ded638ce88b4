"""Images that a coreset keeps whole: those of t2i, dsco and herding, and doping's real images.

An epoch has J samples of the G images of a class. engine/coreset/shown.py says which image, or
which variant of it (variants.py), a sample shows; variants are new in every epoch. J is the number
of samples that other methods render of patches (Plan.samples_per_class); doped images have r² each.

Legend: K classes, P requested samples, B in one part, S image side in pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...engine.coreset.coreset import Coreset
from ...engine.coreset.shown import shown
from ...engine.data.crops import to_pixels, to_unit
from ...engine.data.images import ImageSet
from ..plan import Plan
from .source import Machine, stream_whole
from .variants import augment, draw_variants

AUGMENTED_TOGETHER = 64  # images; variants take 30 bytes of scratch per byte of image


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """Stored images, the same in every epoch, and variants of them if there are any."""

    method: str
    images_NHWC: Tensor
    """uint8 [K·G, S, S, 3], class after class, on the device to render on."""
    class_ids: tuple[str, ...]
    samples_per_class: int
    """J."""
    variants: int = 0
    """Augmented variants per image."""
    seed: int = 0
    """Seed of the variants."""

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

    def describe(self) -> dict[str, Any]:
        described = {"method": self.method, "size_px": self.images_NHWC.shape[1]}
        varied = {"variants": self.variants, "seed": self.seed} if self.variants else {}
        return described | varied


def read_whole(images: ImageSet, positions: np.ndarray, size_px: int, device: str) -> Tensor:
    """These images as validation sees them: uint8 [len(positions), S, S, 3] on the CPU."""
    batches = stream_whole(images, positions, size_px, device)
    return torch.cat([pixels_BSSC.cpu() for pixels_BSSC, _ in batches])


def as_stored(images_BCHW: Tensor, size_px: int) -> Tensor:
    """fp32 images in [-1, 1] of any size → uint8 [B, S, S, 3] on the CPU; bicubic, antialiased."""
    if images_BCHW.shape[-1] != size_px:
        images_BCHW = interpolate(
            images_BCHW, (size_px, size_px), mode="bicubic", antialias=True, align_corners=False
        )
    return to_pixels(images_BCHW).cpu().contiguous()


def whole_settings(plan: Plan) -> dict[str, Any]:
    """Manifest settings of a coreset of whole images: its patches are images."""
    return {
        "factor": 1,
        "patch_px": plan.image_size,
        "ipc": plan.ipc,
        "samples_per_class": plan.samples_per_class,
    }


def open_stored(coreset: Coreset, machine: Machine) -> AbstractContextManager[StoredImages]:
    """The images of a coreset that keeps them whole, and their variants if it has any."""
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
