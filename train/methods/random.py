"""Method random: patches that no teacher chose, enlarged."""

from __future__ import annotations

from pathlib import Path

from .method import Made, Making, Method
from .upsample import open_enlarged


def _make(making: Making, _: Path) -> Made:
    from .patches import chosen

    return chosen(making, "random")


RANDOM = Method(name="random", takes="patches", make=_make, open=open_enlarged)
