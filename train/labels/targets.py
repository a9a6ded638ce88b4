"""Soft labels: the teacher's answers to the views that students see.

online   the teacher answers while the students train; nothing is stored
record   the same, and the answers are stored for the coreset, encoded by its codec
stored   read from the coreset; no teacher is needed

The teacher's logits are first rounded to fp16. A student learns from an answer as the codec stores
it, so recorded and stored labels give the same student, bit for bit on the CPU, with any codec;
online labels give the student of dense ones.

Top-k labels p' of dense ones p: ||p' - p||_1 <= 2 r + 2^-10 + k 2^-24, where r is the mass of the
omitted classes, spread evenly; the other terms are fp16's. The gradient of the loss by a student's
logits, (q - p) / T, differs by 1/T of that.

Legend: E epochs, N samples, K classes, k kept probabilities or components, P samples of a pool.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from ...engine.errors import CoresetError
from ...engine.labels.codecs import Codec, SoftTargets, as_fp16, describe_codec
from ...engine.labels.stored import SoftLabels
from ...export.durable import differences
from ..config import StudentConfig
from ..methods.pools import answer_pool
from ..methods.source import ImageSource
from ..run.world import ALONE, World
from ..teacher.teacher import Teacher
from .views import describe_views, pools


class Labels(Protocol):
    """Targets for the views of a pool."""

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """Targets on the views' device, at the config's temperature."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything besides the views that decides the targets; plain JSON."""
        ...


class OnlineLabels:
    """The teacher's answers, computed every time, for views normalised by `views.make_views`."""

    def __init__(self, teacher: Teacher, temperature: float, world: World = ALONE) -> None:
        self.teacher, self.temperature, self._world = teacher, temperature, world.producing

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """Raises CoresetError for an answer that is NaN or beyond fp16."""
        logits_PK = as_fp16(answer_pool(self.teacher, views_PCHW, self._world))
        return SoftTargets(logits_PK.to(views_PCHW.device))

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.teacher.sha256, "temperature": self.temperature, "codec": "none"}


class StoredLabels:
    """A coreset's labels. Raises CoresetError when they were made for other images or views.

    `but_for`: keys of the source's description that may differ.
    """

    def __init__(
        self,
        stored: SoftLabels,
        source: ImageSource,
        config: StudentConfig,
        *,
        but_for: Collection[str] = (),
    ) -> None:
        wanted = labelled_views(source, config)
        then = stored.settings.get("source", {})
        wanted["source"] |= {key: then[key] for key in but_for if key in then}
        _require_fit(stored, wanted, source, config)
        self.stored, self._config, self._labels_N = stored, config, source.labels_N
        self._epoch = -1
        self._following: dict[tuple[int, int], tuple[int, Tensor]] = {}
        """(epoch, samples) of the pool after the one with this (epoch, first sample)."""

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        """Targets of this pool; a thread reads the next pool's meanwhile."""
        targets_P = self.stored.targets(epoch, samples_P, views_PCHW.device)
        if epoch != self._epoch:
            self._epoch, self._following = epoch, self._pools_after(epoch)
        following = self._following.get((epoch, int(samples_P[0])))
        if following is not None:
            self.stored.read_ahead(*following)
        return targets_P

    def _pools_after(self, epoch: int) -> dict[tuple[int, int], tuple[int, Tensor]]:
        """The pool after each pool of this epoch and the next."""
        order = [
            (each, samples_P)
            for each in range(epoch, min(epoch + 2, self.stored.epochs))
            for samples_P in pools(self._config, self._labels_N, each)
        ]
        return {(each, int(samples_P[0])): after for (each, samples_P), after in pairwise(order)}

    def describe(self) -> dict[str, Any]:
        """The same as the RecordedLabels that they came from."""
        teacher = self.stored.settings.get("teacher")
        return describe_stored(teacher, self._config.temperature, self.stored.codec)


def describe_stored(teacher: str | None, temperature: float, codec: Codec) -> dict[str, Any]:
    """Everything besides the views that decides stored targets."""
    return {"teacher": teacher, "temperature": temperature, **describe_codec(codec)}


def labelled_views(source: ImageSource, config: StudentConfig) -> dict[str, Any]:
    """The images and views that stored labels belong to."""
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
