"""Rows of a scoreboard: results of finished cells, and the check that rows of a board match.

A row is OUT/rows/NAME.json, a line of JSON. It has the environment of measure.py, and:

    cell, words             the cell's name, and its options of `train`
    method, student, image_size, seeds, samples, epochs     samples: images per epoch
    classes, accuracy       [mean, std] in percent, of the last epoch on the whole validation split
    ceiling, evals, bytes   from the summary; label_bytes: bytes per label
    recognised              percent of the last epoch's stored labels whose largest value is the
                            class that their view was made for, or null
    seconds_per_epoch       the median over epochs, rendering and all students together, or null
    total_s                 seconds of all stages and sessions
    recipe, data, teacher   from the summary; teacher.source: --teacher, a file by its sha256
    model                   the model that made its images: name, sha256 of its weights, and given,
                            which is --model; null without a model
    content_sha256          content hash of the coreset that the students learned from

Students of one board share one data set and one teacher (those of the generated set have their
own), and a --model always has the same weights. Keys that older rows lack are not compared.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from patchbloom.engine.coreset.coreset import Coreset, open_coreset
from patchbloom.export.models import find_model, weights_sha256
from patchbloom.train.config import is_ready_teacher
from patchbloom.train.report.summary import mean_and_std
from patchbloom.train.teacher.given import teacher_id
from scoreboard_board import Board
from scoreboard_cells import CELLS, Cell, Size

Row = dict[str, Any]
Identity = tuple[object, ...]
ROWS = "rows"
OF_CORESET = ("evals", "bytes", "label_bytes", "recognised")
OF_TEACHER = ("architecture", "accuracy", "sha256")
ALIKE = {
    ("data", "sha256"): "images",
    ("data", "validation_sha256"): "validation images",
    ("teacher", "source"): "teacher",
    ("teacher", "sha256"): "teacher's weights",
}
"""Values that all rows of a board share, by their place in a row."""


def read_row(cell: Cell, board: Board, base: Row | None) -> Row:
    """The row of a finished cell; `base` is the row of the cell whose coreset it learned from."""
    size, folder = board.size(cell), board.options.out / CELLS / cell.name
    row: Row = {"cell": cell.name, "words": list(cell.words), **asdict(size)}
    row |= {"classes": cell.classes, "ceiling": None}
    if cell.kind == "teacher":
        return row | _of_teacher(_stage(folder, "teacher"), size)
    if cell.kind == "student":
        row |= _of_students(_stage(folder, "student"), base or {})
    else:
        row |= _of_run(folder, size, open_coreset(board.coreset(cell), verify=False))
        if row["model"] is not None:
            row["model"]["given"] = board.model_spec(cell)
    return row | {"seconds_per_epoch": _seconds_per_epoch(folder, size.method)}


def _of_teacher(stage: dict[str, Any], size: Size) -> Row:
    return {
        "accuracy": [stage["result"]["accuracy"], None],
        "seconds_per_epoch": round(stage["seconds"] / size.epochs, 3),
        "total_s": round(stage["seconds"], 1),
        "teacher": {key: stage["result"][key] for key in OF_TEACHER},
        "data": {"sha256": stage["config"]["--data"]},
    }


def _of_students(stage: dict[str, Any], base: Row) -> Row:
    config = stage["config"]
    return {
        "accuracy": mean_and_std(stage["result"]["accuracies"]),
        **{key: base.get(key) for key in OF_CORESET},
        "total_s": round(stage["seconds"], 1),
        "data": {"validation_sha256": config["validation images"]},
        "content_sha256": config["--coreset"],
    }


def _of_run(folder: Path, size: Size, coreset: Coreset) -> Row:
    summary, method = json.loads((folder / "summary.json").read_bytes()), size.method
    labels = summary["bytes"][method]["labels"]
    teacher = {key: summary["teacher"].get(key) for key in OF_TEACHER}
    return {
        "accuracy": summary["accuracy"][method],
        "ceiling": summary["ceiling"],
        "evals": summary["evals_per_image"][method],
        "bytes": summary["bytes"][method],
        "label_bytes": round(labels / (size.samples * size.epochs), 1),
        "recognised": _recognised(coreset),
        "total_s": round(sum(summary["seconds"].values()), 1),
        "teacher": teacher | {"source": _stage(folder, "teacher")["config"]["--teacher"]},
        "data": summary["data"],
        "model": _model(coreset),
        "recipe": summary["settings"]["recipe"],
        "content_sha256": summary["content_sha256"][method],
    }


def _stage(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "stages" / f"{name}.json").read_bytes())


def _model(coreset: Coreset) -> Row | None:
    """The model that expands its patches, or made its stored images."""
    named = coreset.manifest["model"] or coreset.settings.get("generator")
    return named and {"name": named["name"], "sha256": named["weights_sha256"]}


def _recognised(coreset: Coreset) -> float | None:
    """Percent of the last epoch that the teacher recognises; None without stored labels."""
    labels = coreset.soft_labels()
    return None if labels is None else round(labels.recognised(labels.epochs - 1), 1)


def _seconds_per_epoch(folder: Path, method: str) -> float | None:
    """The median from the log; None when the log was lost to a full disk."""
    log = folder / "log.jsonl"
    lines = (json.loads(line) for line in log.open()) if log.is_file() else iter(())
    seconds = [line["value"] for line in lines if line.get("tag") == f"{method}/seconds"]
    return round(statistics.median(seconds), 4) if seconds else None


def read_rows(board: Board, cells: Sequence[Cell]) -> dict[str, Row]:
    """Rows of the finished cells.

    Raises ValueError for a row that was run with other options, or from check_alike.
    """
    rows = {}
    for cell in cells:
        path = board.options.out / ROWS / f"{cell.name}.json"
        if not path.is_file():
            continue
        row = rows[cell.name] = json.loads(path.read_bytes())
        if row["words"] != list(cell.words):
            raise ValueError(
                f"cell {cell.name} of {board.options.out} was run with {' '.join(row['words'])}, "
                f"now asked for {' '.join(cell.words)}: give the same options, or another --out"
            )
    check_alike(board, cells, rows)
    return rows


def check_alike(board: Board, cells: Sequence[Cell], rows: Mapping[str, Row]) -> None:
    """Raises ValueError when a row's images, teacher, model or base coreset differ from the current
    ones or from another row's."""
    now = chain(_given_now(board), _models_now(rows.values()))
    known = {key: (value, "what is given now") for key, value in now}
    for cell in (cell for cell in cells if cell.name in rows):
        for key, what, found in _identities(cell, rows[cell.name]):
            expected, whose = known.setdefault(key, (found, f"cell {cell.name}"))
            if found != expected:
                raise ValueError(
                    f"cell {cell.name} of {board.options.out}: expected the {what} of {whose} "
                    f"({expected}), found {found}: give what the board was run with, or another "
                    "--out"
                )


def _identities(cell: Cell, row: Row) -> Iterator[tuple[Identity, str, str]]:
    """Values that a row may share with others: key, name in messages, and value."""
    for (part, name), what in ALIKE.items():
        value = (row.get(part) or {}).get(name)
        if value is not None:
            yield (cell.generated, part, name), what, value
    if row.get("model") is not None:
        yield ("model", row["model"]["given"]), "weights of --model", row["model"]["sha256"]
    if row.get("content_sha256") is not None:
        yield ("coreset", (cell.base or cell).name), "coreset", row["content_sha256"]


def _given_now(board: Board) -> Iterator[tuple[Identity, str]]:
    """Hashes of the current data set and of the existing teachers."""
    if not board.shared.skip_corrupt:  # otherwise rows cover only the readable images
        yield (False, "data", "sha256"), board.data_sha256
    yield (False, "data", "validation_sha256"), board.validation_sha256
    for generated in (False, True):
        spec = board.teacher_spec(generated=generated)
        if is_ready_teacher(spec):
            yield (generated, "teacher", "source"), teacher_id(spec)


def _models_now(rows: Iterable[Row]) -> Iterator[tuple[Identity, str]]:
    """Hashes of the folders given as --model; other models cannot change."""
    for given in {row["model"]["given"] for row in rows if row.get("model") is not None}:
        if given is not None and Path(given).expanduser().is_dir():
            yield ("model", given), weights_sha256(find_model(given))
