"""The stored soft labels of a coreset: the teacher's answers, one row per (epoch, sample).

Legend: E epochs, N samples, K classes, k kept numbers, B batch, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CoresetError
from .codecs import Encoding, SoftTargets, decode_topk, described_codec
from .file import LabelLayout, MappedParts


class SoftLabels:
    """Labels of a coreset, memory-mapped: only requested rows are in memory.

    At 1000 classes and ipc 50 a dense epoch is 370 MB. Opening raises CoresetError for a file that
    was cut short or does not match the manifest.
    """

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.codec = described_codec(described)
        self.temperature: float = described["temperature"]
        self.settings: dict[str, Any] = described["settings"]
        self.epochs: int = described["epochs"]
        self.samples: int = described["samples"]
        self.classes: int = described["classes"]
        layout = LabelLayout(
            codec=self.codec, epochs=self.epochs, samples=self.samples, classes=self.classes
        )
        self._file = MappedParts(path, layout)
        basis = self._file.basis
        basis = None if basis is None else torch.from_numpy(basis.copy())
        self.encoding = Encoding(self.codec, self.temperature, basis)
        """How these labels were encoded from a teacher's logits."""

    def probabilities(self, epoch: int, samples_B: Sequence[int] | Tensor) -> Tensor:
        """fp32 probabilities [B, K] at the stored temperature."""
        return self.as_probabilities(self.targets(epoch, samples_B))

    def as_probabilities(self, targets_B: SoftTargets) -> Tensor:
        """Targets of this codec as fp32 probabilities [B, K] at the stored temperature."""
        if targets_B.classes is None:
            return (targets_B.labels.float() / self.temperature).softmax(1)
        return decode_topk(targets_B.labels, targets_B.classes, self.classes)

    def targets(
        self, epoch: int, samples_B: Sequence[int] | Tensor, device: torch.device | None = None
    ) -> SoftTargets:
        """Targets for a student, on a device. Default: the CPU."""
        if not 0 <= epoch < self.epochs:
            raise CoresetError(
                f"labels: expected an epoch in 0..{self.epochs - 1}, got {epoch}: "
                "label the coreset for as many epochs as the student trains"
            )
        rows_B = np.asarray(samples_B)
        return self._decoded([array[epoch][rows_B] for array in self._file.answers], device)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of an answer's parts: logits, or probabilities and classes."""
        return ("logits",) if self.codec.keeps_logits else ("probabilities", "classes")

    @property
    def answer_bytes(self) -> int:
        """Bytes of an answer as `answers` returns it; pca stores fewer."""
        if self.codec.keeps_logits:
            return 2 * self.classes
        return sum(part.row_bytes for part in self._file.layout.parts if part.of_answers)

    def answers(self, epochs_A: np.ndarray, samples_A: np.ndarray) -> dict[str, np.ndarray]:
        """Answers to A views by part: [A, K], or [A, k] for top-k labels."""
        targets_A = self._decoded([array[epochs_A, samples_A] for array in self._file.answers])
        known = [part.numpy() for part in (targets_A.labels, targets_A.classes) if part is not None]
        return dict(zip(self.parts, known, strict=True))

    def recognised(self, epoch: int) -> float:
        """Percent of an epoch's views whose largest answer is the class of their sample.

        Samples are sorted by class, equally many of each. Views that CutMix pasted another class
        into count too.
        """
        each, hits = self.samples // self.classes, 0
        for label in range(self.classes):
            answers = self.targets(epoch, range(label * each, (label + 1) * each))
            largest = answers.labels.argmax(1, keepdim=True)
            taken = largest if answers.classes is None else answers.classes.gather(1, largest)
            hits += int((taken == label).sum())
        return 100 * hits / self.samples

    def read_ahead(self, epoch: int, samples_B: Sequence[int] | Tensor) -> None:
        """Read rows that are needed soon from the disk in the background; returns at once."""
        self._file.read_ahead(epoch, np.asarray(samples_B))

    def _decoded(
        self, parts_B: Sequence[np.ndarray], device: torch.device | None = None
    ) -> SoftTargets:
        """Every row is checked when it is read: a student reads each once per epoch."""
        rows_B = [torch.from_numpy(rows) for rows in parts_B]
        self._file.check_values(rows_B)
        return self.encoding.decode(rows_B, device)
