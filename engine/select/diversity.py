"""Diverse patches of a class: greedy selection on the teacher's features.

Patches with the lowest losses are often near-duplicates. The candidates are the patches with the
lowest losses, a few times as many as are kept. Patches are chosen from them one by one, with
s_ij = cosine of the features of i and j:

    facility-location   argmax_j sum_i max(0, s_ij - max_{c chosen} s_ic)   typical of the rest
    k-center            argmin_j max_{c chosen} s_jc                        far from the chosen
    margin              half by facility location, then the highest losses of the rest

The first facility is the candidate most like all others, the first centre the one with the lowest
loss. The greedy sum is at least 1 - 1/e of the best (Nemhauser et al. 1978), the greedy radius at
most twice the best (Gonzalez 1985). `margin` is after BPS, which takes half of a class from cluster
centres and half where the teacher is least sure; here the loss stands for the teacher's margin.
Similarities are rounded to 2^-20 and summed as integers, so the order of summation does not matter,
and ties go to the lower (loss, index). A rule of one's own (`Rule`) may take their place.

Legend: C candidates of one class, in ascending order of (loss, index); D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ..data.crops import BoxFn, CropStream
from ..data.images import InputError
from ..errors import reason
from ..peers import Peers, share_of
from .best import BestPatches, best_of_all

DiverseChoice = Literal["facility-location", "k-center", "margin"]
_ONE = 2**20


class Rule(Protocol):
    """A choice of one's own among the candidates of one class: any function like this."""

    def __call__(self, seen: np.ndarray, losses: np.ndarray, count: int, /) -> Sequence[int]:
        """Indices of `count` different candidates.

        Candidates come in ascending order of loss. seen: the teacher's features, fp32 [C, D], or
        without a teacher the patches, uint8 [C, H, W, 3]. losses: the teacher's cross-entropy in
        nats, fp32 [C]; NaN without a teacher.
        """
        ...


def rule_name(rule: Rule) -> str:
    """`module:name`, for a manifest."""
    known = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{known.__module__}:{getattr(known, '__qualname__', '')}"


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How to choose among the patches with the lowest losses."""

    choice: DiverseChoice | Rule
    """Greedy criterion, or a rule of one's own."""
    features: int
    """D: number of the teacher's features; unused without a teacher."""
    candidates: int = 4
    """Candidates per kept patch, as far as a class has images."""


class Chosen(NamedTuple):
    """A chosen patch; its key is the image's index."""

    label: int
    place: int
    """Rank in the order of choice within its class."""
    loss: float
    box_4: np.ndarray


def diverse_choice(features_CD: np.ndarray, count: int, choice: DiverseChoice) -> list[int]:
    """Choose `count` of the C candidates; return them in order of choice. fp32 features, any norm.

    Memory is C² numbers; time is count · C².
    """
    if choice == "margin":
        typical = diverse_choice(features_CD, count - count // 2, "facility-location")
        unsure = [each for each in reversed(range(len(features_CD))) if each not in typical]
        return typical + unsure[: count // 2]
    unit_CD = features_CD.astype(np.float64)
    unit_CD /= np.maximum(np.linalg.norm(unit_CD, axis=1, keepdims=True), 1e-30)
    similar_CC = np.rint(unit_CD @ unit_CD.T * _ONE).astype(np.int64)
    chosen: list[int] = []
    nearest_C = np.full(len(similar_CC), -_ONE)
    for _ in range(count):
        if choice == "facility-location":
            worth_C = np.maximum(similar_CC - nearest_C[:, None], 0).sum(0)
        else:
            worth_C = _ONE - nearest_C  # 0 for a duplicate of a chosen one
        worth_C[chosen] = -1
        chosen.append(int(worth_C.argmax()))  # the first of equals
        nearest_C = np.maximum(nearest_C, similar_CC[chosen[-1]])
    return chosen


def _by_rule(rule: Rule, seen: np.ndarray, losses_C: np.ndarray, count: int) -> list[int]:
    try:
        picks = np.asarray(rule(seen, losses_C, count)).tolist()
    except Exception as error:  # others' code
        raise InputError(f"rule {rule_name(rule)} raised {reason(error)}") from error
    indices = isinstance(picks, list) and all(type(pick) is int for pick in picks)
    if not indices or not len({*picks} & {*range(len(seen))}) == len(picks) == count:
        raise InputError(
            f"rule {rule_name(rule)}: expected {count} different indices from 0 to "
            f"{len(seen) - 1}, got {picks}"
        )
    return picks


def choose_diverse(
    candidates: BestPatches, per_class: int, choice: DiverseChoice | Rule
) -> dict[int, Chosen]:
    """Choose `per_class` candidates of every class; return them by image index.

    Rows of `candidates` are features, or for a rule patches; no offer may follow. Raises InputError
    for a rule that returns anything but `per_class` different candidates.
    """
    counts = candidates.counts()
    candidates.sort()
    chosen: dict[int, Chosen] = {}
    for label, count in enumerate(counts):
        seen = candidates.rows_KN[label, :count].numpy()
        if callable(choice):
            losses_C = candidates.losses_KN[label, :count].numpy()
            picks = _by_rule(choice, seen, losses_C, per_class)
        else:
            picks = diverse_choice(seen, per_class, choice)
        for place, pick in enumerate(picks):
            chosen[int(candidates.source_index_KN[label, pick])] = Chosen(
                label,
                place,
                float(candidates.losses_KN[label, pick]),
                candidates.boxes_KN4[label, pick].numpy(),
            )
    return chosen


def cut_again(
    chosen: dict[int, Chosen],
    per_class: int,
    patch_px: int,
    stream: Callable[[np.ndarray, BoxFn], CropStream],
    *,
    batch: int,
    peers: Peers,
) -> BestPatches:
    """Cut the pixels of chosen patches from `stream`(image indices, boxes).

    `peers` share the work batch by batch; each gets all patches, keyed by place.
    """

    def boxes(index_B: np.ndarray, _: np.ndarray, __: np.ndarray, ___: int) -> np.ndarray:
        return np.stack([chosen[index].box_4 for index in index_B.tolist()])[:, None]

    classes = len(chosen) // per_class
    best = BestPatches(classes, per_class, (patch_px, patch_px, 3))
    for crops in stream(share_of(np.array(sorted(chosen)), batch, peers), boxes):
        for b, index in enumerate(crops.index_B.tolist()):
            each = chosen[index]
            row, box_4 = crops.pixels_BPHWC[b, 0], crops.boxes_BP4[b, 0]
            best.offer(each.label, float(each.place), index, row, each.loss, box_4)
    return best_of_all(best, peers)
