"""`train compare`: finished runs in one table and one self-contained page. Torch-free.

Runs that differ in seeds alone are one group, and a method in a group is a row. Students of one
coreset tell nothing about other coresets: pairs of several count once per coreset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from ...engine.console import print_table
from ...export.durable import replace_file
from ...export.terminal import visible
from ..options import TrainCompare
from .chart import Bar, chart
from .page import ReportError, plain, render_page
from .paired import flip_signs
from .runs import Run, read_run

LONGEST = 60  # characters of a setting's value
NAMED = ("method", "run", "targets")
ACCURACY = (*NAMED, "mean", "std_students", "students", "std_coresets", "coresets")
PAIRED = (*NAMED, "pairs", "difference", "low", "high", "coverage", "p", "least_p")
FORMATS = {"difference": "+.1f", "low": "+.1f", "high": "+.1f", "p": ".3g", "least_p": ".3g"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a group of runs."""

    method: str
    runs: list[str]
    targets: str
    students: list[dict[int, float]]
    """Accuracy in percent by student seed, for each coreset."""

    @property
    def named(self) -> dict[str, str]:
        more = f" and {len(self.runs) - 1} more" if self.runs[1:] else ""
        return {"method": self.method, "run": self.runs[0] + more, "targets": self.targets}

    @property
    def accuracy(self) -> dict[str, Any]:
        """Mean of the coresets' means; deviations within coresets, pooled, and of the means."""
        means = [fmean(part.values()) for part in self.students]
        many = [part.values() for part in self.students if len(part) > 1]
        squares = sum(variance(part) * (len(part) - 1) for part in many)
        free = sum(len(part) - 1 for part in many)
        return {
            **self.named,
            "mean": fmean(means),
            "std_students": sqrt(squares / free) if free else None,
            "students": sum(map(len, self.students)),
            "std_coresets": stdev(means) if len(means) > 1 else None,
            "coresets": len(means),
        }

    def less(self, reference: Row) -> dict[str, Any]:
        """The differences to the reference, by students of the same seed."""
        shared = [
            [part[seed] - other[seed] for seed in sorted(part.keys() & other.keys())]
            for part in self.students
            for other in reference.students
        ]
        parts = [differences for differences in shared if differences]
        if not parts:
            return {**self.named, "pairs": "no common seeds"}
        pairs, unit = ([*map(fmean, parts)], "coresets") if parts[1:] else (parts[0], "students")
        return {**self.named, "pairs": f"{len(pairs)} {unit}", **flip_signs(pairs)}


def compare_runs(options: TrainCompare) -> dict[str, Any]:
    """Print the tables, write the page if --out asks for it; returns the result, plain JSON.

    Raises ReportError, one line, for a folder that holds no finished run, one that is given twice,
    and a reference that no run has.
    """
    runs = _read(options.runs)
    rows = _rows(runs)
    methods = list(dict.fromkeys(row.method for row in rows))
    if options.reference not in (None, *methods):
        raise ReportError(f"--reference {options.reference}: expected one of {', '.join(methods)}")
    reference = next(row for row in rows if row.method == (options.reference or methods[0]))
    first = runs[reference.runs[0]]
    unlike = {label: why for label, run in runs.items() if (why := run.unlike(first))}
    others = [row for row in rows if row is not reference and row.runs[0] not in unlike]
    reasons = {", ".join(why): [] for why in unlike.values()}
    for label, why in unlike.items():
        reasons[", ".join(why)].append(label)
    result = {
        "runs": dict(zip(runs, map(str, options.runs), strict=True)),
        "differences": _differences(list(runs.values())),
        "not_comparable": unlike,
        "accuracy": [{**row.accuracy, "runs": row.runs} for row in rows],
        "reference": {**reference.named, "runs": reference.runs},
        "paired": [{**row.less(reference), "runs": row.runs} for row in others],
        "page": options.out and str(options.out),
    }
    tables = {
        "settings": [
            ("setting", *runs),
            *((name, *map(_short, values)) for name, values in result["differences"].items()),
        ],
        "unlike": [f"{', '.join(labels)}: {why}" for why, labels in reasons.items()],
        "accuracy": _table(ACCURACY, result["accuracy"]),
        "paired": _table(PAIRED, result["paired"]),
        "reference": "{method} ({run}, {targets})".format(**reference.named),
    }
    if not options.json:
        _print(tables)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        page = render_page("comparison.html", **tables, chart=_chart(rows, unlike))
        replace_file(options.out, page)
    return result


def _read(folders: Sequence[Path]) -> dict[str, Run]:
    """The runs by label: the path below the folder that holds them all."""
    places = [folder.resolve() for folder in folders]
    above = os.path.commonpath([place.parent for place in places])
    runs: dict[str, Run] = {}
    for folder, place in zip(folders, places, strict=True):
        label = os.path.relpath(place, above)
        if label in runs:
            raise ReportError(f"{folder} is given twice: leave one of them out")
        runs[label] = read_run(folder)
    return runs


def _rows(runs: Mapping[str, Run]) -> list[Row]:
    groups: list[list[str]] = []
    for label, run in runs.items():
        for group in groups:
            if all(run.differs_in_seeds_alone(runs[other]) for other in group):
                group.append(label)
                break
        else:
            groups.append([label])
    rows = []
    for group in groups:
        targets = str(runs[group[0]].settings.get("targets", "soft"))
        for method in dict.fromkeys(method for label in group for method in runs[label].students):
            labels = [label for label in group if method in runs[label].students]
            students: dict[str, dict[int, float]] = {}
            for label in labels:
                coreset = runs[label].coresets.get(method, label)
                students.setdefault(coreset, {}).update(runs[label].students[method])
            rows.append(
                Row(method=method, runs=labels, targets=targets, students=[*students.values()])
            )
    return rows


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that differ among the runs that record them; None where a run does not."""
    recorded = [run.settings | run.origin for run in runs]
    differences = {}
    for name in dict.fromkeys(name for each in recorded for name in each):
        known = [each[name] for each in recorded if name in each]
        if any(value != known[0] for value in known):
            differences[name] = [each.get(name) for each in recorded]
    return differences


def _short(value: Any) -> str:
    text = plain(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _table(heads: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    shown = [head.replace("std_", "± ").replace("_", " ") for head in heads]
    return [shown, *([_cell(head, row.get(head)) for head in heads] for row in rows)]


def _cell(head: str, value: Any) -> str:
    if head == "coverage" and value is not None:
        return f"{100 * value:.3g} %"
    return format(value, FORMATS.get(head, ".1f")) if isinstance(value, float) else plain(value)


def _print(tables: Mapping[str, Any]) -> None:
    if tables["settings"][1:]:
        print_table([[*map(visible, tables["settings"][0])], *tables["settings"][1:]])
    else:
        print("no setting differs")
    for why in tables["unlike"]:
        print(visible(f"not comparable with the reference: {why}"))
    print()
    print_table(tables["accuracy"])
    if tables["paired"][1:]:
        print(f"\ndifferences to {visible(tables['reference'])}")
        print_table(tables["paired"])


def _chart(rows: Sequence[Row], unlike: Mapping[str, list[str]]) -> dict[str, Any]:
    """A bar per row, with ± over coresets where there are several."""
    bars = []
    for row in rows:
        told, odd = row.accuracy, row.runs[0] in unlike
        std = told["std_students"] if told["std_coresets"] is None else told["std_coresets"]
        label = "{method}, {targets}, {run}".format(**told) + ", not comparable" * odd
        parts = [list(part.values()) for part in row.students]
        bars.append(
            Bar(f"{row.targets} unlike" if odd else row.targets, label, told["mean"], std, parts)
        )
    return chart("Accuracy in percent by method and run", bars)
