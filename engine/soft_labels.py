"""Stored soft labels: the teacher's answers, one row per (epoch, sample), and their codecs.

Legend: E epochs, N samples, K classes, k kept probabilities, B batch.

dense   fp16 logits [E, N, K]; the temperature is applied when they are read
topk    fp16 probabilities [E, N, k] at the manifest's temperature and int16 classes [E, N, k],
        largest first; what is left of the mass is spread evenly over the other K - k classes
none    nothing is stored, the teacher answers online
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .label_file import KeptCodec, LabelLayout, MappedParts
from .manifest import CoresetError

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

    def to(self, device: torch.device) -> SoftTargets:
        """The same on another device."""
        classes = None if self.classes is None else self.classes.to(device)
        return SoftTargets(self.labels.to(device), classes)


@dataclass(frozen=True, kw_only=True)
class LabelBlock:
    """A teacher's logits on their way into a coreset."""

    codec: Codec
    """How they are stored."""
    logits: Tensor | None = None
    """The teacher's logits [E, N, K], any float dtype, finite in fp16; None for codec none."""
    temperature: float = 20.0
    """Softmax temperature T: applied when dense labels are read, before top-k labels are stored."""
    k: int = 10
    """Probabilities kept per row by codec topk; refused when 2k >= K, where dense is as small."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides these labels (augmentation, epochs, …), for the manifest."""

    def __post_init__(self) -> None:
        if self.codec not in ("dense", "topk", "none"):
            raise CoresetError(f"label codec: expected dense, topk or none, got {self.codec!r}")
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

    def epoch(self, epoch: int) -> SoftTargets:
        """One epoch as it is stored, on the CPU; CoresetError for a logit beyond fp16."""
        if self.codec == "none" or self.logits is None:
            raise CoresetError("codec none stores no labels")
        return encode(self.logits[epoch], codec=self.codec, k=self.k, temperature=self.temperature)


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

    def epoch(self, epoch: int) -> SoftTargets:
        """One epoch as it is stored; CoresetError when an answer is missing."""
        rows = SoftTargets(*(torch.from_numpy(array[epoch]) for array in self.recording.arrays))
        if bool(unanswered(rows, self.layout.classes).any()):
            raise CoresetError(
                f"{self.recording.path}: labels of epoch {epoch} are missing: train to the end"
            )
        return rows


def unanswered(rows_B: SoftTargets, classes: int) -> Tensor:
    """Which rows of a recording still hold, if in part, what it was filled with, bool [B].

    A killed process may have left a row half written.
    """
    missing_B = rows_B.labels.amax(1).isnan()  # amax passes NaN on, with no [B, K] of its own
    return missing_B if rows_B.classes is None else missing_B | (rows_B.classes.amax(1) >= classes)


def encode(logits_NK: Tensor, *, codec: KeptCodec, k: int, temperature: float) -> SoftTargets:
    """Logits as they are stored, on the CPU; CoresetError for a logit beyond fp16."""
    if codec == "topk":
        return SoftTargets(*encode_topk(logits_NK, k=k, temperature=temperature))
    logits_NK = logits_NK.to("cpu", torch.float16).contiguous()
    _refuse_not_finite(logits_NK)
    return SoftTargets(logits_NK)


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
        """Probabilities kept per row; None of dense labels."""
        sizes = {"epochs": self.epochs, "samples": self.samples, "classes": self.classes}
        layout = LabelLayout(codec=self.codec, **sizes, **({"k": self.k} if self.k else {}))
        self._file = MappedParts(path, layout)

    def logits(self, epoch: int, samples_B: Sequence[int] | Tensor) -> Tensor:
        """fp32 logits [B, K] of dense labels; CoresetError for top-k ones, which keep none."""
        if self.codec != "dense":
            raise CoresetError(
                "codec topk keeps probabilities, not logits: call probabilities(), "
                "or label the coreset again with codec dense"
            )
        return self._rows(epoch, samples_B)[0].float()

    def probabilities(self, epoch: int, samples_B: Sequence[int] | Tensor) -> Tensor:
        """fp32 probabilities [B, K] at the stored temperature."""
        if self.codec == "dense":
            return (self.logits(epoch, samples_B) / self.temperature).softmax(1)
        probabilities_Bk, classes_Bk = self._rows(epoch, samples_B)
        return decode_topk(probabilities_Bk, classes_Bk, self.classes)

    def targets(self, epoch: int, samples_B: Sequence[int] | Tensor) -> SoftTargets:
        """What is stored, as it is stored, on the CPU."""
        return SoftTargets(*self._rows(epoch, samples_B))

    @property
    def parts(self) -> tuple[str, ...]:
        """What is kept of an answer: logits, or probabilities and classes."""
        return tuple(part.name for part in self._file.layout.parts)

    def answers(self, epochs_A: np.ndarray, samples_A: np.ndarray) -> dict[str, np.ndarray]:
        """Those to A views by part, as they are stored: [A, K], top-k ones [A, k]."""
        return {
            name: array[epochs_A, samples_A]
            for name, array in zip(self.parts, self._file.arrays, strict=True)
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

    def _rows(self, epoch: int, samples_B: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        if not 0 <= epoch < self.epochs:
            raise CoresetError(
                f"labels: expected an epoch in 0..{self.epochs - 1}, got {epoch}: "
                "label the coreset for as many epochs as the student trains"
            )
        rows_B = np.asarray(samples_B)
        return tuple(torch.from_numpy(array[epoch][rows_B]) for array in self._file.arrays)
