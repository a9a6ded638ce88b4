"""A label codec: one object that knows how a teacher's answers are kept in labels.safetensors.

Each is a frozen dataclass, listed in codecs.py. Torch-free at import, so that --help is quick.

Legend: E epochs, N samples, K classes, k kept numbers, B rows, M answers that a basis is fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from ..errors import CoresetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_CLASSES = 32256
"""Of any label file: as int16 indices, this one stands for a missing class."""


@dataclass(frozen=True)
class Part:
    """One tensor of a label file."""

    name: str
    kind: str
    """The dtype as safetensors names it: F32, F16, I16 or I8."""
    shape: tuple[int, ...]
    missing: float = math.nan
    """What a recording holds where an answer is missing; no answer may contain it."""
    of_answers: bool = True
    """Whether it has a row for every answer; else all answers share it."""

    @property
    def row_bytes(self) -> int:
        """Size of its last dimension, which is one answer unless the part is shared."""
        return int(self.kind[1:]) // 8 * self.shape[-1]

    @property
    def bytes(self) -> int:
        """Size of the whole part."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class SoftTargets:
    """Labels of B pictures as the loss reads them, without a dense [B, K] of top-k ones."""

    labels: Tensor
    """fp16: logits [B, K], or the k largest probabilities [B, k] at the labels' temperature."""
    classes: Tensor | None = None
    """int16 [B, k] beside probabilities; None beside logits."""

    def rows(self, rows_B: Tensor) -> SoftTargets:
        """The labels of some of the pictures."""
        classes = None if self.classes is None else self.classes[rows_B]
        return SoftTargets(self.labels[rows_B], classes)


class Codec(Protocol):
    """How answers are kept. Two codecs are equal when they keep the same of every answer."""

    name: ClassVar[str]
    """As --codec and manifests spell it."""
    option: ClassVar[str | None]
    """Name of the option that gives k, with underscores; None where there is no k."""
    keeps_logits: ClassVar[bool]
    """Whether it decodes to logits, or else to probabilities at the stored temperature."""

    @property
    def k(self) -> int | None:
        """Numbers kept of an answer; None for one number per class."""
        ...

    @classmethod
    def chosen(cls, given: int | None, classes: int) -> Self:
        """The codec with its option as given, or with the default.

        ValueError in the words of the options where it cannot keep answers about `classes`.
        """
        ...

    def check(self, classes: int) -> None:
        """CoresetError where it cannot keep answers about `classes`."""
        ...

    def parts(self, classes: int) -> tuple[Part, ...]:
        """The parts of the file, in its order, each with the shape of one answer or shared."""
        ...

    @property
    def fit(self) -> Callable[[Tensor], tuple[Tensor, str]] | None:
        """Make the basis that all answers share of some logits [M, K]; also says how good it is.

        None for a codec without a basis.
        """
        ...

    def encode(self, logits_BK: Tensor, temperature: float, basis: Tensor | None) -> list[Tensor]:
        """Rows of the parts, on the CPU; CoresetError for a logit that is not finite in fp16."""
        ...

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        """What the rows say, on their device."""
        ...


@dataclass(frozen=True)
class Encoding:
    """A codec with all that it needs to encode and decode."""

    codec: Codec
    temperature: float
    """Softmax temperature of kept probabilities; logits are kept without it."""
    basis: Tensor | None = None

    def __post_init__(self) -> None:
        require_basis(self.codec, self.basis)

    def encode(self, logits_BK: Tensor) -> list[Tensor]:
        """Rows of the parts, on the CPU; CoresetError for a logit that is not finite in fp16."""
        return self.codec.encode(logits_BK, self.temperature, self.basis)

    def decode(self, parts_B: Sequence[Tensor], device: torch.device | None = None) -> SoftTargets:
        """What a student learns from, on a device. Default: the CPU."""
        return self.codec.decode([part.to(device) for part in parts_B], self.basis)


def require_basis(codec: Codec, basis: Any) -> None:
    """ValueError unless there is a basis exactly where the codec has one."""
    if (codec.fit is None) != (basis is None):
        expected = "no basis" if codec.fit is None else "a basis"
        raise ValueError(f"codec {codec.name}: expected {expected}")


def describe_codec(codec: Codec) -> dict[str, Any]:
    """The codec in a manifest."""
    return {"codec": codec.name} | ({} if codec.k is None else {"k": codec.k})


def codec_options(codec: Codec) -> dict[str, Any]:
    """The options of `train` that ask for this codec."""
    own = {} if codec.option is None else {f"--{codec.option.replace('_', '-')}": codec.k}
    return {"--codec": codec.name} | own


def as_fp16(logits: Tensor) -> Tensor:
    """Logits rounded to fp16, on the CPU; CoresetError for one that is not finite there."""
    return checked_finite(logits.half().cpu().contiguous())


def checked_finite(logits: Tensor) -> Tensor:
    """The same logits; CoresetError for one that is not finite."""
    if not bool(logits.isfinite().all()):
        raise CoresetError(
            "teacher logits: expected finite values within fp16 (65504), got NaN or infinity: "
            "check the teacher's weights and normalisation"
        )
    return logits
