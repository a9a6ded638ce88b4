"""Soft labels: the teacher's answers to what the students see.

online   the teacher answers while the students train; nothing is kept
record   the same, and its logits are kept in fp16, to be put into the coreset afterwards
stored   read from the coreset; no teacher is needed

Every answer is rounded to fp16 before a student learns from it: so a student is the same, bit for
bit on the CPU, whether its labels were made online, recorded, or read from where they are stored.

Legend: E epochs, N samples, K classes, P samples of a pool.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine.durable import full_disk_explained, replace_file
from ..engine.manifest import CoresetError
from ..engine.soft_labels import Codec, LabelBlock, SoftLabels, SoftTargets
from .config import StudentConfig
from .methods import ImageSource
from .record import Report
from .teacher import Teacher
from .views import describe_views, make_views, pools


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

    def __init__(self, teacher: Teacher, temperature: float) -> None:
        self.teacher, self.temperature = teacher, temperature

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        logits_PK = self.teacher.logits(views_PCHW)
        return SoftTargets(logits_PK.to(views_PCHW.device, torch.float16))

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.teacher.sha256, "temperature": self.temperature, "codec": "none"}


class RecordedLabels:
    """The teacher's logits, kept in a file of E·N·K fp16 numbers while they are used.

    The file is filled with NaN at first: a full disk is an error then, and not a crash later, and
    an answer that is missing cannot be taken for one. A second file says what the answers belong
    to; those of anything else are not gone on with.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: ImageSource,
        config: StudentConfig,
        path: Path,
    ) -> None:
        self.teacher, self.temperature, self.path = teacher, config.temperature, path
        self.settings = {
            **label_settings(source, config),
            "teacher": teacher.sha256,
            "student": config.recipe(),
        }
        shape = (config.epochs, source.samples, len(teacher.class_ids))
        count = shape[0] * shape[1] * shape[2]
        said = json.dumps({**self.settings, "shape": shape}, sort_keys=True).encode()
        if not _holds(_belongs_to(path), said) or not path.is_file():
            discard_recorded(path)
            _fill_with_nan(path, count)
            replace_file(_belongs_to(path), said)
        flat = torch.from_file(str(path), shared=True, size=count, dtype=torch.float16)
        self._logits_ENK = flat.view(shape)

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        logits_PK = self.teacher.logits(views_PCHW).to(torch.float16)
        self._logits_ENK[epoch, samples_P] = logits_PK.cpu()
        return SoftTargets(logits_PK.to(views_PCHW.device))

    def has(self, samples_P: Tensor, epoch: int) -> bool:
        """Whether every answer of a pool is there, from a recording that was stopped."""
        return not bool(self._logits_ENK[epoch, samples_P].isnan().any())

    def flush(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.teacher.sha256, "temperature": self.temperature, "codec": "dense"}

    def block(self, codec: Codec = "dense", k: int = 10) -> LabelBlock:
        """Everything recorded, for engine.coreset.attach_labels.

        CoresetError when an answer is missing, before the last epoch.
        """
        if any(bool(epoch_NK.isnan().any()) for epoch_NK in self._logits_ENK):
            raise CoresetError(f"{self.path}: labels of some epochs are missing: train to the end")
        return LabelBlock(
            codec=codec,
            logits=None if codec == "none" else self._logits_ENK,
            temperature=self.temperature,
            k=k,
            settings=self.settings,
        )

    def discard(self) -> None:
        """Remove the files, once their content is in the coreset."""
        discard_recorded(self.path)


def discard_recorded(path: Path) -> None:
    """Remove what was recorded in `path`, if anything was."""
    _belongs_to(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _belongs_to(path: Path) -> Path:
    """The file that says what the answers in `path` belong to."""
    return path.with_name(f"{path.name}.json")


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _fill_with_nan(path: Path, count: int) -> None:
    """Make `path` a file of `count` fp16 NaN; OSError, one line, on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.partial")
    block = np.full(min(count, 2**20), np.nan, np.float16)
    try:
        with full_disk_explained(path, 2 * count), staged.open("wb") as stream:
            for first in range(0, count, len(block)):
                stream.write(block[: count - first].tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


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
        self.stored = stored
        wanted = label_settings(source, config)
        then = stored.settings.get("source", {})
        wanted["source"] |= {key: then[key] for key in but_for if key in then}
        _require_fit(stored, wanted, source, config)
        self.temperature = config.temperature

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        return self.stored.targets(epoch, samples_P).to(views_PCHW.device)

    def flush(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        """The same as of the RecordedLabels that they came from, if they are dense."""
        teacher = self.stored.settings.get("teacher")
        codec = self.stored.codec
        return {"teacher": teacher, "temperature": self.temperature, "codec": codec}


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
    if stored.codec == "topk" and stored.temperature != config.temperature:
        raise CoresetError(
            f"stored labels: expected temperature {config.temperature}, got top-k labels at "
            f"{stored.temperature}, which keep no logits: {_AGAIN}"
        )
    for part, now in wanted.items():
        before = stored.settings.get(part, {})
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise CoresetError(
                    f"stored labels were made for {part} with {key} = {before.get(key)}, now it is "
                    f"{now.get(key)}: give the same options, or {_AGAIN}"
                )


_AGAIN = "label anew in another --out, or ask the teacher with --labels online"


def record_labels(
    source: ImageSource, labels: RecordedLabels, config: StudentConfig, report: Report
) -> None:
    """Label every view of every epoch without training anyone: `train labels`.

    Goes on from the pool where it was stopped.
    """
    for epoch in range(config.epochs):
        report.progress("labels", epoch, config.epochs, "epochs")
        for samples_P in pools(config, source.samples, epoch):
            if labels.has(samples_P, epoch):
                continue
            views_PCHW = make_views(source.render(samples_P, epoch), samples_P, epoch, config)
            labels.targets(samples_P, epoch, views_PCHW)
    labels.flush()
    report.progress("labels", config.epochs, config.epochs, "epochs")
