"""The shape of a coreset's manifest: every field that is read from it, with its bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ...export.documents import AboveZero, Count, Positive, Seed, Sha256, Side, Text


class _Class(BaseModel):
    index: int
    id: str
    name: Text
    patches: Positive
    doped: Count = 0


class File(BaseModel):
    bytes: Count
    sha256: Sha256


class _Doping(BaseModel):
    samples_per_class: Positive


class _Settings(BaseModel):
    method: str
    seed: Seed
    image_size_px: Side
    factor: Side
    patch_px: Side
    ipc: Positive
    generated: Positive | None = None
    samples_per_class: Positive = 1
    variants: Count = 0
    doping: _Doping | None = None


class _Model(BaseModel):
    name: str = ""
    weights_sha256: str = ""
    weights_bytes: Count | None = None
    prompt: Text = ""
    prompts: dict[str, Text] = {}


class _Teacher(BaseModel):
    architecture: str = ""
    size_px: Side = 1


class _Views(BaseModel):
    cutmix: bool
    pool: Positive | None = None

    @model_validator(mode="after")
    def _pool_of_cutmix(self) -> _Views:
        if self.cutmix and self.pool is None:
            raise ValueError("expected the pool that CutMix draws partners from, found none")
        return self


class _Recipe(BaseModel):
    network: str = ""
    batch: Positive


class _LabelSettings(BaseModel):
    source: dict[str, Any] = {}
    views: _Views | None = None
    student: _Recipe = _Recipe(batch=1)
    teacher: str | None = None


class _OnlineLabels(BaseModel):
    codec: Literal["none"]


class _StoredLabels(BaseModel):
    epochs: Positive
    samples: Positive
    classes: Positive
    temperature: AboveZero
    settings: _LabelSettings


class _DenseLabels(_StoredLabels):
    codec: Literal["dense"]
    k: None = None


class _CodedLabels(_StoredLabels):
    codec: Literal["topk", "pca"]
    k: Positive


_Labels = Annotated[_OnlineLabels | _DenseLabels | _CodedLabels, Field(discriminator="codec")]


class Manifest(BaseModel):
    classes: list[_Class] = Field(min_length=1)
    files: dict[str, File]
    settings: _Settings
    model: _Model | None
    teacher: _Teacher | None
    labels: _Labels | None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        """Every class has as many images as the first, and each image has its file."""
        settings, first = self.settings, self.classes[0]
        each = settings.generated or settings.ipc * settings.factor**2
        if [entry.index for entry in self.classes] != list(range(len(self.classes))):
            raise ValueError("classes: expected the indices 0, 1, 2, … in this order")
        if any((entry.patches, entry.doped) != (each, first.doped) for entry in self.classes):
            raise ValueError(f"classes: expected {each} patches and equally many doped images each")
        stored = isinstance(self.labels, _StoredLabels)
        if len(self.files) != len(self.classes) * (each + first.doped) + stored:
            raise ValueError("files: expected a file for each image, and one for stored labels")
        if first.doped and settings.doping is None:
            raise ValueError("settings: expected doping beside doped images, found none")
        if isinstance(self.labels, _StoredLabels) and self.labels.classes != len(self.classes):
            raise ValueError(f"labels: expected {len(self.classes)} classes")
        return self
