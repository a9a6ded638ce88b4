"""Patches of a dataset: the teacher's scores of seeded crops, and the best of every class.

The procedure is RDED's (Sun et al., CVPR 2024; its ``synthesize`` folder): take a pool of images
per class, cut P random resized crops of each image, put each crop in the centre of a canvas of the
full image size, and score it by the teacher's cross-entropy. The best crop of an image competes
with those of the other images; the ipc · factor² lowest losses of a class are kept. The canvas has
the mean colour, which is RDED's zero after normalisation. Beyond RDED, an option chooses diverse
patches among more candidates of low loss (diversity.py): candidates keep features, not pixels, and
the chosen ones are cut again. With 1000 classes, 160 candidates each and a ResNet-18, the features
take 0.33 GB.

Shapes: B images, P crops of one image, K classes, N = K · per_class patches, H = W = patch_px. A
box is (top, left, height, width) in pixels of the upright image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ...kernels.noise import Draw, uniform_numpy
from ..data.boxes import RandomResizedCrops
from ..data.crops import CropBatch, stream_crops
from ..data.images import ImageSet, InputError
from ..peers import ALONE, Peers, share_of
from .best import BestPatches, best_of_all
from .diversity import Diversity, choose_diverse, cut_again
from .scores import IMAGENET_MEAN_RGB, PatchScorer, Scoring, TeacherFn


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
    per_class: int,
    patch_px: int,
    image_size_px: int,
    crops: int = 5,
    pool_per_class: int = 300,
    seed: int,
    batch: int = 64,
    diversity: Diversity | None = None,
    scoring: Scoring = "pad",
    canvas_rgb: Sequence[int] = IMAGENET_MEAN_RGB,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> PatchSelection:
    """Choose ``per_class`` patches of ``patch_px`` pixels for every class.

    Takes the first ``pool_per_class`` images of each class in the seeded order (at least as many as
    patches are needed), cuts ``crops`` crops of each, and keeps those with the lowest teacher loss.
    Without a teacher it takes the first ``per_class`` images of that order and one crop of each.
    With ``diversity`` it chooses among several times as many patches of low loss by the teacher's
    features; without a teacher, by a rule that sees one crop of each image of the pool.

    The teacher is always called on batch · crops canvases of one size (the last batch is padded).
    ``scoring`` is how it sees a patch (select/scores.py); ``canvas_rgb`` surrounds a padded patch:
    the teacher's mean colour. ``progress`` receives (images done, all images). ``peers`` share the
    images batch by batch, and all return what one process would.

    Raises InputError, saying what to do, when a class has too few images, a file is undecodable, or
    the teacher has another number of classes.
    """
    if teacher is None:
        crops, pool_per_class = 1, per_class if diversity is None else pool_per_class
    classes, ranked = len(images.class_ids), selection_order(images.labels, seed)
    fewest = min(len(order) for order in ranked)
    if fewest < per_class:
        raise InputError(
            f"{images.root}: expected at least {per_class} images in every class (ipc * factor^2), "
            f"got {fewest}; lower --ipc or --factor, or add images"
        )
    pools = [order[: max(pool_per_class, per_class)] for order in ranked]
    pooled = np.concatenate(pools)
    boxes = RandomResizedCrops(crops=crops, seed=seed, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    scorer = PatchScorer(teacher, classes, image_size_px, batch * crops, canvas_rgb, scoring)
    kept = per_class
    if diversity is not None:
        kept = min(per_class * diversity.candidates, max(map(len, pools)))
    if diversity is None or teacher is None:
        best = BestPatches(classes, kept, (patch_px, patch_px, 3))
    else:
        best = BestPatches(classes, kept, (diversity.features,), torch.float32)
    stream = partial(
        stream_crops, images, size_px=patch_px, batch=batch, device=device, threads=threads
    )
    done = 0
    for crop_batch in stream(share_of(pooled, batch, peers), boxes, crops=crops):
        losses_BP, features_BPD = scorer(crop_batch.pixels_BPHWC, crop_batch.labels_B)
        by_features = diversity is not None and teacher is not None
        kept_BP = features_BPD if by_features else crop_batch.pixels_BPHWC
        assert kept_BP is not None
        _offer(best, crop_batch, losses_BP, kept_BP)
        done += len(crop_batch.labels_B)
        if progress:
            progress(min(done * peers.size, len(pooled)), len(pooled))
    best = best_of_all(best, peers)
    if diversity is not None:
        chosen = choose_diverse(best, per_class, diversity.choice)
        again = partial(stream, crops=1)
        best = cut_again(chosen, per_class, patch_px, again, batch=batch, peers=peers)
    best.sort()
    return PatchSelection(
        patches_NHWC=best.rows_KN.flatten(0, 1),
        labels_N=torch.arange(classes).repeat_interleave(per_class),
        losses_N=best.losses_KN.flatten(),
        source_index_N=best.source_index_KN.flatten(),
        boxes_N4=best.boxes_KN4.flatten(0, 1),
    )


def _offer(
    best: BestPatches, crops: CropBatch, losses_BP: np.ndarray, kept_BP: torch.Tensor
) -> None:
    """Offer the best crop of each image, ranked by loss, or by image index alone without losses."""
    labels_B, index_B = crops.labels_B.tolist(), crops.index_B.tolist()
    best_B = losses_BP.argmin(axis=1)  # The first of equals; torch does not promise it.
    for b, crop in enumerate(best_B.tolist()):
        loss = float(losses_BP[b, crop])
        key = float(np.nan_to_num(loss))
        best.offer(labels_B[b], key, index_B[b], kept_BP[b, crop], loss, crops.boxes_BP4[b, crop])
