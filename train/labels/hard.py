"""Hard labels: the class of every view, without a teacher, for a set's hard-label accuracy.

With CutMix a view shows two classes, weighted by their areas (Yun et al. 2019, eq. 1):

    target = w · onehot(class of the partner) + (1 - w) · onehot(own class),
    w = area of the pasted box, clipped to the image, / area of the image

They have the form of stored dense labels, fp16 logits log(target), so that students learn from
them as from a teacher's. The loss, KL(target || student) at T = 1, is the cross-entropy minus the
target's own entropy: the same gradient, and without mixing the same number.

Legend: P samples of a pool, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...engine.labels.codecs import SoftTargets
from ..config import StudentConfig
from ..methods.source import ImageSource
from .views import cutmix_of

NOT_SHOWN = -6e4
"""Logit of a class that a view does not show: within fp16, and exactly 0 after softmax in fp32."""


class HardLabels:
    """Labels from the classes of a source's samples and from CutMix's boxes."""

    def __init__(self, source: ImageSource, config: StudentConfig) -> None:
        self.config = config
        self._labels_N, self._classes = source.labels_N, len(source.class_ids)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """fp16 logits [P, K] on the views' device."""
        shares_PK = torch.zeros(len(samples_P), self._classes, dtype=torch.float32)
        own_P1 = self._labels_N[samples_P][:, None]
        shares_PK.scatter_(1, own_P1, 1.0)
        if self.config.cutmix:
            partners_P, boxes_P4 = cutmix_of(samples_P, epoch, self.config)
            first_P2 = boxes_P4[:, :2].clamp(0, self.config.size_px)
            last_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]).clamp(0, self.config.size_px)
            pasted_P1 = (last_P2 - first_P2).prod(1, keepdim=True) / self.config.size_px**2
            shares_PK *= 1 - pasted_P1
            shares_PK.scatter_add_(1, own_P1[partners_P], pasted_P1)
        logits_PK = shares_PK.log().clamp_min(NOT_SHOWN)
        return SoftTargets(logits_PK.to(views_PCHW.device, torch.float16))

    def describe(self) -> dict[str, Any]:
        """They depend on the samples' classes and the views alone."""
        return {"targets": "hard"}
