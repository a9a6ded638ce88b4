"""What a run will do, with nothing left open: commands/planning.py makes it of the options."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.config import ExpandConfig
from ..engine.data.images import ImageSet
from ..engine.expand.prompts import class_prompts
from ..export.models import ModelSource
from .config import Recipe, Scoring, StudentConfig, TeacherConfig, student_seeds
from .options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's options with nothing left open."""

    options: RunOptions
    train: ImageSet
    val: ImageSet
    data_sha256: str
    """Of the names and sizes of all images of both splits."""
    class_names: tuple[str, ...]
    device: str
    model: ModelSource | None
    """None when no method renders with one."""
    recipe: Recipe
    factor: int
    teacher: TeacherConfig
    """Of a teacher that is trained here."""
    teacher_source: str | None
    """torchvision:NAME or a file; None when the teacher is trained here."""
    student: StudentConfig
    expand: ExpandConfig
    """How dace makes images of patches."""
    generate: ExpandConfig
    """How t2i makes images of nothing, one of each class at a time."""
    own_prompts: dict[str, str]
    """Of the classes in --prompts, by id."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The model's prompt for each class."""
        template, ids = self.options.prompt, self.train.class_ids
        return class_prompts(self.class_names, template, class_ids=ids, own=self.own_prompts)

    @property
    def samples_per_class(self) -> int:
        """Images of a class that a student sees in an epoch, of every method, but for doping's."""
        return self.options.ipc * self.factor**2

    @property
    def doped_samples_per_class(self) -> int:
        """Real images of a class that doping adds to these."""
        return self.options.dope * self.factor**2

    @property
    def image_size(self) -> int:
        """Side of rendered images and of what the networks see, in px."""
        return self.student.size_px

    @property
    def patch_px(self) -> int:
        """Side of a stored patch."""
        return self.image_size // self.factor

    @property
    def scoring(self) -> Scoring:
        """How the teacher is shown a patch that it scores."""
        return self.options.scoring or self.recipe.scoring

    @property
    def student_seeds(self) -> tuple[int, ...]:
        """One per student."""
        return student_seeds(self.options.seed, self.options.seeds)
