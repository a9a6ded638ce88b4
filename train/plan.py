"""A run, fully decided; commands/planning.py makes it from the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.config import DscoConfig, ExpandConfig
from ..engine.data.images import ImageSet
from ..engine.expand import naming
from ..engine.expand.prompts import class_prompts
from ..engine.labels.codecs import Codec
from ..export.models import ModelSource
from .config import (
    LabelChoice,
    Recipe,
    Scoring,
    StudentConfig,
    TeacherConfig,
    student_seeds,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every setting of a run, with defaults resolved and data and model found."""

    methods: tuple[str, ...]
    """In the given order, each once."""
    data_name: str
    train: ImageSet
    val: ImageSet
    val_fraction: float | None
    """Share of each class that was split off to be `val`; None: it is a split of its own."""
    data_sha256: str
    """Hash of the names and sizes of all images of both splits."""
    damaged: tuple[str, ...]
    """Training images that --skip-corrupt has left out."""
    class_names: tuple[str, ...]
    device: str
    targets: tuple[str, ...]
    """Cards elsewhere that --build-only builds for (EngineSpec.targets)."""
    seed: int
    seeds: int
    """Students per method."""
    recipe: Recipe
    ipc: int
    factor: int
    dope: int
    """Real images per class that doping adds to every coreset."""
    scoring: Scoring
    """How the teacher sees a patch that it scores."""
    select: str
    """A Choice, or package.module:function."""
    candidates: int
    teacher: TeacherConfig
    """How a teacher is trained here."""
    teacher_source: str | None
    """As config.is_ready_teacher says; None when the teacher is trained here."""
    student: StudentConfig
    labels: LabelChoice
    codec: Codec
    """How labels are stored."""
    model: ModelSource | None
    """None when no method runs one."""
    prompt: str
    """Template of the prompts."""
    own_prompts: dict[str, str]
    """Prompts of the classes in --prompts, by class id."""
    expand: ExpandConfig
    """How the model expands patches."""
    refresh: float
    """Share of the patches that dace expands anew in an epoch."""
    variants: int
    """Augmented variants per generated image of t2i."""
    budget_seconds: float | None
    """None: ipc decides the number of t2i's images."""
    dsco: DscoConfig
    use: Mapping[str, ExpandConfig]
    """How each method that runs the model runs it."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The model's prompt for each class."""
        ids = self.train.class_ids
        return class_prompts(self.class_names, self.prompt, class_ids=ids, own=self.own_prompts)

    @property
    def generated(self) -> int | None:
        """Images per class that t2i makes. None: budget_seconds decides."""
        return None if self.budget_seconds is not None else self.ipc // (1 + self.variants)

    def describe_model(self, method: str) -> dict[str, Any]:
        """The model fields that name the images which `method` renders, for a manifest."""
        return naming.describe_model(*self._used(method))

    def describe_generator(self, method: str) -> dict[str, Any]:
        """The model fields that name the images which `method` made once, for a manifest."""
        return naming.describe_generator(*self._used(method))

    def _used(self, method: str) -> tuple[ModelSource, ExpandConfig, str, dict[str, str]]:
        if self.model is None:
            raise ValueError(f"method {method}: expected a model, got none")
        return self.model, self.use[method], self.prompt, self.own_prompts

    @property
    def samples_per_class(self) -> int:
        """Samples of a class per epoch, for every method; doping adds its own."""
        return self.ipc * self.factor**2

    @property
    def samples(self) -> int:
        """All samples per epoch, with those that show doping's real images."""
        return len(self.class_names) * (self.ipc + self.dope) * self.factor**2

    @property
    def image_size(self) -> int:
        """Side of rendered images and of the networks' inputs, in px."""
        return self.student.size_px

    @property
    def patch_px(self) -> int:
        """Side of a stored patch."""
        return self.image_size // self.factor

    @property
    def student_seeds(self) -> tuple[int, ...]:
        """One per student."""
        return student_seeds(self.seed, self.seeds)
