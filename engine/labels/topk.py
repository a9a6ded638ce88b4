"""Codec topk: the k largest probabilities, fp16, and their classes, int16, largest first.

The probabilities are those at the manifest's temperature. What is left of the mass is spread evenly
over the other K - k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ..errors import CoresetError
from .codec import MOST_CLASSES, Part, SoftTargets, checked_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Four bytes for each probability kept."""

    k: int = 10
    name: ClassVar[str] = "topk"
    option: ClassVar[str | None] = "top_k"
    smaller: ClassVar[str | None] = None
    keeps_logits: ClassVar[bool] = False
    fit = None

    @classmethod
    def chosen(cls, given: int | None, classes: int) -> Self:
        k = cls.k if given is None else given
        if classes <= 2 * k:
            raise ValueError(
                f"--codec topk --top-k {k} keeps {min(k, classes)} of {classes} probabilities, "
                "no less than dense: give a smaller --top-k, or --codec dense"
            )
        return cls(k)

    def check(self, classes: int) -> None:
        if not (self.k >= 1 and 2 * self.k < classes):
            raise CoresetError(
                f"codec topk: expected 1 <= k and 2k < {classes} classes, got k={self.k}: "
                "use a smaller k, or dense, which is as small here"
            )

    def parts(self, classes: int) -> tuple[Part, ...]:
        probabilities = Part("probabilities", "F16", (self.k,))
        return probabilities, Part("classes", "I16", (self.k,), missing=MOST_CLASSES)

    def encode(
        self, logits_BK: Tensor, temperature: float, basis: Tensor | None
    ) -> tuple[Tensor, ...]:
        return encode_topk(logits_BK.half(), k=self.k, temperature=temperature)

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        return SoftTargets(*parts_B)


def encode_topk(logits_NK: Tensor, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest of softmax(logits / T): (fp16 probabilities, int16 classes), both [N, k].

    Equal probabilities keep the lower class first, so that the bytes do not depend on the machine.
    """
    logits_NK = checked_finite(logits_NK.cpu().float())
    ordered = (logits_NK / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    probabilities, classes = ordered.values[:, :k].half(), ordered.indices[:, :k].short()
    return probabilities.contiguous(), classes.contiguous()


def decode_topk(probabilities_Bk: Tensor, classes_Bk: Tensor, classes: int) -> Tensor:
    """The full distribution [B, K] in fp32: rows sum to 1, the rest is spread evenly."""
    kept = probabilities_Bk.float()
    rest = (1.0 - kept.sum(1, keepdim=True)).clamp_min(0.0) / (classes - kept.shape[1])
    full_BK = rest.expand(-1, classes).scatter(1, classes_Bk.long(), kept)
    return full_BK / full_BK.sum(1, keepdim=True)
