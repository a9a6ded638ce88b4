"""Method random: patches that no teacher chose, enlarged."""

from __future__ import annotations

from pathlib import Path

from .method import Made, Making, Method
from .upsample import open_enlarged, takes_patches


def _make(making: Making, _: Path) -> Made:
    from .patches import chosen

    return chosen(making, "random")


RANDOM = Method(name="random", takes=takes_patches, make=_make, open=open_enlarged)
