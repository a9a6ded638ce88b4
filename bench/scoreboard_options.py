"""Options of a scoreboard: parts, methods, sizes, and the settings that its cells share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patchbloom.train.config import RecipeName, is_ready_teacher

Part = Literal["methods", "ablation", "patches", "students", "codecs", "gain"]
PARTS: tuple[Part, ...] = ("methods", "ablation", "patches", "students", "codecs", "gain")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All methods under one recipe.

    Words after `--` are options of `train`. Cells on the generated 1000-class set take only
    --device and how students run on it (--student-precision, --student-compile, --accumulate,
    --overlap). Students of another network also take the options of where the model runs, and
    --learning-rate; their coreset has the rest.
    """

    data: str
    """An image folder with train/ and val/ (or test/), or `shapes`: the generated set."""
    out: Path
    """Folder of the board; an existing board is resumed."""
    methods: tuple[str, ...] = ("random", "rded", "upsample", "dace")
    """Methods of `train`, by name; an entry may have its own options, as "t2i --steps 4", or
    "rded --recipe rd3" for a second recipe with the same teacher and factor. `random` also measures
    the ceiling: the same students on fresh real images."""
    ipc: tuple[int, ...] = (1, 10)
    """Images per class; parts other than methods use the first."""
    seeds: int = 3
    """Students per cell."""
    recipe: RecipeName = "dace"
    epochs: int | None = None
    """Student epochs. Default: the recipe's."""
    image_size: int | None = None
    """Image size in px. Default: the recipe's."""
    factor: int | None = None
    """r of all parts except patches. Default: the recipe's."""
    teacher: str | None = None
    """As --teacher of train; a network is trained once. Default: the recipe's network."""
    teacher_epochs: int | None = None
    """Teacher epochs. Default: the recipe's."""
    parts: tuple[Part, ...] = PARTS
    """methods: all methods, by IPC. ablation: DACE's Table 4. patches: its Figure 5 and Table 3.
    students: its Tables 5 and 6. codecs: label codecs, with the data's classes and with 1000.
    gain: the contribution of each ingredient."""
    factors: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """r of the part patches; values that the image size or the smallest class rules out are skipped
    with a message."""
    students: tuple[str, ...] = ("vgg11", "vit-s", "alexnet", "resnet18")
    """Networks of the part students, besides the recipe's."""
    variant: tuple[str, ...] = ()
    """Additional lines of the part gain, "NAME=OPTIONS of train" for method dace, as
    "unguided=--model DIR"."""
    hard: bool = False
    """Also train students on hard labels, by `train --targets hard`."""
    dry_run: bool = False
    """List the cells and their estimated times; run none."""
    json: bool = False
    """Print the board as the last line."""
    record: bool = True
    """Append a row per cell to bench/results/."""

    def __post_init__(self) -> None:
        if not (self.methods and self.ipc and self.parts):
            raise ValueError("--methods, --ipc, --parts: expected one or several of each")
        for line in self.variant:
            if not all(part.strip() for part in line.partition("=")):
                raise ValueError(f"--variant {line!r}: expected NAME=OPTIONS of train")
        if not all(entry.strip() for entry in self.methods):
            raise ValueError("--methods: expected names, got an empty one")

    @property
    def method_names(self) -> list[str]:
        """--methods without their options."""
        return [entry.split()[0] for entry in self.methods]

    @property
    def trains_teacher(self) -> bool:
        """False if --teacher already exists."""
        return self.teacher is None or not is_ready_teacher(self.teacher)
