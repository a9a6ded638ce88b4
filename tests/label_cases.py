"""Codecs by name, and soft labels from given logits, for tests without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from patchbloom.engine.coreset.coreset import Coreset, attach_labels, open_coreset, write_coreset
from patchbloom.engine.coreset.manifest import LABELS, MANIFEST, seal, spelled
from patchbloom.engine.labels.basis import fit_basis
from patchbloom.engine.labels.codecs import Codec, Encoding, as_fp16, described_codec
from patchbloom.engine.labels.file import LabelLayout


def codec_of(name: str, k: int) -> Codec:
    """The named codec; dense ignores k."""
    return described_codec({"codec": name} | ({} if name == "dense" else {"k": k}))


@dataclass(frozen=True, kw_only=True)
class LabelBlock:
    """Labels to attach to a coreset: logits [E, N, K] in any codec; None: no labels."""

    codec: str
    logits: torch.Tensor | None = None
    temperature: float = 20.0
    k: int = 10
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.layout

    @cached_property
    def layout(self) -> LabelLayout | None:
        if self.logits is None:
            return None
        epochs, samples, classes = self.logits.shape
        codec = codec_of(self.codec, self.k)
        return LabelLayout(codec=codec, epochs=epochs, samples=samples, classes=classes)

    @cached_property
    def encoding(self) -> Encoding:
        assert self.layout is not None
        assert self.logits is not None
        codec = self.layout.codec
        answers_MK = self.logits.flatten(0, 1)
        basis = None if codec.fit is None else fit_basis(as_fp16(answers_MK), self.k)
        return Encoding(codec, self.temperature, basis)

    @property
    def basis(self) -> np.ndarray | None:
        basis = self.encoding.basis
        return None if basis is None else basis.numpy()

    def epoch(self, epoch: int) -> list[np.ndarray]:
        assert self.logits is not None
        return [part.numpy() for part in self.encoding.encode(self.logits[epoch])]

    def describe(self) -> dict[str, Any]:
        kept = {"codec": "none"} if self.layout is None else self.layout.describe()
        return {**kept, "temperature": float(self.temperature), "settings": self.settings}


def write_labelled(folder: Path, labels: LabelBlock | None, **given: Any) -> Coreset:
    """Write a coreset, with labels if given."""
    coreset = write_coreset(folder, **given)
    return coreset if labels is None else attach_labels(folder, labels)  # pyright: ignore[reportArgumentType]


def label_online(folder: Path) -> None:
    """Remove the stored labels as earlier versions did: codec none in the manifest."""
    manifest = open_coreset(folder).manifest
    described = {"codec": "none", "temperature": 20.0, "settings": {}}
    files = {name: entry for name, entry in manifest["files"].items() if name != LABELS}
    sealed = seal({**manifest, "labels": described, "files": files}, manifest["provenance"])
    (folder / MANIFEST).write_bytes(spelled(sealed))
    (folder / LABELS).unlink(missing_ok=True)
