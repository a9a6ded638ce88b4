"""The cells of a scoreboard: one configuration and one run folder each, OUT/cells/NAME.

Most are a whole `train` of one method; one is the teacher that they share; students of another
network are `train student` on the coreset of another cell. Parts that need the same cell share it.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoreboard_options import Part

CELLS = "cells"
"""Folder of the cells' run folders within a board."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration."""

    name: str
    words: tuple[str, ...]
    """Options of `train` that decide the result, without paths below OUT and options that follow
    from the words of `base`."""
    classes: int
    base: Cell | None = None
    """The cell whose coreset this cell's students learn from."""
    generated: bool = False
    """Whether it uses the generated 1000-class set, which has its own teacher."""

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
    """Properties that decide the time of a cell."""

    method: str
    student: str
    image_size: int
    seeds: int
    samples: int
    epochs: int
