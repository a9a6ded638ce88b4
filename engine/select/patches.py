"""Patches of a dataset: seeded crop boxes, the teacher's scores, the best patches of every class.

The procedure is RDED's (Sun et al., CVPR 2024; its ``synthesize`` folder): take a pool of images
per class, cut P random resized crops of each image, put each crop in the centre of a canvas of the
full image size, and score it by the teacher's cross-entropy. The best crop of an image competes
with those of the other images; the ipc · factor² lowest losses of a class are kept. The canvas has
the mean colour, which is RDED's zero after normalisation. Beyond RDED, an option chooses diverse
patches among more candidates of low loss (diversity.py): candidates keep features, not pixels, and
the chosen ones are cut again. With 1000 classes, 160 candidates each and a ResNet-18, the features
take 0.33 GB.

Shapes: B images, P crops of one image, T tries for a box, K classes, N = K · per_class patches,
H = W = image_size_px // factor. A box is (top, left, height, width) in pixels of the
upright image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import torch

from ...kernels.noise import Draw, uniform_numpy
from ..data.images import CropBatch, ImageSet, InputError, stream_crops
from ..peers import ALONE, Peers, share_of
from .best import BestPatches, best_of_all
from .diversity import Diversity, choose_diverse, cut_again
from .scores import (
    IMAGENET_MEAN_RGB,
    PatchScorer,
    Scores,
    Scoring,
    TeacherFn,
)

TRIES = 10
Method = Literal["lowest-loss", "random"]


def resized_crop_boxes(
    uniforms_BPT4: np.ndarray,
    heights_B: np.ndarray,
    widths_B: np.ndarray,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """torchvision's RandomResizedCrop as a function of its uniform numbers: int64 [B, P, 4].

    Try t of a crop has four numbers in (0, 1): area, log of the aspect ratio (width / height), top
    and left. The first try whose rounded box fits the image wins; if none of the T fits, the result
    is the largest centred box of the nearest allowed ratio. torchvision draws until a try fits, and
    only then top and left; drawing all of them at once leaves the distribution unchanged and makes
    a box a pure function of (seed, draw, sample, epoch). Computed in float64.
    """
    area_BPT, aspect_BPT, top_BPT, left_BPT = np.moveaxis(uniforms_BPT4.astype(np.float64), -1, 0)
    height_B11, width_B11 = heights_B[:, None, None], widths_B[:, None, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target_BPT = height_B11 * width_B11 * (scale[0] + (scale[1] - scale[0]) * area_BPT)
    root_BPT = np.exp(0.5 * (low + (high - low) * aspect_BPT))
    side_BPT = np.sqrt(target_BPT)
    h_BPT = np.rint(side_BPT / root_BPT).astype(np.int64)
    w_BPT = np.rint(side_BPT * root_BPT).astype(np.int64)
    fits_BPT = (h_BPT > 0) & (w_BPT > 0) & (h_BPT <= height_B11) & (w_BPT <= width_B11)
    top_BPT = np.floor(top_BPT * (height_B11 - h_BPT + 1)).astype(np.int64)
    left_BPT = np.floor(left_BPT * (width_B11 - w_BPT + 1)).astype(np.int64)
    boxes_BPT4 = np.stack((top_BPT, left_BPT, h_BPT, w_BPT), axis=-1)
    first_BP11 = fits_BPT.argmax(axis=-1)[..., None, None]
    boxes_BP4 = np.take_along_axis(boxes_BPT4, first_BP11, axis=2)[:, :, 0]
    fallback_B14 = _central_boxes(heights_B, widths_B, ratio)[:, None]
    return np.where(fits_BPT.any(axis=-1)[..., None], boxes_BP4, fallback_B14)


def _central_boxes(
    heights_B: np.ndarray, widths_B: np.ndarray, ratio: tuple[float, float]
) -> np.ndarray:
    """The largest centred box whose width / height is inside ``ratio``: int64 [B, 4]."""
    w_B = np.minimum(widths_B, np.rint(heights_B * ratio[1]).astype(np.int64))
    h_B = np.minimum(heights_B, np.rint(widths_B / ratio[0]).astype(np.int64))
    return np.stack(((heights_B - h_B) // 2, (widths_B - w_B) // 2, h_B, w_B), axis=-1)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrops:
    """Boxes for ``stream_crops``: crop p of a sample uses elements 4·T·p … of its uniform draw."""

    crops: int
    seed: int
    draw: Draw
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(
        self, sample_B: np.ndarray, heights_B: np.ndarray, widths_B: np.ndarray, epoch: int
    ) -> np.ndarray:
        """boxes_BP4, int64; sizes in pixels."""
        count = self.crops * TRIES * 4
        uniforms = uniform_numpy(self.seed, self.draw, sample_B, epoch, count)
        uniforms_BPT4 = uniforms.reshape(len(sample_B), self.crops, TRIES, 4)
        return resized_crop_boxes(
            uniforms_BPT4, heights_B, widths_B, scale=self.scale, ratio=self.ratio
        )


@dataclass(frozen=True)
class PatchSelection:
    """The chosen patches by class, in order of loss or of choice; all on the CPU."""

    patches_NHWC: torch.Tensor
    """uint8."""
    labels_N: torch.Tensor
    """int64, ascending."""
    losses_N: torch.Tensor
    """float32: the teacher's cross-entropy in nats; NaN without a teacher."""
    source_index_N: torch.Tensor
    """int64: position in ``ImageSet.paths``; no image twice."""
    boxes_N4: torch.Tensor
    """int64: the patch's box in the upright source image."""
    skipped: tuple[str, ...]
    """Paths of undecodable files that were skipped."""


def selection_order(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Image indices of each class, in the seeded order that fills the pool."""
    index = np.arange(len(labels))
    rank = uniform_numpy(seed, Draw.SELECTION, index, 0, 1)[:, 0]
    order = np.lexsort((index, rank, labels))
    return np.split(order, np.flatnonzero(np.diff(labels)) + 1)


def select_patches(
    images: ImageSet,
    teacher: TeacherFn | None,
    *,
    ipc: int,
    factor: int,
    image_size_px: int,
    crops: int = 5,
    pool_per_class: int = 300,
    seed: int,
    batch: int = 64,
    method: Method = "lowest-loss",
    diversity: Diversity | None = None,
    scoring: Scoring = "pad",
    canvas_rgb: Sequence[int] = IMAGENET_MEAN_RGB,
    device: str = "cpu",
    threads: int | None = None,
    skip_corrupt: bool = False,
    progress: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> PatchSelection:
    """Choose ipc · factor² patches of image_size_px // factor pixels for every class.

    "lowest-loss" takes the first ``pool_per_class`` decodable images of each class in the seeded
    order (at least as many as patches are needed), cuts ``crops`` crops of each, and keeps those
    with the lowest teacher loss. "random" takes the first ipc · factor² images of that order and
    one crop of each; a teacher, if given, only reports their losses. With ``diversity``, which
    needs a teacher that returns features, "lowest-loss" chooses among several times as many patches
    of low loss.

    The teacher is always called on batch · crops canvases of one size (the last batch is padded).
    ``scoring`` is how it sees a patch (select/scores.py); ``canvas_rgb`` surrounds a padded patch:
    the teacher's mean colour. ``progress`` receives (images done, all images). ``peers`` share the
    images batch by batch, and all return what one process would (after an undecodable file only up
    to the rounding of the teacher's outputs, because later images move up in the batches).

    Raises InputError, saying what to do, when sizes do not fit, a class has too few images, a file
    is undecodable (see ``stream_crops``), or the teacher has another number of classes.
    """
    patch_px, per_class = _sizes(ipc, factor, image_size_px)
    if method == "random":
        crops, pool_per_class = 1, per_class
    elif teacher is None:
        raise ValueError(f"method {method}: expected a teacher, got None")
    ranked = selection_order(images.labels, seed)
    _require_enough(images, [len(order) for order in ranked], per_class, "images")
    taken = [min(len(order), max(pool_per_class, per_class)) for order in ranked]
    pending = np.concatenate([order[:n] for order, n in zip(ranked, taken, strict=True)])
    boxes = RandomResizedCrops(crops=crops, seed=seed, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    scorer = PatchScorer(
        teacher, len(images.class_ids), image_size_px, batch * crops, canvas_rgb, scoring
    )
    best = _room(len(images.class_ids), per_class, patch_px, max(taken), diversity)
    stream = partial(
        stream_crops,
        images,
        size_px=patch_px,
        batch=batch,
        device=device,
        threads=threads,
        skip_corrupt=skip_corrupt,
    )
    skipped: list[int] = []
    done, total = 0, len(pending)
    while len(pending):
        crop_batches = stream(share_of(pending, batch, peers), boxes, crops=crops)
        for crop_batch in crop_batches:
            scores = scorer(crop_batch.pixels_BPHWC, crop_batch.labels_B)
            kept_BP = crop_batch.pixels_BPHWC if diversity is None else scores.features()
            _offer(best, crop_batch, scores, kept_BP, by_loss=method == "lowest-loss")
            done += len(crop_batch.labels_B)
            if progress:
                progress(min(done * peers.size, total), total)
        left_out = sorted(chain.from_iterable(peers.all_gather(list(crop_batches.skipped))))
        skipped += left_out
        pending = _replacements(ranked, taken, images.labels[left_out])
    best = best_of_all(best, peers)
    _require_enough(images, best.counts(), per_class, "decodable images")
    if diversity is not None:
        best = cut_again(
            choose_diverse(best, per_class, diversity.choice),
            per_class,
            patch_px,
            partial(stream, crops=1),
            batch=batch,
            peers=peers,
        )
    best.sort()
    return PatchSelection(
        patches_NHWC=best.rows_KN.flatten(0, 1),
        labels_N=torch.arange(len(images.class_ids)).repeat_interleave(per_class),
        losses_N=best.losses_KN.flatten(),
        source_index_N=best.source_index_KN.flatten(),
        boxes_N4=best.boxes_KN4.flatten(0, 1),
        skipped=tuple(images.paths[index] for index in skipped),
    )


def _room(
    classes: int,
    per_class: int,
    patch_px: int,
    most: int,
    diversity: Diversity | None,
) -> BestPatches:
    """Storage for the patches' pixels, or for the features of at most `most` candidates a class."""
    if diversity is None:
        return BestPatches(classes, per_class, (patch_px, patch_px, 3))
    candidates = min(per_class * diversity.candidates, most)
    return BestPatches(classes, candidates, (diversity.features,), torch.float32)


def _offer(
    best: BestPatches, crops: CropBatch, scores: Scores, kept_BP: torch.Tensor, *, by_loss: bool
) -> None:
    """Offer the best crop of each image, ranked by loss or by image index alone."""
    labels_B, index_B = crops.labels_B.tolist(), crops.index_B.tolist()
    best_B = scores.losses_BP.argmin(axis=1)  # The first of equals; torch does not promise it.
    for b, crop in enumerate(best_B.tolist()):
        loss = float(scores.losses_BP[b, crop])
        best.offer(
            labels_B[b],
            loss if by_loss else 0.0,
            index_B[b],
            kept_BP[b, crop],
            loss,
            crops.boxes_BP4[b, crop],
        )


def _sizes(ipc: int, factor: int, image_size_px: int) -> tuple[int, int]:
    """(patch_px, patches per class). Raises InputError when the sizes do not fit."""
    if ipc < 1:
        raise InputError(f"ipc: expected at least 1, got {ipc}")
    if not 1 <= factor <= image_size_px or image_size_px % factor:
        raise InputError(
            f"factor: expected a divisor of the image size of {image_size_px} px, got {factor}"
        )
    return image_size_px // factor, ipc * factor**2


def _require_enough(images: ImageSet, counts: Sequence[int], needed: int, what: str) -> None:
    short = [
        f"{class_id} has {count}"
        for class_id, count in zip(images.class_ids, counts, strict=True)
        if count < needed
    ]
    if short:
        more = f" and {len(short) - 3} more classes" if len(short) > 3 else ""
        raise InputError(
            f"{images.root}: class {', '.join(short[:3])}{more}; expected at least {needed} {what} "
            "in every class (ipc * factor^2); lower --ipc or --factor, or add images"
        )


def _replacements(
    ranked: list[np.ndarray], taken: list[int], skipped_labels: np.ndarray
) -> np.ndarray:
    """The next images in the seeded order, to replace undecodable ones; advances ``taken``."""
    chosen = []
    for label, count in zip(*np.unique(skipped_labels, return_counts=True), strict=True):
        chosen.append(ranked[label][taken[label] : taken[label] + count])
        taken[label] += len(chosen[-1])
    return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
