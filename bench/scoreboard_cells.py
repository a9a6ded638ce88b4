"""The cells of a scoreboard: which runs of `train` they are, and which line of which table.

A cell is one configuration and one run folder, OUT/cells/NAME. Most are a whole `train` of one
method; one is the teacher that they share; students of another network are `train student` on the
coreset of another cell. Cells that several parts need are one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from patchbloom.engine.images import open_image_set
from patchbloom.train.commands import RunOptions, Train
from patchbloom.train.config import RECIPES, RecipeName
from patchbloom.train.data_folder import data_folder
from patchbloom.train.networks import TORCHVISION
from patchbloom.train.record import Silence
from patchbloom.train.requirements import check_network
from thousand_classes import CLASSES, IMAGES, SIZE_PX

Part = Literal["methods", "ablation", "patches", "students", "codecs", "gain"]
PARTS: tuple[Part, ...] = ("methods", "ablation", "patches", "students", "codecs", "gain")
COMPARED = ("rded", "dace")
"""Methods of the parts patches and students."""
TEXT_ONLY, NO_MIXUP = ("--start", "noise"), ("--no-mixup",)
HARD = ("--targets", "hard")
"""Options of `train` for students that learn from class indices alone."""
TOP_KS = (3, 10, 50)
SAME_ELSEWHERE = ("model", "backend", "device", "bundles", "engine_batch", "shapes_per_class")
"""Options that `train student --coreset` has to be given again."""
_THOUSAND = ("--recipe", "small", "--image-size", str(SIZE_PX))
THOUSAND_EPOCHS, THOUSAND_TEACHER_EPOCHS = 20, 8
"""Of the set of 1000 classes, where nobody says."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All methods under one recipe. Words after `--` are options of `train` for every cell."""

    data: str
    """An image folder with train/ and val/ (or test/), or `shapes`: the generated set."""
    out: Path
    """Folder of the board; given again, it goes on where it was stopped."""
    methods: tuple[str, ...] = ("random", "rded", "upsample", "dace")
    """Methods of `train`, by name; one may have options of its own, as "t2i --steps 4"."""
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
    rates: tuple[Path, ...] = ()
    """Other boards, or files of their rows, that tell a --dry-run how long a cell takes."""
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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration."""

    name: str
    words: tuple[str, ...]
    """Options of `train` that decide the result, without paths below OUT."""
    classes: int
    base: Cell | None = None
    """Whose coreset this cell's students learn from."""
    generated: bool = False
    """On the generated set of 1000 classes, with a teacher of its own."""

    @property
    def kind(self) -> str:
        """The sub-command of `train`, or an empty string."""
        return self.words[0] if self.words[0] in ("teacher", "student") else ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a part's table, one bar of its plot."""

    part: Part
    group: str
    label: str
    cell: Cell
    hard: Cell | None = None


@dataclass(frozen=True)
class Size:
    """What decides the time of a cell."""

    method: str
    student: str
    image_size: int
    seeds: int
    samples: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Board:
    """The options, with the data looked at."""

    options: Options
    common: tuple[str, ...]
    """Options of `train` for every cell."""

    @cached_property
    def image_size(self) -> int:
        return self.options.image_size or RECIPES[self.options.recipe].image_size

    @cached_property
    def factor(self) -> int:
        return self.options.factor or RECIPES[self.options.recipe].factor

    @cached_property
    def shared(self) -> RunOptions:
        """What all cells have in common, as `train` takes it."""
        return _parsed(("--data", self.options.data, *self.common))

    @cached_property
    def counts_K(self) -> np.ndarray:
        """Training images of each class."""
        folder = data_folder(self.options.data, self.shared.shapes_per_class, Silence())
        return np.bincount(open_image_set(folder, "train").labels)

    @cached_property
    def teacher(self) -> Cell:
        """What trains the teacher of all cells; its method, which plays no part, needs no model."""
        o = self.options
        words = ("teacher", *self._shared(), "--method", "random")
        words += _given("--teacher", o.teacher) + _given("--teacher-epochs", o.teacher_epochs)
        return Cell(name="teacher", words=words, classes=len(self.counts_K))

    def cell(self, method: str, ipc: int, *own: str) -> Cell:
        """A whole `train` of one method; that of `random`, or else the first, has the ceiling."""
        methods = self.options.methods
        holder = "random" if "random" in methods else methods[0]
        ceiling = "--ceiling" if shlex.join((method, *own)) == holder else "--no-ceiling"
        words = (*self._shared(), "--method", method, "--ipc", str(ipc))
        words += ("--factor", str(self.factor))
        words += ("--seeds", str(self.options.seeds), *_given("--epochs", self.options.epochs))
        name = "-".join((method, f"ipc{ipc}", *own, *[ceiling] * (ceiling == "--ceiling")))
        return Cell(name=_slug(name), words=(*words, ceiling, *own), classes=len(self.counts_K))

    def elsewhere(self, base: Cell, network: str) -> Cell:
        """Students of another network, on the coreset of `base`."""
        check_network("--students", network, base.classes, self.image_size)
        run = _parsed(base.words)
        given = (_given(f"--{n.replace('_', '-')}", getattr(run, n)) for n in SAME_ELSEWHERE)
        rate = RECIPES[self.options.recipe].student_for(
            ipc=run.ipc, factor=self.factor, classes=base.classes, network=network
        )
        words = ("student", "--data", run.data, "--student", network, "--seeds", str(run.seeds))
        words += ("--learning-rate", str(rate.learning_rate), *(w for each in given for w in each))
        return Cell(
            name=_slug(f"{base.name}-{network}"), words=words, classes=base.classes, base=base
        )

    @cached_property
    def thousand_teacher(self) -> Cell:
        """What trains the teacher of the generated set of 1000 classes."""
        epochs = self.options.teacher_epochs or THOUSAND_TEACHER_EPOCHS
        words = ("teacher", *_THOUSAND, "--method", "random", "--teacher-epochs", str(epochs))
        return Cell(name="thousand-teacher", words=words, classes=CLASSES, generated=True)

    def thousand(self, *codec: str) -> Cell:
        """Students of whole images of the set of 1000 classes, by labels of a codec."""
        o = self.options
        words = (*_THOUSAND, "--method", "upsample", "--ipc", str(o.ipc[0]), "--factor", "1")
        words += ("--epochs", str(o.epochs or THOUSAND_EPOCHS), "--seeds", str(o.seeds))
        name = _slug(f"thousand-{'-'.join(codec) or 'dense'}")
        words += ("--no-ceiling", *codec)
        return Cell(name=name, words=words, classes=CLASSES, generated=True)

    def lines(self) -> list[Line]:
        """Every line of every part that was asked for."""
        of_part = {
            "methods": self._methods,
            "ablation": self._ablation,
            "patches": self._patches,
            "students": self._students,
            "codecs": self._codecs,
            "gain": self._gain,
        }
        return [line for part in self.options.parts for line in of_part[part]()]

    def cells(self) -> list[Cell]:
        """Each cell once, the teacher first, one that others need before them."""
        cells = [self.teacher] if self.options.trains_teacher else []
        lines = self.lines()
        cells += [self.thousand_teacher] if any(line.cell.generated for line in lines) else []
        for line in lines:
            cells += [cell for cell in (line.cell.base, line.cell, line.hard) if cell is not None]
        return list(dict.fromkeys(cells))

    def size(self, cell: Cell) -> Size:
        """How much work it is; ValueError where `train` refuses its options."""
        run = _parsed(cell.words[1:] if cell.kind == "teacher" else (cell.base or cell).words)
        recipe = RECIPES[run.recipe or self.options.recipe]
        image_size = run.image_size or self.image_size
        if cell.kind == "teacher":
            network, epochs = run.teacher or recipe.teacher.network, run.teacher_epochs
            images = CLASSES * IMAGES["train"] if cell.generated else int(self.counts_K.sum())
            return Size("teacher", network, image_size, 1, images, epochs or recipe.teacher.epochs)
        network = run.student or recipe.student.network
        if cell.base is not None:
            network = cell.words[cell.words.index("--student") + 1]
        samples = cell.classes * run.ipc * (run.factor or self.factor) ** 2
        epochs = run.epochs or recipe.student.epochs
        return Size(run.methods[0], network, image_size, run.seeds, samples, epochs)

    def left_out(self) -> tuple[int, ...]:
        """Those of --factors that cannot be."""
        fewest, ipc = int(self.counts_K.min()), self.options.ipc[0]
        return tuple(r for r in self.options.factors if self.image_size % r or ipc * r**2 > fewest)

    def _shared(self) -> tuple[str, ...]:
        o = self.options
        sized = ("--recipe", o.recipe, "--image-size", str(self.image_size))
        return ("--data", o.data, *sized, *self.common)

    def _methods(self) -> Iterable[Line]:
        for ipc in self.options.ipc:
            for entry in self.options.methods:
                method, *own = shlex.split(entry)
                cell, group = self.cell(method, ipc, *own), f"IPC {ipc}"
                hard = self.cell(method, ipc, *own, *HARD) if self.options.hard else None
                yield Line(part="methods", group=group, label=entry, cell=cell, hard=hard)

    def _ablation(self) -> Iterable[Line]:
        ipc = self.options.ipc[0]
        for label, method, own in (
            ("rded", "rded", ()),
            ("text only", "dace", TEXT_ONLY),
            ("rho 0.4", "dace", ("--rho", "0.4", *NO_MIXUP)),
            ("rho 0.8", "dace", NO_MIXUP),
            ("rho 0.8, mixup", "dace", ()),
        ):
            cell = self.cell(method, ipc, *own)
            yield Line(part="ablation", group=f"IPC {ipc}", label=label, cell=cell)

    def _patches(self) -> Iterable[Line]:
        ipc, out = self.options.ipc[0], self.left_out()
        for method in COMPARED:
            for r in (r for r in self.options.factors if r not in out):
                own = () if r == self.factor else ("--factor", str(r))
                cell, label = self.cell(method, ipc, *own), f"r = {r} ({self.image_size // r} px)"
                yield Line(part="patches", group=method, label=label, cell=cell)

    def _students(self) -> Iterable[Line]:
        for method in COMPARED:
            base = self.cell(method, self.options.ipc[0])
            own = self.size(base).student
            yield Line(part="students", group=method, label=own, cell=base)
            for network in (name for name in self.options.students if name != own):
                cell = self.elsewhere(base, network)
                yield Line(part="students", group=method, label=network, cell=cell)

    def _codecs(self) -> Iterable[Line]:
        methods = self.options.method_names
        method = "dace" if "dace" in methods else methods[0]
        here, ipc = len(self.counts_K), self.options.ipc[0]
        for classes in dict.fromkeys((here, CLASSES)):
            for k in (None, *(k for k in TOP_KS if 2 * k < classes)):
                own = () if k is None else ("--codec", "topk", "--top-k", str(k))
                cell = self.cell(method, ipc, *own) if classes == here else self.thousand(*own)
                label = "dense" if k is None else f"top-{k}"
                yield Line(part="codecs", group=f"{classes} classes", label=label, cell=cell)

    def _gain(self) -> Iterable[Line]:
        ipc = self.options.ipc[0]
        variants = (line.partition("=") for line in self.options.variant)
        for label, method, own in (
            ("random", "random", ()),
            ("upsample", "upsample", ()),
            ("text only", "dace", TEXT_ONLY),
            ("dace, no mixup", "dace", NO_MIXUP),
            ("dace", "dace", ()),
            *((name.strip(), "dace", tuple(shlex.split(words))) for name, _, words in variants),
        ):
            cell = self.cell(method, ipc, *own)
            yield Line(part="gain", group=f"IPC {ipc}", label=label, cell=cell)


def _parsed(words: Sequence[str]) -> Train:
    """The options as `train` takes them, with a place for data where they name none."""
    return tyro.cli(Train, prog="train", args=["--data", ".", *words, "--out", "."])


def _given(option: str, value: object) -> tuple[str, ...]:
    return () if value is None else (option, str(value))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
