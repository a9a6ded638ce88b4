"""The page of a scoreboard: markdown tables, winners with gaps in standard deviations, plots.

Accuracies are [mean, std] in percent over students of one coreset; std is the sample's, or None for
one student. A gap is the difference of two means over their pooled deviation,

    (a - b) / sqrt((std_a² + std_b²) / 2)

Below CLEAR_GAPS, by the number of students, Student's t-test at 5 % does not separate them. Rows
are those of scoreboard_rows.py, by the name of their cell.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from patchbloom.export.durable import replace_file
from patchbloom.train.report.page import plus_minus
from patchbloom.train.run.progress import duration
from scoreboard_cells import Line

Row = Mapping[str, Any]
Accuracy = Sequence[Any]
OF_WHAT = "over students of one coreset and one teacher only"
CLEAR_GAPS = {2: 4.31, 3: 2.27, 4: 1.74, 5: 1.46}
CLEAR_GAP_OF_MORE = 1.29  # for 6 students; more students would need less
HEADS = {
    "methods": "Methods",
    "ablation": "Ablation (DACE, Table 4)",
    "patches": "Patch size (DACE, Figure 5 and Table 3)",
    "students": "Other students, the same coreset (DACE, Tables 5 and 6)",
    "codecs": "Label codecs",
    "gain": "Sources of the gain",
}
DIFFERENCES = (
    ("the teacher's choice of patches", "upsample", "random"),
    ("the prior alone", "text only", "upsample"),
    ("anchor patches", "dace, no mixup", "text only"),
    ("mixup", "dace", "dace, no mixup"),
)
COLUMNS = (
    *("", "line", "accuracy, %", "hard labels, %", "gap to the best", "of the ceiling"),
    *("recognised", "evals", "without labels", "with labels", "with generator", "B a label"),
    *("s per epoch", "in all"),
)
SECOND_PANELS = {
    "patches": ("seconds_per_epoch", "s per epoch"),
    "codecs": ("label_bytes", "B a label"),
}


def render(lines: Sequence[Line], rows: Mapping[str, Row], failed: Mapping[str, str]) -> str:
    """The page; lines of unfinished cells show dashes."""
    parts = [f"# Scoreboard\n\n{_about(rows)}"]
    for part in dict.fromkeys(line.part for line in lines):
        of_part = [line for line in lines if line.part == part]
        parts.append(f"## {HEADS[part]}")
        parts.append("\n".join(_table(of_part, rows)))
        said = list(_codec_notes(of_part, rows) if part == "codecs" else _winners(of_part, rows))
        said += _differences(of_part, rows) if part == "gain" else ()
        parts.append("\n".join(f"- {sentence}" for sentence in said))
        parts.append(f"![{HEADS[part]}](plots/{part}.png)")
    if failed:
        parts.append("## Failed\n\n" + "\n".join(f"- {k}: {v}" for k, v in failed.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def gap(one: Accuracy, other: Accuracy) -> float | None:
    """Pooled standard deviations by which `one` exceeds `other`; None without any spread."""
    if one[1] is None or other[1] is None or not (one[1] or other[1]):
        return None
    return (one[0] - other[0]) / math.sqrt((one[1] ** 2 + other[1] ** 2) / 2)


def write_plots(lines: Sequence[Line], rows: Mapping[str, Row], folder: Path) -> None:
    """Write FOLDER/PART.png for every part with a finished cell."""
    for part in dict.fromkeys(line.part for line in lines):
        done = [line for line in lines if line.part == part and line.cell.name in rows]
        if not done:
            continue
        second = SECOND_PANELS.get(part)
        panels = [("accuracy", "accuracy, %"), *([second] if second else [])]
        figure = Figure(figsize=(6.4 * len(panels), 3.8), layout="constrained")
        beside = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, title) in zip(beside, panels, strict=True):
            _bars(axes, done, rows, key)
            axes.set_ylabel(title, fontsize=9)
        figure.suptitle(HEADS[part], fontsize=10)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
        replace_file(folder / f"{part}.png", png.getvalue())


def _bars(axes: Axes, lines: Sequence[Line], rows: Mapping[str, Row], key: str) -> None:
    """Draw a bar per line in its group's colour, and the group's ceiling as a dashed line."""
    labels = list(dict.fromkeys(line.label for line in lines))
    groups = list(dict.fromkeys(line.group for line in lines))
    width = 0.8 / len(groups)
    for number, group in enumerate(groups):
        own = [line for line in lines if line.group == group]
        values = [rows[line.cell.name][key] for line in own]
        at = [labels.index(line.label) + (number - (len(groups) - 1) / 2) * width for line in own]
        means = [value[0] if key == "accuracy" else value for value in values]
        errors = [value[1] or 0.0 for value in values] if key == "accuracy" else None
        heights = [math.nan if mean is None else mean for mean in means]
        bars = axes.bar(at, heights, width, yerr=errors, capsize=3, label=group)
        ceiling = _ceiling(own, rows)
        if key == "accuracy" and ceiling is not None:
            axes.axhline(ceiling[0], color=bars[0].get_facecolor(), linestyle="--", linewidth=1)
    if key == "label_bytes":
        axes.set_yscale("log")
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=20, ha="right")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _about(rows: Mapping[str, Row]) -> str:
    """Settings that all cells share, and the recipes."""
    done = [row for row in rows.values() if row.get("recipe")]
    if not done:
        return "No cell is done."
    row = done[0]
    data, teacher = row["data"], row["teacher"]
    recipes = dict.fromkeys(f"recipe {row['recipe']}, {row['epochs']} epochs" for row in done)
    return (
        f"{data['name']}: {data['training_images']} training and {data['validation_images']} "
        f"validation images of {data['classes']} classes; "
        f"{' and '.join(recipes)}, {row['image_size']} px; students {row['student']}, "
        f"{row['seeds']} of one coreset per line, mean ± std; teacher {teacher['architecture']}, "
        f"{plus_minus([teacher['accuracy'], None])} %{_models(rows)}. "
        "Accuracy of the last epoch on the whole validation set. A gap is in pooled standard "
        "deviations. Recognised: what the teacher takes for its class of the last epoch's views. "
        f"{row['device']}.{_commits(rows)}"
    )


def _models(rows: Mapping[str, Row]) -> str:
    """Models that made images for any cell."""
    named = [row["model"] for row in rows.values() if row.get("model")]
    told = dict.fromkeys(f"{model['name']} (sha256 {model['sha256'][:12]}…)" for model in named)
    return f"; model {', '.join(told)}" if told else ""


def _commits(rows: Mapping[str, Row]) -> str:
    """Commits that measured the cells, if there are several."""
    told = Counter(
        f"{row['commit']}{'-dirty' if row.get('dirty') else ''}"
        for row in rows.values()
        if row.get("commit")
    )
    if len(told) < 2:
        return ""
    each = ", ".join(f"{commit} ({count})" for commit, count in told.items())
    return f" The cells were measured at {len(told)} commits: {each}; a gap may be of the code."


def _table(lines: Sequence[Line], rows: Mapping[str, Row]) -> Iterator[str]:
    hard = any(line.hard for line in lines)
    shown = [column for column in range(len(COLUMNS)) if hard or column != 3]
    yield _markdown_line([COLUMNS[column] for column in shown])
    yield _markdown_line(["---"] * len(shown))
    for group in dict.fromkeys(line.group for line in lines):
        own = [line for line in lines if line.group == group]
        ranked, ceiling = _ranked(own, rows), _ceiling(own, rows)
        for line in own:
            cells = _cells(line, rows, ranked[0] if ranked else None, ceiling)
            yield _markdown_line([cells[column] for column in shown])
        if ceiling is not None:
            dashes = ["–"] * (len(shown) - 4)
            cells = [group, "fresh real images (ceiling)", plus_minus(ceiling), "–", *dashes]
            yield _markdown_line(cells)


def _cells(
    line: Line, rows: Mapping[str, Row], best: Line | None, ceiling: Accuracy | None
) -> list[str]:
    row = rows.get(line.cell.name)
    if row is None or best is None:
        return [line.group, line.label, *["–"] * (len(COLUMNS) - 2)]
    hard = rows.get(line.hard.name) if line.hard else None
    behind = gap(row["accuracy"], rows[best.cell.name]["accuracy"])
    share = 100 * row["accuracy"][0] / ceiling[0] if ceiling and ceiling[0] else None
    sizes = (row["bytes"][k] for k in ("without_labels", "with_labels", "with_generator"))
    per_epoch, recognised = row["seconds_per_epoch"], row.get("recognised")
    return [
        line.group,
        line.label,
        plus_minus(row["accuracy"]),
        plus_minus(hard["accuracy"] if hard else None),
        "best" if line == best else "–" if behind is None else f"{behind:.1f}",
        "–" if share is None else f"{share:.0f} %",
        "–" if recognised is None else f"{recognised:.0f} %",
        str(row["evals"]),
        *map(_amount, sizes),
        f"{row['label_bytes']:.1f}",
        "–" if per_epoch is None else f"{per_epoch:.2f}",
        duration(row["total_s"]),
    ]


def _winners(lines: Sequence[Line], rows: Mapping[str, Row]) -> Iterator[str]:
    for group in dict.fromkeys(line.group for line in lines):
        ranked = _ranked([line for line in lines if line.group == group], rows)
        if len(ranked) < 2:
            continue
        first, second = ranked[:2]
        one, other = rows[first.cell.name], rows[second.cell.name]
        yield (
            f"{group}: **{first.label}** ({plus_minus(one['accuracy'])}) is first, above "
            f"{second.label} ({plus_minus(other['accuracy'])}) by {_told(one, other)}, {OF_WHAT}."
        )


def _differences(lines: Sequence[Line], rows: Mapping[str, Row]) -> Iterator[str]:
    """The gain of each ingredient, and of plain dace over each variant."""
    by_label = {line.label: rows.get(line.cell.name) for line in lines}
    named = {label for _, one, other in DIFFERENCES for label in (one, other)}
    variants = (
        (f"dace rather than {name}", "dace", name) for name in by_label if name not in named
    )
    for what, one, other in (*DIFFERENCES, *variants):
        with_it, without = by_label[one], by_label[other]
        if with_it is None or without is None:
            continue
        points = with_it["accuracy"][0] - without["accuracy"][0]
        told = _told(with_it, without)
        yield f"{what} ({one} against {other}): {points:+.1f} points, {told}."


def _codec_notes(lines: Sequence[Line], rows: Mapping[str, Row]) -> Iterator[str]:
    for line in lines:
        dense = next(each for each in lines if each.group == line.group)
        row, whole = rows.get(line.cell.name), rows.get(dense.cell.name)
        if line is dense or row is None or whole is None:
            continue
        smaller = whole["label_bytes"] / row["label_bytes"]
        points = row["accuracy"][0] - whole["accuracy"][0]
        told = f"{smaller:.1f} times smaller than dense; {points:+.1f} points, {_told(row, whole)}"
        yield f"{line.group}, {line.label}: {told}."


def _ranked(lines: Sequence[Line], rows: Mapping[str, Row]) -> list[Line]:
    """The finished lines, best first."""
    done = [line for line in lines if line.cell.name in rows]
    return sorted(done, key=lambda line: -rows[line.cell.name]["accuracy"][0])


def _ceiling(lines: Iterable[Line], rows: Mapping[str, Row]) -> Accuracy | None:
    """Ceiling of the same students on as many images; None if there is none."""

    def students(row: Row) -> tuple[Any, ...]:
        alike = ("student", "image_size", "classes", "samples", "epochs")
        return tuple(row.get(key) for key in alike)

    held = {students(rows[line.cell.name]) for line in lines if line.cell.name in rows}
    if len(held) != 1:
        return None
    ceilings = (row["ceiling"] for row in rows.values() if students(row) in held)
    return next((ceiling for ceiling in ceilings if ceiling), None)


def _told(one: Row, other: Row) -> str:
    value = gap(one["accuracy"], other["accuracy"])
    if value is None:
        return "an unknown number of standard deviations (nothing spreads)"
    clear_gap = CLEAR_GAPS.get(min(one["seeds"], other["seeds"]), CLEAR_GAP_OF_MORE)
    clear = "" if abs(value) >= clear_gap else " (not told apart)"
    return f"{value:.1f} standard deviations{clear}"


def _amount(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "not known"
    return f"{size_bytes / 1024:.1f} KiB" if size_bytes < 2**20 else f"{size_bytes / 2**20:.1f} MiB"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
