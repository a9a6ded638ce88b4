"""The pools that ExpandedLoader hands out batch by batch: views, labels, and their order.

Legend: P samples per pool, B per batch, K classes, H W image size.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.coreset.coreset import Coreset
from ...engine.errors import CoresetError
from ...engine.expand.backends import resolve_device
from ...kernels.noise import Draw, uniform
from ..config import StudentConfig
from ..coreset_options import LoaderOptions
from ..labels.targets import OnlineLabels, StoredLabels
from ..labels.views import make_views
from ..methods.source import ImageSource
from ..teacher.teacher import Teacher
from .from_manifest import fitting_labels, load_recorded_teacher, open_recorded_source


@dataclass(frozen=True)
class LabelledPool:
    """A pool on the device."""

    views_PCHW: Tensor
    """fp32, normalised, channels_last."""
    labels_PK: Tensor
    """fp32: probabilities or logits."""
    classes_P: Tensor
    """int64: the class of the image, whatever CutMix pasted into it."""
    rows_P: Tensor
    """int64: the order in which the pool is handed out."""

    def batch(self, rows_B: Tensor) -> tuple[Tensor, ...]:
        """Copies of some rows: the next pool replaces this one."""
        # Gathered as NHWC: indexing the first of four dimensions would lose channels_last.
        views_BCHW = self.views_PCHW.permute(0, 2, 3, 1)[rows_B].permute(0, 3, 1, 2)
        return views_BCHW, self.labels_PK[rows_B], self.classes_P[rows_B]


@dataclass(frozen=True)
class PoolSource:
    """Everything that fills a pool."""

    source: ImageSource
    config: StudentConfig
    labels: OnlineLabels | StoredLabels
    options: LoaderOptions
    device: torch.device

    def fill(self, item: tuple[int, Tensor]) -> LabelledPool:
        """Render an epoch's pool, make its views and label them, all on the device."""
        epoch, samples_P = item
        images_PCHW = self.source.render(samples_P, epoch).to(self.device)
        views_PCHW = make_views(images_PCHW, samples_P, epoch, self.config).float()
        rank_P = uniform(self.options.seed, Draw.ORDER, samples_P, epoch, 3)[:, 2]
        return LabelledPool(
            views_PCHW,
            self._labels(samples_P, epoch, views_PCHW).to(self.device),
            self.source.labels_N[samples_P].to(self.device),
            torch.argsort(rank_P, stable=True).to(self.device),
        )

    def _labels(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> Tensor:
        """fp32 [P, K]."""
        stored = self.labels.stored if isinstance(self.labels, StoredLabels) else None
        if stored is not None and not stored.codec.keeps_logits:
            return stored.probabilities(epoch, samples_P)
        logits_PK = self.labels.targets(samples_P, epoch, views_PCHW).labels.float()
        if self.options.labels == "logits":
            return logits_PK
        return (logits_PK / self.config.temperature).softmax(1)


def open_pools(
    coreset: Coreset,
    config: StudentConfig,
    options: LoaderOptions,
    teacher: Teacher | str | None,
    opened: ExitStack,
) -> PoolSource:
    """The source of a coreset's pools; closing `opened` frees the model.

    Raises the errors of from_manifest.open_recorded_source and fitting_labels, CoresetError for
    logits of top-k labels, and load_teacher's errors for a teacher given by name.
    """
    source = opened.enter_context(open_recorded_source(coreset, options, options.backend, config))
    device = torch.device(resolve_device(options.device))
    if teacher is None:
        labels = fitting_labels(coreset, source, config, options)
        if options.labels == "logits" and not labels.stored.codec.keeps_logits:
            raise CoresetError(
                f"{coreset.folder}: top-k labels keep no logits: give labels='probabilities'"
            )
        return PoolSource(source, config, labels, options, device)
    if isinstance(teacher, str):
        teacher = load_recorded_teacher(coreset, teacher, options.device)
    if teacher.class_ids != coreset.class_ids:
        raise ValueError(
            f"teacher: expected the coreset's classes in their order ({coreset.class_ids[0]}, …), "
            f"got {len(teacher.class_ids)} ({teacher.class_ids[0]}, …)"
        )
    online = OnlineLabels(teacher, config.temperature)
    return PoolSource(source, config, online, options, device)
