"""Cells of a scoreboard, and the lines of each part's table.

Words after `--` are options of `train`, for every whole `train` and for the teacher. A `train
student` takes those of SAME_ELSEWHERE and RUN_ALIKE, and --learning-rate; the others come from the
manifest of its coreset. With hard targets, whose recipe no manifest records, it also takes
HARD_ALIKE. A cell of the 1000-class set, which has its own data, model and method, takes only
--device and those of RUN_ALIKE.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from patchbloom.engine.data.images import ImageSet
from patchbloom.train.commands.checks import check_network
from patchbloom.train.config import RECIPES
from patchbloom.train.data.folder import images_sha256
from patchbloom.train.data.forms import open_data
from patchbloom.train.options import RunOptions, Train
from patchbloom.train.run.progress import Report
from scoreboard_cells import CELLS, Cell, Line, Size
from scoreboard_options import Options
from thousand_classes import CLASSES, IMAGES, SIZE_PX

TEACHER = Path("teacher", "teacher.safetensors")
COMPARED = ("rded", "dace")
"""Methods of the parts patches and students."""
TEXT_ONLY, NO_MIXUP = ("--start", "noise"), ("--no-mixup",)
HARD = ("--targets", "hard")
"""Options of `train` for students that learn from class indices only."""
TOP_KS, COMPONENTS = (3, 10, 50), (9, 20, 36, 40, 80)
"""Classes and components that the label codecs topk and pca keep."""
SAME_ELSEWHERE = ("model", "backend", "device", "bundles", "engine_batch", "shapes_per_class")
"""Options that `train student --coreset` must be given again."""
RUN_ALIKE = ("student_precision", "student_compile", "accumulate", "overlap")
"""Options that set how students run on this machine, whatever they learn from."""
HARD_ALIKE = ("recipe", "epochs", "batch", "cutmix")
"""Options of hard-target training that a coreset without labels does not record."""
_THOUSAND = ("--recipe", "small", "--image-size", str(SIZE_PX))
THOUSAND_EPOCHS, THOUSAND_TEACHER_EPOCHS = 20, 8
"""Defaults for the 1000-class set."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board's options, and what follows from them and the data."""

    options: Options
    common: tuple[str, ...]
    """Options of `train`; the module's docstring says for which cells."""

    @cached_property
    def image_size(self) -> int:
        return self.options.image_size or RECIPES[self.options.recipe].image_size

    @cached_property
    def factor(self) -> int:
        """r of all parts except patches; by default, the default of `train`."""
        recipe = RECIPES[self.options.recipe]
        return self.options.factor or recipe.factor_for(self.image_size)

    @cached_property
    def shared(self) -> RunOptions:
        """Options that all cells share, as `train` parses them."""
        return _parsed(("--data", self.options.data, *self.common))

    @cached_property
    def counts_K(self) -> np.ndarray:
        """Training images of each class."""
        return np.bincount(self.images("train").labels)

    def images(self, split: Literal["train", "val"]) -> ImageSet:
        """A split of --data in its current state."""
        where, per_class = self.shared.where, self.shared.shapes_per_class
        return open_data(self.options.data, (split,), Report(), where, per_class)[0]

    @cached_property
    def data_sha256(self) -> str:
        """Hash of both splits of --data."""
        return images_sha256(self.images("train"), self.images("val"))

    @cached_property
    def validation_sha256(self) -> str:
        """Hash of the validation images."""
        return images_sha256(self.images("val"))

    def coreset(self, cell: Cell) -> Path:
        """Folder of the coreset that the students of a whole `train` learn from."""
        name = "coreset-doped" if _parsed(cell.words).dope else "coreset"
        return self.options.out / CELLS / cell.name / name

    def model_spec(self, cell: Cell) -> str | None:
        """The --model of a whole `train`."""
        return _parsed(cell.words).model

    def teacher_spec(self, *, generated: bool) -> str:
        """--teacher of a whole `train`: an existing one, or the file that a teacher cell writes."""
        if generated or self.options.trains_teacher:
            own = self.thousand_teacher if generated else self.teacher
            return str(self.options.out / CELLS / own.name / TEACHER)
        return self.options.teacher or ""

    @cached_property
    def teacher(self) -> Cell:
        """The cell that trains the common teacher; its method is irrelevant, and needs no model."""
        o = self.options
        words = ("teacher", *self._shared(), "--method", "random")
        words += _given("--teacher", o.teacher) + _given("--teacher-epochs", o.teacher_epochs)
        return Cell(name="teacher", words=words, classes=len(self.counts_K))

    def cell(self, method: str, ipc: int, *own: str) -> Cell:
        """A whole `train` of one method; only the plain `random` cell measures the ceiling.

        Adding methods to a board therefore reruns no cell.
        """
        ceiling = "--ceiling" if (method, *own) == ("random",) else "--no-ceiling"
        words = (*self._shared(), "--method", method, "--ipc", str(ipc))
        words += ("--factor", str(self.factor))
        words += ("--seeds", str(self.options.seeds), *_given("--epochs", self.options.epochs))
        name = "-".join((method, f"ipc{ipc}", *own, *[ceiling] * (ceiling == "--ceiling")))
        return Cell(name=_slug(name), words=(*words, ceiling, *own), classes=len(self.counts_K))

    def elsewhere(self, base: Cell, network: str) -> Cell:
        """Students of another network, on the coreset of `base`.

        Raises ValueError when the network cannot take the images, or when no labels are stored.
        """
        check_network("--students", network, base.classes, self.image_size)
        run = _parsed(base.words)
        if run.targets == "soft" and run.labels == "online":
            raise ValueError(
                "--labels online stores no labels, and the part students learns from stored ones: "
                "leave it out, or give --parts without students"
            )
        given = (_given(f"--{n.replace('_', '-')}", getattr(run, n)) for n in SAME_ELSEWHERE)
        rate = RECIPES[self.options.recipe].student_for(
            ipc=run.ipc, factor=self.factor, classes=base.classes, network=network
        )
        words = ("student", "--data", run.data, "--student", network, "--seeds", str(run.seeds))
        learning_rate = run.learning_rate or rate.learning_rate
        words += ("--learning-rate", str(learning_rate), *(w for each in given for w in each))
        return Cell(
            name=_slug(f"{base.name}-{network}"), words=words, classes=base.classes, base=base
        )

    def learn_as(self, base: Cell) -> tuple[str, ...]:
        """Options that make `train student` learn from the coreset of `base` as `base` did."""
        run = _parsed(base.words)
        alike = RUN_ALIKE if run.targets == "soft" else (*RUN_ALIKE, *HARD_ALIKE)
        words = ("--coreset", str(self.coreset(base)), "--targets", run.targets)
        return (*words, *_chosen(run, alike))

    @cached_property
    def thousand_teacher(self) -> Cell:
        """The cell that trains the teacher of the generated 1000-class set."""
        epochs = self.options.teacher_epochs or THOUSAND_TEACHER_EPOCHS
        words = ("teacher", *_THOUSAND, "--method", "random", "--teacher-epochs", str(epochs))
        words += _chosen(self.shared, ("device", *RUN_ALIKE))
        return Cell(name="thousand-teacher", words=words, classes=CLASSES, generated=True)

    def thousand(self, *codec: str) -> Cell:
        """Students on whole images of the 1000-class set, with labels of one codec."""
        o = self.options
        words = (*_THOUSAND, "--method", "upsample", "--ipc", str(o.ipc[0]), "--factor", "1")
        words += ("--epochs", str(o.epochs or THOUSAND_EPOCHS), "--seeds", str(o.seeds))
        name = _slug(f"thousand-{'-'.join(codec) or 'dense'}")
        words += ("--no-ceiling", *_chosen(self.shared, ("device", *RUN_ALIKE)), *codec)
        return Cell(name=name, words=words, classes=CLASSES, generated=True)

    def lines(self) -> list[Line]:
        """Every line of the requested parts."""
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
        """Each cell once: teachers first, and every cell after the one it needs."""
        cells = [self.teacher] if self.options.trains_teacher else []
        lines = self.lines()
        cells += [self.thousand_teacher] if any(line.cell.generated for line in lines) else []
        for line in lines:
            cells += [cell for cell in (line.cell.base, line.cell, line.hard) if cell is not None]
        return list(dict.fromkeys(cells))

    def size(self, cell: Cell) -> Size:
        """The cell's amount of work. Raises ValueError when `train` rejects its options."""
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
        samples = cell.classes * (run.ipc + run.dope) * (run.factor or self.factor) ** 2
        epochs = run.epochs or recipe.student.epochs
        return Size(run.methods[0], network, image_size, run.seeds, samples, epochs)

    def left_out(self) -> tuple[int, ...]:
        """--factors that the image size or the smallest class rules out."""
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
            for label, own in _codecs_of(classes):
                cell = self.cell(method, ipc, *own) if classes == here else self.thousand(*own)
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


def _codecs_of(classes: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Codecs for this many classes: name, and options of `train`."""
    yield "dense", ()
    for k in (k for k in TOP_KS if 2 * k < classes):
        yield f"top-{k}", ("--codec", "topk", "--top-k", str(k))
    for k in (k for k in COMPONENTS if k < classes):
        yield f"pca-{k}", ("--codec", "pca", "--components", str(k))


@cache
def _parsed(words: tuple[str, ...]) -> Train:
    """The options as `train` parses them, with placeholders for --data and --out."""
    return tyro.cli(Train, prog="train", args=["--data", ".", *words, "--out", "."])


def _given(option: str, value: object) -> tuple[str, ...]:
    return () if value is None else (option, str(value))


def _chosen(run: RunOptions, names: Iterable[str]) -> tuple[str, ...]:
    """Words for those of the named options that differ from their defaults."""
    by_itself = _parsed(())
    words: list[str] = []
    for name in names:
        value = getattr(run, name)
        if value != getattr(by_itself, name):
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value)]
    return tuple(words)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
