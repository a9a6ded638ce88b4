"""Maps (sample, epoch) to its stored image, and so to its label.

A class of G stored images, each with V variants that are drawn when it is shown, has J samples per
epoch, and M = G · (1 + V):

    number = (epoch · J + sample) mod M,   image = number mod G,   variant = number // G

Variant 0 is the image itself: all are shown equally often, whatever G. Each sample shows one patch:
J = G and V = 0; the method decides what it makes of the patch. In a doped coreset a class has the
samples of its patches first, then those of its real images, by the same rule.

Legend: E epochs, B requested samples, A labels per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CoresetError
from ..labels.stored import SoftLabels
from .coreset import Coreset
from .manifest import DOPED, PATCHES, image_files

_LABELLED = {
    "rded": "the mosaic of this patch and its r² - 1 neighbours",
    "upsample": "it, enlarged",
    "random": "it, enlarged",
}
"""The image that the teacher saw for a patch that no model expands, by method."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image file of the coreset (patch, whole image or real image), and its labelled views."""

    file: str
    """Its path in the coreset."""
    name: str
    """Unique in its class and sorted in its order: 000000, doped_000000."""
    class_index: int
    class_id: str
    class_name: str
    doped: bool
    """Whether it is a real image that doping added."""
    views_A3: np.ndarray
    """int32 [A, 3], sample, epoch and variant of each label, by epoch; A = 0 without labels."""


def shown(
    sample_B: Tensor, epoch: int | Tensor, *, each: int, images: int, variants: int
) -> Tensor:
    """Image and variant that samples of a class show, int64 [2, B].

    sample_B: numbers within the class, 0..J-1. `each`, `images`, `variants`: J, G and V.
    """
    number_B = (epoch * each + sample_B) % (images * (1 + variants))
    return torch.stack([number_B % images, number_B // images])


def stored_images(coreset: Coreset, labels: SoftLabels | None) -> Iterator[StoredImage]:
    """Every image of a coreset, class after class, patches first, with its labelled views.

    Raises CoresetError for labels of other images.
    """
    if labels is not None:
        _check_labels(coreset, labels)
    own, real = coreset.samples_per_class, coreset.doped_samples_per_class
    patches, doped = coreset.manifest["classes"][0]["patches"], coreset.doped_per_class
    epochs, variants = 0 if labels is None else labels.epochs, coreset.settings.get("variants", 0)
    views = [
        *_views(epochs, each=own, images=patches, variants=variants, first=0),
        *_views(epochs, each=real, images=doped, variants=0, first=own),
    ]
    for entry in coreset.manifest["classes"]:
        offset_3 = np.array([entry["index"] * (own + real), 0, 0], np.int32)
        files = [
            *image_files(PATCHES, entry["id"], patches),
            *image_files(DOPED, entry["id"], doped),
        ]
        for number, (file, views_A3) in enumerate(zip(files, views, strict=True)):
            is_doped = number >= patches
            yield StoredImage(
                file=file,
                name=f"doped_{number - patches:06d}" if is_doped else f"{number:06d}",
                class_index=entry["index"],
                class_id=entry["id"],
                class_name=entry["name"],
                doped=is_doped,
                views_A3=views_A3 + offset_3,
            )


def describe_views(coreset: Coreset) -> dict[str, Any]:
    """For people: the meaning of an image's label rows."""
    doped = " A view of a doped image shows the image itself." if coreset.doped_per_class else ""
    return {
        "columns": ("sample", "epoch", "variant"),
        "meaning": (
            "Row a of an image's labels is the teacher's answer to the view (sample, epoch, "
            "variant) = views[a]: a crop, perhaps mirrored, with a part of another image pasted in "
            "where labels.settings.views.cutmix is true, and not the stored image as it is. "
            f"The view is of {_labelled(coreset)}.{doped}"
        ),
    }


def _labelled(coreset: Coreset) -> str:
    """The image that the teacher saw for a stored image."""
    settings = coreset.settings
    if coreset.manifest["model"] is not None:
        return "its expansion, in which mixup, where there is any, mixes another patch of its class"
    if "variants" in settings:
        return "the image itself for variant 0, otherwise an augmented variant of it"
    if "samples_per_class" in settings:
        return "it"
    return _LABELLED.get(settings["method"], "an image that is made of it")


def _views(epochs: int, *, each: int, images: int, variants: int, first: int) -> list[np.ndarray]:
    """Views of each image of a class, int32 [A, 3]; sample numbers start at `first`."""
    if not images:
        return []
    epoch_EJ, sample_EJ = torch.meshgrid(torch.arange(epochs), torch.arange(each), indexing="ij")
    image_EJ, variant_EJ = shown(sample_EJ, epoch_EJ, each=each, images=images, variants=variants)
    rows = torch.stack([first + sample_EJ, epoch_EJ, variant_EJ], -1).flatten(0, 1).int()
    by_image = torch.argsort(image_EJ.flatten(), stable=True)
    counts = torch.bincount(image_EJ.flatten(), minlength=images).tolist()
    return [part.numpy() for part in rows[by_image].split(counts)]


def _check_labels(coreset: Coreset, labels: SoftLabels) -> None:
    without = "export without labels: --no-labels"
    if (coreset.manifest["model"] or {}).get("start") == "noise":
        raise CoresetError(
            f"{coreset.folder}: its labels belong to images that the model made from the prompt "
            f"alone (--start noise), not to stored ones: {without}"
        )
    each = coreset.samples_per_class + coreset.doped_samples_per_class
    expected = len(coreset.class_ids) * each
    if labels.samples != expected:
        raise CoresetError(
            f"stored labels: expected {expected} samples, as many as the coreset shows in an "
            f"epoch, got {labels.samples}: label the coreset again, or {without}"
        )
