"""Codec pca: int8 codes of k principal components; basis.py has the formulas.

The codes give logits back, less their mean over the classes. The basis is fitted first, to other
answers of the teacher, and lies in the file before the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ..errors import CoresetError
from .codec import Part, SoftTargets, as_fp16

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS, MOST_COMPONENTS = 40, 256


@dataclass(frozen=True)
class Pca:
    """A byte for each component of an answer."""

    k: int = COMPONENTS
    name: ClassVar[str] = "pca"
    option: ClassVar[str | None] = "components"
    smaller: ClassVar[str | None] = None
    keeps_logits: ClassVar[bool] = True

    @classmethod
    def chosen(cls, given: int | None, classes: int) -> Self:
        k = min(COMPONENTS, classes - 1) if given is None else given
        if classes == 1:
            raise ValueError(
                "--codec pca: an answer about 1 class has no components: give --codec dense"
            )
        if k >= classes:
            raise ValueError(
                f"--codec pca --components {k}: answers about {classes} classes have "
                f"{classes - 1} components: give fewer, or leave --components out"
            )
        return cls(k)

    def check(self, classes: int) -> None:
        if not 1 <= self.k < classes:
            raise CoresetError(
                f"codec pca: expected 1 <= k < {classes} classes, got k={self.k}: "
                + (f"{classes - 1} keep everything" if classes > 1 else "use dense")
            )

    def parts(self, classes: int) -> tuple[Part, ...]:
        basis = Part("basis", "F32", (1 + self.k, classes), of_answers=False)
        return basis, Part("codes", "I8", (self.k,), missing=-128)  # codes are -127..127

    def fit(self, logits_MK: Tensor) -> tuple[Tensor, str]:
        from .basis import fit_and_test

        return fit_and_test(logits_MK, self.k)

    def encode(
        self, logits_BK: Tensor, temperature: float, basis: Tensor | None
    ) -> tuple[Tensor, ...]:
        from .basis import encode_in_basis

        assert basis is not None
        return (encode_in_basis(as_fp16(logits_BK), basis),)

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        from .basis import decode_in_basis

        assert basis is not None
        return SoftTargets(decode_in_basis(parts_B[0], basis))
