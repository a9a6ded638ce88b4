"""The cells of a scoreboard: one configuration and one run folder each, OUT/cells/NAME.

Most are a whole `train` of one method; one is the teacher that they share; students of another
network are `train student` on the coreset of another cell. Cells that several parts need are one.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreboard_options import Part

CELLS = "cells"
"""Folder of a board in which the cells' run folders are."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration."""

    name: str
    words: tuple[str, ...]
    """Options of `train` that decide the result, without paths below OUT and what follows from the
    words of `base`."""
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
