"""Bars with error bars and a dot per student, as `chart.html` draws them in SVG. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """Accuracies in percent."""

    kind: str
    """Classes of its style."""
    name: str
    mean: float
    std: float | None
    parts: Sequence[Sequence[float]]
    """Students of each coreset: a line of dots each."""

    @property
    def label(self) -> str:
        spread = f" ± {self.std:.1f}" if self.std else ""
        return f"{self.mean:.1f}{spread} {self.name}"


def chart(title: str, bars: Sequence[Bar]) -> dict[str, Any]:
    """The values that `bars` of chart.html takes; its axis ends at `top`."""
    seen = [value for bar in bars for part in bar.parts for value in part]
    top = max(1, *seen, *(bar.mean + (bar.std or 0.0) for bar in bars))
    return {"title": title, "bars": bars, "top": 10 * math.ceil(top / 10)}
