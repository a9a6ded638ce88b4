"""What a method is: the facts that options and plan ask for, and what makes and shows its coreset.

A method is a module beside this one, named as the method is, and a line of registry.py. Modules of
methods load no torch before they are asked for more than facts, so that --help is quick.
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
    from .source import DealtSource, Machine


@dataclass(frozen=True, kw_only=True)
class Making:
    """What all methods of a run make their coresets with."""

    plan: Plan
    world: World
    """Its ranks make every coreset together; rank 0 alone writes."""
    report: Report
    teacher: Callable[[], Teacher]
    """Loads it, the first time that it is asked."""
    selections: dict[str, PatchSelection] = field(default_factory=dict)
    """Patches by kind of choice: methods of one kind share them."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A coreset before rank 0 writes it."""

    images_NHWC: Tensor
    """Patches or whole images, uint8, class after class, equally many of each."""
    settings: dict[str, Any]
    """The method's own, in the manifest: `factor`, `patch_px` and `ipc` among them."""
    model: dict[str, Any] | None = None
    """Of the manifest, where images are rendered by it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    """For the stage's result."""


def later(name: str) -> Callable[..., Any]:
    """The function `module.function` of this folder, imported when it is called."""

    def call(*given: Any) -> Any:
        module, function = name.split(".")
        return getattr(import_module(f".{module}", __package__), function)(*given)

    return call


def _nothing(_: Plan) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a coreset and to show it to students."""

    name: str
    takes: Callable[[int, int], tuple[int, str]] | None = None
    """Images of a class that it takes of the data, by ipc and factor, and what for."""
    model: Literal["made", "rendered"] | None = None
    """When it runs a diffusion model: once, as its coreset is made, or as images are rendered."""
    steps: int = 0
    """Default: scheduler steps of the model."""
    sized_by: Literal["--image-size", "--generate-size"] | None = None
    """The option that says how large the model's images are."""
    check: Callable[[Any], None] = lambda _: None
    """ValueError for RunOptions that do not suit it."""
    use: Callable[[Any, int, int], dict[str, Any]] = lambda *_: {}
    """How it uses a model that makes images once: fields of ExpandConfig that follow from
    RunOptions, the size in px that the model was trained at, and the number of classes."""
    settings: Callable[[Plan], dict[str, Any]] = _nothing
    """What decides its coreset beside the settings of all, for a stage's config: plain JSON."""
    rendering: Callable[[Plan], dict[str, Any]] = _nothing
    """What decides its students' images beside the coreset, for a stage's config: plain JSON."""
    make: Callable[[Making, Path], Made]
    """All ranks call it; what it keeps in the folder meanwhile is removed when all is written."""
    open: Callable[[Coreset, Machine], AbstractContextManager[DealtSource]]
    """The images of its coreset."""
    options: Callable[[Plan], dict[str, Any]] | None = None
    """Options of its own, for the summary."""
    announced: Callable[[Plan], str] | None = None
    """A line that is said before the run."""
    noted: Callable[[Plan, Mapping[str, Any]], str] | None = None
    """A line of the report, from the result of the coreset stage."""
