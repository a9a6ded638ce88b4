"""Label codecs: how a teacher's answers are kept in labels.safetensors. Torch-free at import.

    dense   logits         fp16  [E, N, K]
    topk    probabilities  fp16  [E, N, k]
            classes        int16 [E, N, k]
    pca     basis          fp32  [1 + k, K]
            codes          int8  [E, N, k]

A manifest may also say `none`: nothing is stored, and the teacher answers online.

Two codecs are equal when they keep the same of every answer. Each has
    name, option      as --codec and manifests spell it, and the option that gives k, if any
    k                 numbers kept per answer; None: one per class
    keeps_logits      whether it decodes to logits; else to probabilities at the stored temperature
    chosen            the codec with its option as given, or with the default; ValueError in the
                      words of the options when it cannot keep answers about that many classes
    check             the same check of a codec that a file names; raises CoresetError
    parts             the parts of the file in order, each with the shape of one answer or shared
    fit               fits the basis that all answers share to some logits [M, K], and says how good
                      it is; None for a codec without a basis
    encode, decode    logits → rows of the parts on the CPU (CoresetError for a logit that is not
                      finite in fp16); rows → targets, on their device

Legend: E epochs, N samples, K classes, k kept probabilities or components, B rows, M answers that a
basis is fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ..errors import CoresetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_CLASSES = 32256
"""Limit of any label file: this number marks a missing class in an int16 index."""
COMPONENTS, MOST_COMPONENTS = 40, 256
MOST_F16, MOST_F32 = 65504.0, (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Part:
    """One tensor of a label file."""

    name: str
    kind: str
    """The dtype as safetensors names it: F32, F16, I16 or I8."""
    shape: tuple[int, ...]
    bounds: tuple[float, float]
    """Least and largest number in it; every number is finite."""
    missing: float = math.nan
    """Value in a recording where an answer is missing; no answer contains it."""
    of_answers: bool = True
    """Whether each answer has a row; else all answers share the part."""

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
    """Labels of B pictures as the loss reads them; top-k labels are not expanded to [B, K]."""

    labels: Tensor
    """fp16: logits [B, K], or the k largest probabilities [B, k] at the labels' temperature."""
    classes: Tensor | None = None
    """int16 [B, k] beside probabilities; None beside logits."""

    def rows(self, rows_B: Tensor) -> SoftTargets:
        """The labels of some of the pictures."""
        classes = None if self.classes is None else self.classes[rows_B]
        return SoftTargets(self.labels[rows_B], classes)


@dataclass(frozen=True)
class Dense:
    """All logits in fp16. The temperature is applied when they are read."""

    k: None = None
    name: ClassVar[str] = "dense"
    option: ClassVar[str | None] = None
    keeps_logits: ClassVar[bool] = True
    fit = None

    @classmethod
    def chosen(cls, given: int | None, classes: int) -> Self:
        return cls()

    def check(self, classes: int) -> None:
        pass

    def parts(self, classes: int) -> tuple[Part, ...]:
        return (Part("logits", "F16", (classes,), (-MOST_F16, MOST_F16)),)

    def encode(self, logits_BK: Tensor, temperature: float, basis: Tensor | None) -> list[Tensor]:
        return [as_fp16(logits_BK)]

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        return SoftTargets(parts_B[0])


@dataclass(frozen=True)
class TopK:
    """The k largest probabilities at the manifest's temperature, and their classes, largest first.

    The rest of the mass is spread evenly over the other K - k classes.
    """

    k: int = 10
    name: ClassVar[str] = "topk"
    option: ClassVar[str | None] = "top_k"
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
        probabilities = Part("probabilities", "F16", (self.k,), (0, 1))
        indices = (0, classes - 1)
        return probabilities, Part("classes", "I16", (self.k,), indices, missing=MOST_CLASSES)

    def encode(self, logits_BK: Tensor, temperature: float, basis: Tensor | None) -> list[Tensor]:
        return [*encode_topk(logits_BK.half(), k=self.k, temperature=temperature)]

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        return SoftTargets(*parts_B)


@dataclass(frozen=True)
class Pca:
    """A code of 8 bits for each of k principal components; basis.py has the formulas.

    Decoded logits have mean 0 over the classes.
    """

    k: int = COMPONENTS
    name: ClassVar[str] = "pca"
    option: ClassVar[str | None] = "components"
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
        finite = (-MOST_F32, MOST_F32)
        basis = Part("basis", "F32", (1 + self.k, classes), finite, of_answers=False)
        return basis, Part("codes", "I8", (self.k,), (-127, 127), missing=-128)

    def fit(self, logits_MK: Tensor) -> tuple[Tensor, str]:
        from .basis import fit_and_test

        return fit_and_test(logits_MK, self.k)

    def encode(self, logits_BK: Tensor, temperature: float, basis: Tensor | None) -> list[Tensor]:
        from .basis import encode_in_basis

        assert basis is not None
        return [encode_in_basis(as_fp16(logits_BK), basis)]

    def decode(self, parts_B: Sequence[Tensor], basis: Tensor | None) -> SoftTargets:
        from .basis import decode_in_basis

        assert basis is not None
        return SoftTargets(decode_in_basis(parts_B[0], basis))


Codec = Dense | TopK | Pca
CodecName = Literal["dense", "topk", "pca"]
DEFAULT_CODEC: CodecName = "dense"
CODECS = {kind.name: kind for kind in (Dense, TopK, Pca)}


@dataclass(frozen=True)
class Encoding:
    """A codec with all that it needs to encode and decode."""

    codec: Codec
    temperature: float
    """Softmax temperature of kept probabilities; logits are kept without it."""
    basis: Tensor | None = None

    def encode(self, logits_BK: Tensor) -> list[Tensor]:
        """Rows of the parts, on the CPU; CoresetError for a logit that is not finite in fp16."""
        return self.codec.encode(logits_BK, self.temperature, self.basis)

    def decode(self, parts_B: Sequence[Tensor], device: torch.device | None = None) -> SoftTargets:
        """Targets for a student, on a device. Default: the CPU."""
        return self.codec.decode([part.to(device) for part in parts_B], self.basis)


def describe_codec(codec: Codec) -> dict[str, Any]:
    """The codec's entries in a manifest."""
    return {"codec": codec.name} | ({} if codec.k is None else {"k": codec.k})


def described_codec(described: Mapping[str, Any]) -> Codec:
    """The codec of labels that a manifest describes; CoresetError for an unknown one."""
    name = described["codec"]
    if name not in CODECS:
        known = ", ".join(CODECS)
        raise CoresetError(f"label codec: expected {known} or none, got {name!r}")
    return CODECS[name](described["k"]) if "k" in described else CODECS[name]()


def codec_options(codec: Codec) -> dict[str, Any]:
    """The options of `train` that select this codec."""
    own = {} if codec.option is None else {f"--{codec.option.replace('_', '-')}": codec.k}
    return {"--codec": codec.name} | own


def kept_by_option(codec: Codec | None) -> dict[str, int | None]:
    """k of a codec by the option that gives it; None for every other codec's option."""
    return {
        kind.option: codec.k if codec and codec.option == kind.option else None
        for kind in CODECS.values()
        if kind.option
    }


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
