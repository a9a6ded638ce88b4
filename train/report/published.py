"""A paper's table beside ours: rows, statistics, markdown. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from ..papers import PaperPlan
from .page import plus_minus

Coresets = Sequence[Sequence[float | None]]
"""(mean, std) over the students of each coreset, percent."""
ABOUT = (
    "Ours: last epoch, whole validation split; ± over students of one coreset (pooled over "
    "coresets). ± coresets: between the means of coresets, of which there are n."
)


def statistics_of(coresets: Coresets) -> dict[str, Any]:
    """Mean of the coresets' means, and both sample deviations: None where nothing spreads.

    std is over students: sqrt(mean over coresets of their variance).
    """
    means = [mean for mean, _ in coresets if mean is not None]
    stds = [std for _, std in coresets if std is not None]
    return {
        "mean": round(fmean(means), 2),
        "std": round(sqrt(fmean(std**2 for std in stds)), 2) if stds else None,
        "std_over_coresets": round(stdev(means), 2) if len(means) > 1 else None,
        "coresets": len(means),
    }


def compare(plan: PaperPlan, ours: Mapping[str, Coresets]) -> list[dict[str, Any]]:
    """Every row of the plan and of the paper: {row, ours or None, published by set}.

    `ours`: by row, the teachers' too. A mean over students waits for all of them.
    """
    own, published = [cell.row for cell in plan.cells()], plan.published
    found = {row: statistics_of(coresets) for row, coresets in ours.items()}
    for row in (row for row in published if row.endswith("-mean")):
        of = [name for name in own if name.startswith(row.removesuffix("mean"))]
        if of and found.keys() >= set(of):
            found[row] = statistics_of([(fmean(found[name]["mean"] for name in of), None)])
    teachers = [f"teacher-{cell.teacher}" for cell in plan.cells()]
    return [
        {"row": row, "ours": found.get(row), "published": published.get(row, {})}
        for row in dict.fromkeys((*teachers, *own, *published))
    ]


def table(plan: PaperPlan, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table as text, its heading first."""
    head = ("row", "ours, %", "± coresets", "n", *(f"published on {s}, %" for s in plan.sets))
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        ours = row["ours"] or {"mean": None, "std": None, "std_over_coresets": None, "coresets": 0}
        told = (ours["mean"], ours["std"]), (ours["std_over_coresets"], None)
        papers = ((*row["published"].get(name, (None,)), None)[:2] for name in plan.sets)
        number = str(ours["coresets"] or "–")
        lines.append((row["row"], *map(plus_minus, told), number, *map(plus_minus, papers)))
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table in markdown."""
    ruled = (lines[0], ["---"] * len(lines[0]), *lines[1:])
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"
