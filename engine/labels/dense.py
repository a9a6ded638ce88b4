"""Codec dense: all logits in fp16. The temperature is applied when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from .codec import Part, SoftTargets, as_fp16

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Two bytes for each class of an answer."""

    k: None = None
    name: ClassVar[str] = "dense"
    option: ClassVar[str | None] = None
    smaller: ClassVar[str | None] = "pca"
    keeps_logits: ClassVar[bool] = True
    fit = None

    @classmethod
    def chosen(cls, given: int | None, classes: int) -> Self:
        return cls()

    def check(self, classes: int) -> None:
        pass

    def parts(self, classes: int) -> tuple[Part, ...]:
        return (Part("logits", "F16", (classes,)),)

    def encode(
        self, logits_BK: Tensor, temperature: float, basis: Tensor | None
    ) -> tuple[Tensor, ...]:
        return (as_fp16(logits_BK),)

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        return SoftTargets(parts_B[0])
