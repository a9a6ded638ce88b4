"""Test data of the soft-label loss, equal in every process and on every device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from patchbloom.kernels.noise import normal_reference
from patchbloom.kernels.softlabel import softlabel, target_reference

ROWS = torch.tensor([[0, 3], [2, 2], [1, 0]])
"""Two rows, one row twice, and two rows with a weight of one."""
WEIGHTS = torch.tensor([0.3, 0.6, 1.0])


@dataclass(frozen=True, kw_only=True)
class Given:
    """Arguments of ``softlabel`` for three images."""

    student: torch.Tensor
    labels: torch.Tensor
    classes: torch.Tensor | None
    temperature: float
    rows: torch.Tensor | None
    weight: torch.Tensor | None

    def loss(self, student_BK: torch.Tensor) -> torch.Tensor:
        """``softlabel`` of these logits."""
        return softlabel(
            student_BK,
            self.labels,
            self.classes,
            temperature=self.temperature,
            rows_B2=self.rows,
            weight_B=self.weight,
        )

    def target(self) -> torch.Tensor:
        """The reference's targets, fp32 [B, K]."""
        return target_reference(
            self.labels,
            self.classes,
            self.rows,
            self.weight,
            classes=self.student.shape[1],
            temperature=self.temperature,
        )

    def to(self, device: str) -> Given:
        names = ("student", "labels", "classes", "rows", "weight")
        tensors = {name: getattr(self, name) for name in names}
        moved = {n: None if t is None else t.to(device) for n, t in tensors.items()}
        return replace(self, **moved)


def given(classes: int, kept: int, temperature: float, mixed: bool, *, scale: float = 3.0) -> Given:
    """Normal logits times ``scale``; labels keep the ``kept`` largest per row (0: all).

    Label rows 0 and 3, mixed in image 0, share some of their kept classes.
    """
    logits = normal_reference(77, 0, torch.arange(8), 0, (classes,)) * scale
    student, teacher = logits[:3].contiguous(), logits[3:7].contiguous()
    teacher[3] = 0.5 * teacher[3] + 0.5 * teacher[0]
    labels, columns = teacher.half(), None
    if kept:
        ordered = (teacher / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        labels = ordered.values[:, :kept].half().contiguous()
        columns = ordered.indices[:, :kept].to(torch.int16).contiguous()
    if not mixed:
        labels, columns = labels[:3], None if columns is None else columns[:3]
    return Given(
        student=student,
        labels=labels,
        classes=columns,
        temperature=temperature,
        rows=ROWS if mixed else None,
        weight=WEIGHTS if mixed else None,
    )
