"""Stored soft labels: the teacher's answers, one row per (epoch, sample), and their codecs.

Legend: E epochs, N samples, K classes, k kept probabilities or components, B batch.

dense   fp16 logits [E, N, K]; the temperature is applied when they are read
topk    fp16 probabilities [E, N, k] at the manifest's temperature and int16 classes [E, N, k],
        largest first; what is left of the mass is spread evenly over the other K - k classes
pca     int8 codes [E, N, k] in a basis of k principal components, see labels/pca.py: they give
        logits back, less their mean over the classes
none    nothing is stored, the teacher answers online
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import CoresetError
from .file import KeptCodec, LabelLayout, MappedParts
from .pca import (
    MISSING,
    decode_in_basis,
    encode_in_basis,
    fit_basis,
    fitted_answers,
    spread_out,
)

Codec = KeptCodec | Literal["none"]


@dataclass(frozen=True)
class SoftTargets:
    """Labels of B pictures as the loss reads them, without a dense [B, K] of top-k ones."""

    labels: Tensor
    """fp16: logits [B, K], or the k largest probabilities [B, k] at the labels' temperature."""
    classes: Tensor | None = None
    """int16 [B, k] beside probabilities; None beside logits."""

    def rows(self, rows_B: Tensor) -> SoftTargets:
        """Those of some pictures."""
        classes = None if self.classes is None else self.classes[rows_B]
        return SoftTargets(self.labels[rows_B], classes)


@dataclass(frozen=True)
class KeptLabels:
    """Labels of B pictures as a codec keeps them, on the CPU."""

    parts: tuple[Tensor, ...]
    """In the order of labels/file.py: logits, or probabilities and classes, or codes."""
    basis: Tensor | None = None
    """Of the codes, which all pictures share."""

    def decoded(self, device: torch.device | None = None) -> SoftTargets:
        """What a student learns from, on a device, the CPU when left out."""
        parts = [part.to(device) for part in self.parts]
        if self.basis is not None:
            return SoftTargets(decode_in_basis(parts[0], self.basis))
        return SoftTargets(*parts)


@dataclass(frozen=True, kw_only=True)
class LabelBlock:
    """A teacher's logits on their way into a coreset."""

    codec: Codec
    """How they are stored."""
    logits: Tensor | None = None
    """The teacher's logits [E, N, K], any float dtype, finite in fp16; None for codec none."""
    temperature: float = 20.0
    """Softmax temperature T: applied when logits are read, before top-k labels are stored."""
    k: int = 10
    """Kept per row by topk and pca, see LabelLayout."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides these labels (augmentation, epochs, …), for the manifest."""

    def __post_init__(self) -> None:
        if self.codec not in (*get_args(KeptCodec), "none"):
            known = ", ".join(get_args(KeptCodec))
            raise CoresetError(f"label codec: expected {known} or none, got {self.codec!r}")
        if not self.temperature > 0:
            raise CoresetError(f"temperature: expected more than 0, got {self.temperature}")
        if self.codec == "none" and self.logits is not None:
            raise CoresetError("codec none stores no logits: leave them out, or use dense")
        if self.codec != "none" and (
            self.logits is None or self.logits.ndim != 3 or 0 in self.logits.shape
        ):
            got = None if self.logits is None else tuple(self.logits.shape)
            raise CoresetError(f"codec {self.codec}: expected logits [E, N, K], got {got}")
        _ = self.layout

    @cached_property
    def basis(self) -> Tensor | None:
        """Of codec pca, fitted to these logits; CoresetError for a logit beyond fp16."""
        if self.codec != "pca" or self.logits is None:
            return None
        logits_MK = spread_out(self.logits.flatten(0, 1), fitted_answers(self.k))
        return fit_basis(as_fp16(logits_MK), self.k)

    @property
    def layout(self) -> LabelLayout | None:
        """Of the label file; None for codec none. CoresetError for what none can hold."""
        if self.codec == "none" or self.logits is None:
            return None
        epochs, samples, classes = self.logits.shape
        return LabelLayout(
            codec=self.codec, epochs=epochs, samples=samples, classes=classes, k=self.k
        )

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for these labels."""
        kept = {"codec": "none"} if self.layout is None else self.layout.describe()
        return {**kept, "temperature": float(self.temperature), "settings": self.settings}

    def epoch(self, epoch: int) -> KeptLabels:
        """One epoch as it is stored; CoresetError for a logit beyond fp16."""
        if self.codec == "none" or self.logits is None:
            raise CoresetError("codec none stores no labels")
        codec = LabelCodec(self.codec, k=self.k, temperature=self.temperature, basis=self.basis)
        return codec.encode(self.logits[epoch])


@dataclass(frozen=True, kw_only=True)
class RecordedBlock:
    """What a recording holds, on its way into a coreset as it is: memory-mapped, never copied."""

    recording: MappedParts
    temperature: float
    """That of the student's loss, and of top-k labels when they were encoded."""
    settings: dict[str, Any]
    """What else decides these labels, for the manifest."""

    @property
    def layout(self) -> LabelLayout:
        """Of the recording and of the label file."""
        return self.recording.layout

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for these labels."""
        kept = self.layout.describe()
        return {**kept, "temperature": float(self.temperature), "settings": self.settings}

    @property
    def basis(self) -> Tensor | None:
        """Of the recorded codes."""
        basis = self.recording.basis
        return None if basis is None else torch.from_numpy(basis)

    def epoch(self, epoch: int) -> KeptLabels:
        """One epoch as it is stored; CoresetError when an answer is missing."""
        parts = tuple(torch.from_numpy(array[epoch]) for array in self.recording.answers)
        if bool(unanswered(parts, self.layout).any()):
            raise CoresetError(
                f"{self.recording.path}: labels of epoch {epoch} are missing: train to the end"
            )
        return KeptLabels(parts, self.basis)


def unanswered(parts_B: Sequence[Tensor], layout: LabelLayout) -> Tensor:
    """Which rows of a recording still hold, if in part, what it was filled with, bool [B].

    A killed process may have left a row half written.
    """
    if layout.codec == "pca":
        return parts_B[0].amin(1) == MISSING
    missing_B = parts_B[0].amax(1).isnan()  # amax passes NaN on, with no [B, K] of its own
    return missing_B | (parts_B[1].amax(1) >= layout.classes) if len(parts_B) > 1 else missing_B


@dataclass(frozen=True)
class LabelCodec:
    """How logits are kept."""

    codec: KeptCodec
    k: int
    """Of topk and pca."""
    temperature: float
    """Of topk."""
    basis: Tensor | None = None
    """Of pca, and of nothing else."""

    def __post_init__(self) -> None:
        if (self.codec == "pca") != (self.basis is not None):
            raise ValueError(f"codec {self.codec}: expected a basis of pca and of nothing else")

    def encode(self, logits_NK: Tensor) -> KeptLabels:
        """Logits as they are stored; CoresetError for one that is not finite within fp16."""
        if self.codec == "topk":
            logits_NK = logits_NK.to(torch.float16)
            return KeptLabels(encode_topk(logits_NK, k=self.k, temperature=self.temperature))
        logits_NK = as_fp16(logits_NK)
        if self.basis is not None:
            return KeptLabels((encode_in_basis(logits_NK, self.basis),), self.basis)
        return KeptLabels((logits_NK,))


def as_fp16(logits: Tensor) -> Tensor:
    """Logits rounded to fp16, on the CPU; CoresetError for one that is not finite there."""
    logits = logits.to("cpu", torch.float16).contiguous()
    _refuse_not_finite(logits)
    return logits


def encode_topk(logits_NK: Tensor, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest of softmax(logits / T): (fp16 probabilities, int16 classes), both [N, k].

    Equal probabilities keep the lower class first, so that the bytes do not depend on the machine.
    """
    logits_NK = logits_NK.to("cpu", torch.float32)
    _refuse_not_finite(logits_NK)
    ordered = (logits_NK / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    probabilities = ordered.values[:, :k].to(torch.float16)
    return probabilities.contiguous(), ordered.indices[:, :k].to(torch.int16).contiguous()


def decode_topk(probabilities_Bk: Tensor, classes_Bk: Tensor, classes: int) -> Tensor:
    """The full distribution [B, K] in fp32: rows sum to 1, the rest is spread evenly."""
    kept = probabilities_Bk.float()
    rest = (1.0 - kept.sum(1, keepdim=True)).clamp_min(0.0) / (classes - kept.shape[1])
    full_BK = rest.expand(-1, classes).scatter(1, classes_Bk.long(), kept)
    return full_BK / full_BK.sum(1, keepdim=True)


def _refuse_not_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise CoresetError(
            "teacher logits: expected finite values within fp16 (65504), got NaN or infinity: "
            "check the teacher's weights and normalisation"
        )


class SoftLabels:
    """Labels of a coreset, memory-mapped: the rows asked for are in memory, and no others.

    At 1000 classes and ipc 50 a dense epoch is 370 MB. CoresetError, when it is opened, for a file
    that was cut short or is not what the manifest says.
    """

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.codec: KeptCodec = described["codec"]
        self.temperature: float = described["temperature"]
        self.settings: dict[str, Any] = described["settings"]
        self.epochs: int = described["epochs"]
        self.samples: int = described["samples"]
        self.classes: int = described["classes"]
        self.k: int | None = described.get("k")
        """Probabilities or components kept per answer; None of dense labels."""
        sizes = {"epochs": self.epochs, "samples": self.samples, "classes": self.classes}
        layout = LabelLayout(codec=self.codec, **sizes, **({"k": self.k} if self.k else {}))
        self._file = MappedParts(path, layout)
        basis = self._file.basis
        basis = None if basis is None else torch.from_numpy(basis.copy())
        self.encoding = LabelCodec(
            self.codec, k=self.k or 0, temperature=self.temperature, basis=basis
        )
        """How these labels were made of a teacher's logits."""

    @property
    def keeps_logits(self) -> bool:
        """Whether logits come back: of top-k labels only probabilities at their temperature do."""
        return self.codec != "topk"

    def logits(self, epoch: int, samples_B: Sequence[int] | Tensor) -> Tensor:
        """fp32 logits [B, K]; CoresetError for top-k labels, which keep none."""
        if not self.keeps_logits:
            raise CoresetError(
                "codec topk keeps probabilities, not logits: call probabilities(), "
                "or label the coreset again with codec pca or dense"
            )
        return self.targets(epoch, samples_B).labels.float()

    def probabilities(self, epoch: int, samples_B: Sequence[int] | Tensor) -> Tensor:
        """fp32 probabilities [B, K] at the stored temperature."""
        return self.as_probabilities(self.targets(epoch, samples_B))

    def as_probabilities(self, targets_B: SoftTargets) -> Tensor:
        """What targets of this codec mean, fp32 [B, K] at the stored temperature."""
        if targets_B.classes is None:
            return (targets_B.labels.float() / self.temperature).softmax(1)
        return decode_topk(targets_B.labels, targets_B.classes, self.classes)

    def targets(
        self, epoch: int, samples_B: Sequence[int] | Tensor, device: torch.device | None = None
    ) -> SoftTargets:
        """What a student learns from, on a device, the CPU when left out."""
        if not 0 <= epoch < self.epochs:
            raise CoresetError(
                f"labels: expected an epoch in 0..{self.epochs - 1}, got {epoch}: "
                "label the coreset for as many epochs as the student trains"
            )
        rows_B = np.asarray(samples_B)
        return self._decoded([array[epoch][rows_B] for array in self._file.answers], device)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is known of an answer: logits, or probabilities and classes."""
        return ("logits",) if self.keeps_logits else ("probabilities", "classes")

    @property
    def answer_bytes(self) -> int:
        """Of an answer as `answers` gives it, which of pca is not as it is stored."""
        return 2 * self.classes if self.keeps_logits else 4 * (self.k or 0)

    def answers(self, epochs_A: np.ndarray, samples_A: np.ndarray) -> dict[str, np.ndarray]:
        """Those to A views by part: [A, K], top-k ones [A, k]."""
        targets_A = self._decoded([array[epochs_A, samples_A] for array in self._file.answers])
        known = (targets_A.labels, targets_A.classes)
        return {
            name: part.numpy()
            for name, part in zip(self.parts, known, strict=False)
            if part is not None
        }

    def recognised(self, epoch: int) -> float:
        """Percent of an epoch's views that the teacher takes for the class they were made for.

        A row's largest answer is held against its class: samples are by class, as many of each.
        Views that CutMix pasted another class into are among them.
        """
        each, hits = self.samples // self.classes, 0
        for label in range(self.classes):
            answers = self.targets(epoch, range(label * each, (label + 1) * each))
            largest = answers.labels.argmax(1, keepdim=True)
            taken = largest if answers.classes is None else answers.classes.gather(1, largest)
            hits += int((taken == label).sum())
        return 100 * hits / self.samples

    def read_ahead(self, epoch: int, samples_B: Sequence[int] | Tensor) -> None:
        """Have rows that are asked for soon read from the disk meanwhile; returns at once."""
        self._file.read_ahead(epoch, np.asarray(samples_B))

    def _decoded(
        self, parts_B: Sequence[np.ndarray], device: torch.device | None = None
    ) -> SoftTargets:
        kept = KeptLabels(tuple(map(torch.from_numpy, parts_B)), self.encoding.basis)
        return kept.decoded(device)
