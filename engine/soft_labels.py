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

import torch
from safetensors import safe_open
from torch import Tensor

from .manifest import CoresetError

Codec = Literal["dense", "topk", "none"]
_MOST_CLASSES = 32767  # int16 class index


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
    """Soft labels on their way into a coreset."""

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
        if self.codec == "none":
            if self.logits is not None:
                raise CoresetError("codec none stores no logits: leave them out, or use dense")
            return
        if self.logits is None or self.logits.ndim != 3 or 0 in self.logits.shape:
            got = None if self.logits is None else tuple(self.logits.shape)
            raise CoresetError(f"codec {self.codec}: expected logits [E, N, K], got {got}")
        classes = self.logits.shape[2]
        if self.codec == "topk" and not (self.k >= 1 and 2 * self.k < classes):
            raise CoresetError(
                f"codec topk: expected 1 <= k and 2k < {classes} classes, got k={self.k}: "
                "use a smaller k, or dense, which is as small here"
            )
        if classes > _MOST_CLASSES:
            raise CoresetError(f"expected at most {_MOST_CLASSES} classes, got {classes}")

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for these labels."""
        described: dict[str, Any] = {
            "codec": self.codec,
            "temperature": float(self.temperature),
            "settings": self.settings,
        }
        if self.logits is not None:
            described["epochs"], described["samples"], described["classes"] = self.logits.shape
        if self.codec == "topk":
            described["k"] = self.k
        return described

    def tensors(self) -> dict[str, Tensor]:
        """What `labels.safetensors` holds, on the CPU; CoresetError for a logit beyond fp16."""
        if self.logits is None:
            return {}
        if self.codec == "dense":
            logits = self.logits.to("cpu", torch.float16).contiguous()
            for logits_NK in logits:  # one epoch at a time: the answer is a boolean per logit
                _refuse_not_finite(logits_NK)
            return {"logits": logits}
        coded = [
            encode_topk(logits_NK, k=self.k, temperature=self.temperature)
            for logits_NK in self.logits  # one epoch at a time: the fp32 softmax stays small
        ]
        return {
            "probabilities": torch.stack([probabilities for probabilities, _ in coded]),
            "classes": torch.stack([classes for _, classes in coded]),
        }


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
    """Labels of a coreset, read lazily: one epoch is in memory at a time."""

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.codec: Codec = described["codec"]
        self.temperature: float = described["temperature"]
        self.settings: dict[str, Any] = described["settings"]
        self.epochs: int = described["epochs"]
        self.samples: int = described["samples"]
        self.classes: int = described["classes"]
        self._file = safe_open(path, framework="pt")
        self._epoch = -1
        self._parts: tuple[Tensor, ...] = ()

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

    def _rows(self, epoch: int, samples_B: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        if not 0 <= epoch < self.epochs:
            raise CoresetError(
                f"labels: expected an epoch in 0..{self.epochs - 1}, got {epoch}: "
                "label the coreset for as many epochs as the student trains"
            )
        if epoch != self._epoch:
            names = ("logits",) if self.codec == "dense" else ("probabilities", "classes")
            self._parts = tuple(self._file.get_slice(name)[epoch] for name in names)
            self._epoch = epoch
        rows = torch.as_tensor(samples_B, dtype=torch.int64, device="cpu")
        return tuple(part[rows] for part in self._parts)
