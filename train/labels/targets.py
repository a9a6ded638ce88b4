"""Soft labels: the teacher's answers to what the students see.

online   the teacher answers while the students train; nothing is kept
record   the same, and its answers are kept as the codec has them, for the coreset
stored   read from the coreset; no teacher is needed

The teacher's logits are rounded to fp16 first. A student learns from an answer as it is kept: so it
is the same, bit for bit on the CPU, whether its labels were recorded beside it or read from where
they are stored, with any codec; and from online labels it is the one of dense labels.

Top-k labels p' of dense ones p: ||p' - p||_1 <= 2 r + 2^-10 + k 2^-24, where r is the mass of the
classes that are left out (which is spread evenly; the rest of the bound is fp16). The gradient of
the loss by a student's logits, (q - p) / T, differs by a T-th of that.

Legend: E epochs, N samples, K classes, k kept probabilities or components, P samples of a pool.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from ...engine.errors import CoresetError
from ...engine.labels.codecs import Codec, SoftTargets, as_fp16, describe_codec
from ...engine.labels.stored import SoftLabels
from ...export.durable import differences
from ..config import StudentConfig
from ..methods.shared import answer_pool
from ..methods.source import ImageSource
from ..run.world import ALONE, World
from ..teacher.teacher import Teacher
from .views import describe_views, pools


class Labels(Protocol):
    """Targets of a pool's views."""

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """On the views' device, at the config's temperature."""
        ...

    def flush(self) -> None:
        """Bring to the disk what was recorded so far."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the targets, beside the views; plain JSON."""
        ...


class OnlineLabels:
    """The teacher, asked every time. `views_PCHW` are normalised as views.make_views does."""

    def __init__(self, teacher: Teacher, temperature: float, world: World = ALONE) -> None:
        self.teacher, self.temperature, self._world = teacher, temperature, world.producing

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """CoresetError for an answer that is NaN, or beyond fp16."""
        logits_PK = as_fp16(answer_pool(self.teacher, views_PCHW, self._world))
        return SoftTargets(logits_PK.to(views_PCHW.device))

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.teacher.sha256, "temperature": self.temperature, "codec": "none"}


class StoredLabels:
    """Labels of a coreset. Refused when they were made for other views than these.

    `but_for`: what of the source's description may be another than it was then.
    """

    def __init__(
        self,
        stored: SoftLabels,
        source: ImageSource,
        config: StudentConfig,
        *,
        but_for: Collection[str] = (),
    ) -> None:
        self.stored, self.config = stored, config
        wanted = label_settings(source, config)
        then = stored.settings.get("source", {})
        wanted["source"] |= {key: then[key] for key in but_for if key in then}
        _require_fit(stored, wanted, source, config)
        self.temperature, self._labels_N = config.temperature, source.labels_N
        self._epoch, self._pools = -1, list[Tensor]()
        self._pool_of_N = torch.empty(stored.samples, dtype=torch.int64)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """While these are learnt from, the next pool's are read from the disk."""
        targets_P = self.stored.targets(epoch, samples_P, views_PCHW.device)
        self._read_next(int(samples_P[0]), epoch)
        return targets_P

    def _read_next(self, sample: int, epoch: int) -> None:
        """Read the pool after the one with this sample ahead, of the next epoch after the last."""
        if epoch != self._epoch:
            self._epoch, self._pools = epoch, self._pools_of(epoch)
            for number, samples_P in enumerate(self._pools):
                self._pool_of_N[samples_P] = number
        following = int(self._pool_of_N[sample]) + 1
        if following < len(self._pools):
            self.stored.read_ahead(epoch, self._pools[following])
        elif epoch + 1 < self.stored.epochs:
            self.stored.read_ahead(epoch + 1, self._pools_of(epoch + 1)[0])

    def _pools_of(self, epoch: int) -> list[Tensor]:
        return pools(self.config, self._labels_N, epoch)

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """The same as of the RecordedLabels that they came from."""
        teacher = self.stored.settings.get("teacher")
        return describe_kept(teacher, self.temperature, self.stored.codec)


def describe_kept(teacher: str | None, temperature: float, codec: Codec) -> dict[str, Any]:
    """What decides the targets that are kept, beside the views."""
    return {"teacher": teacher, "temperature": temperature, **describe_codec(codec)}


def label_settings(source: ImageSource, config: StudentConfig) -> dict[str, Any]:
    """What stored labels belong to: the images and the views of them."""
    return {"source": source.describe(), "views": describe_views(config)}


def _require_fit(
    stored: SoftLabels, wanted: dict[str, Any], source: ImageSource, config: StudentConfig
) -> None:
    size = (stored.samples, stored.classes)
    if size != (source.samples, len(source.class_ids)):
        raise CoresetError(
            f"stored labels: expected {source.samples} samples of {len(source.class_ids)} classes, "
            f"got {size[0]} of {size[1]}: {_AGAIN}"
        )
    if stored.epochs < config.epochs:
        raise CoresetError(
            f"stored labels: expected at least {config.epochs} epochs, got {stored.epochs}: "
            f"train for {stored.epochs} (--epochs {stored.epochs}), or {_AGAIN}"
        )
    if not stored.codec.keeps_logits and stored.temperature != config.temperature:
        raise CoresetError(
            f"stored labels: expected temperature {config.temperature}, got top-k labels at "
            f"{stored.temperature}, which keep no logits: {_AGAIN}"
        )
    for part, now in wanted.items():
        for key, was, asked in differences(stored.settings.get(part, {}), now):
            raise CoresetError(
                f"stored labels were made for {part} with {key} = {was}, now it is {asked}: "
                f"give the same options, or {_AGAIN}"
            )


_AGAIN = "label anew in another --out, or ask the teacher with --labels online"
