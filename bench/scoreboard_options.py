"""What a scoreboard can be asked for: parts, methods, sizes, and what its cells share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patchbloom.train.config import TORCHVISION, RecipeName

Part = Literal["methods", "ablation", "patches", "students", "codecs", "gain"]
PARTS: tuple[Part, ...] = ("methods", "ablation", "patches", "students", "codecs", "gain")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All methods under one recipe.

    Words after `--` are options of `train`. Cells on the generated set of 1000 classes take of them
    --device and how students run on it (--student-precision, --student-compile, --accumulate,
    --overlap); students of another network these, what says where the model runs, and
    --learning-rate, since a coreset tells the rest.
    """

    data: str
    """An image folder with train/ and val/ (or test/), or `shapes`: the generated set."""
    out: Path
    """Folder of the board; given again, it goes on where it was stopped."""
    methods: tuple[str, ...] = ("random", "rded", "upsample", "dace")
    """Methods of `train`, by name; one may have options of its own, as "t2i --steps 4".
    `random` comes with the ceiling: the same students on fresh real images."""
    ipc: tuple[int, ...] = (1, 10)
    """Images per class; parts other than methods take the first."""
    seeds: int = 3
    """Students per cell."""
    recipe: RecipeName = "dace"
    epochs: int | None = None
    """Of the students. Left out: the recipe's."""
    image_size: int | None = None
    """In px. Left out: the recipe's."""
    factor: int | None = None
    """r of all parts but patches. Left out: the recipe's."""
    teacher: str | None = None
    """A network to train once, torchvision:NAME, or a file. Left out: the recipe's network."""
    teacher_epochs: int | None = None
    """Left out: the recipe's."""
    parts: tuple[Part, ...] = PARTS
    """methods: by IPC. ablation: DACE's Table 4. patches: its Figure 5 and Table 3. students: its
    Tables 5 and 6. codecs: of labels, at these classes and at 1000. gain: where it comes from."""
    factors: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """r of the part patches; those that the image size or the smallest class rules out are told."""
    students: tuple[str, ...] = ("vgg11", "vit-s", "alexnet", "resnet18")
    """Networks of the part students, beside the recipe's."""
    variant: tuple[str, ...] = ()
    """More lines of the part gain, "NAME=OPTIONS of train" for method dace, as "unguided=--model
    DIR"."""
    hard: bool = False
    """Also train students on hard labels, by `train --targets hard`."""
    dry_run: bool = False
    """List the cells and their time; run none."""
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
        """--methods without options of their own."""
        return [entry.split()[0] for entry in self.methods]

    @property
    def trains_teacher(self) -> bool:
        """False where --teacher is one that exists."""
        given = self.teacher
        return given is None or not (given.startswith(TORCHVISION) or Path(given).is_file())
