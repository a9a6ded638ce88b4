"""A method: facts for options and plan, a function that makes its coreset, one that opens it.

Each method is a module of this folder with the method's name, and an entry in registry.py; see
herding.py for a whole one. These modules import torch inside functions only, or name a function of
another module with `later`, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ...engine.coreset.coreset import Coreset
    from ...engine.select.patches import PatchSelection
    from ..plan import Plan
    from ..run.progress import Report
    from ..run.world import World
    from ..teacher.teacher import Teacher
    from .source import ImageSource, Machine


@dataclass(frozen=True, kw_only=True)
class Making:
    """A run's plan, world and teacher, as every method gets them to make its coreset."""

    plan: Plan
    world: World
    """All its ranks make every coreset together; rank 0 alone writes."""
    report: Report
    teacher: Callable[[], Teacher]
    """Loads the teacher on the first call."""
    selections: dict[str, PatchSelection] = field(default_factory=dict)
    """Patches by kind of choice, shared by the methods of that kind."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A coreset before rank 0 writes it."""

    images_NHWC: Tensor
    """uint8 patches or whole images, class after class, equally many per class; used on rank 0."""
    settings: dict[str, Any]
    """The method's settings in the manifest, with `factor`, `patch_px` and `ipc`."""
    model: dict[str, Any] | None = None
    """`model` in the manifest. None: students' images need no model."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Facts for the manifest that do not name the content."""
    told: dict[str, Any] = field(default_factory=dict)
    """Facts for the stage's result."""


def later(name: str) -> Callable[..., Any]:
    """The function `module.function` of this folder, imported on its first call."""

    def call(*arguments: Any) -> Any:
        module, function = name.split(".")
        return getattr(import_module(f".{module}", __package__), function)(*arguments)

    return call


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a coreset and to show it to students. `name`, `make` and `open` are required.

    RunOptions are typed as Any here, because options.py imports the methods.
    """

    name: str
    make: Callable[[Making, Path], Made]
    """All ranks call it. It may keep unfinished work in the folder, which is removed at the end."""
    open: Callable[[Coreset, Machine], AbstractContextManager[ImageSource]]
    """The images of its coreset."""
    takes: Literal["patches", "images"] | None = None
    """Cut from the training images: one patch from each, or ipc of them whole. None: neither."""
    check: Callable[[Any], None] = lambda _: None
    """Raises ValueError for RunOptions that do not suit the method."""
    model: Literal["made", "rendered"] | None = None
    """When the diffusion model runs: once, to make the coreset, or whenever images are rendered."""
    steps: int = 0
    """Default scheduler steps of the model."""
    sized_by: Literal["--image-size", "--generate-size"] | None = None
    """The option that sets the size of the model's images."""
    use: Callable[[Any, int, int], dict[str, Any]] = lambda *_: {}
    """With model="made": (RunOptions, the model's own size in px, number of classes) → fields of
    ExpandConfig."""
    settings: Callable[[Plan], dict[str, Any]] = lambda _: {}
    """Settings that decide its coreset, beyond the shared ones: for a stage's config."""
    rendering: Callable[[Plan], dict[str, Any]] = lambda _: {}
    """Settings that decide its students' images, beyond the coreset: for a stage's config."""
    options: Callable[[Plan], dict[str, Any]] | None = None
    """Its own options, for the summary."""
    announced: Callable[[Plan], str] | None = None
    """A line logged before the run."""
    noted: Callable[[Plan, Mapping[str, Any]], str] | None = None
    """A note in the report, from the coreset stage's result."""
