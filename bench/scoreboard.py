"""All methods under one recipe: accuracy, storage and time, plots, and who wins by how much.

    python bench/scoreboard.py --data shapes --recipe small --out board --dry-run
    python bench/scoreboard.py --data DIR --methods random rded upsample dace --ipc 1 10 \\
      --seeds 3 --recipe dace --out board -- --model sdxl-turbo

A board is a folder: cells/NAME are run folders of `train`, rows/NAME.json what a finished one told
(never run again), scoreboard.md, scoreboard.json and plots/*.png what they come to. Killed and
started again with the same options, it goes on in the cell where it was, from its last checkpoint.
A cell that fails is told, and the others go on. Words after `--` are options of `train`.

A row, plain JSON: cell and words (its name and its options of `train`); method, student,
image_size, seeds, samples (images of an epoch), epochs; accuracy [mean, std] in percent, of the
last epoch on the whole validation split; recognised, percent of the last epoch's stored labels
whose largest answer is the class that their view was made for, or null; seconds_per_epoch, the
median over epochs, rendering and all students together, or null; total_s, of all stages and
sessions; and of the summary ceiling, evals, bytes, label_bytes (of one label) and teacher.
"""

from __future__ import annotations

import ctypes
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from measure import environment, publish
from patchbloom.engine.backends import resolve_device
from patchbloom.engine.console import print_table
from patchbloom.engine.coreset import open_coreset
from patchbloom.engine.durable import replace_file
from patchbloom.train.summary import mean_and_std
from scoreboard_cells import Board, Cell, Options, Size
from scoreboard_page import duration, plus_minus, render, write_plots
from thousand_classes import write_thousand

Row = dict[str, Any]
CELLS, ROWS, PLOTS, MARKDOWN, JSON = "cells", "rows", "plots", "scoreboard.md", "scoreboard.json"
TEACHER = Path("teacher", "teacher.safetensors")
THOUSAND_SET = "thousand-classes"
OF_CORESET = ("evals", "bytes", "label_bytes", "recognised")
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


def command(cell: Cell, board: Board) -> list[str]:
    """Arguments of `train` that begin the cell, or go on with it."""
    out, words = board.options.out, list(cell.words)
    if cell.base is not None:
        words += ["--coreset", str(out / CELLS / cell.base.name / "coreset")]
    else:
        words += ["--resume"]
    if cell.generated:
        words += ["--data", str(out / THOUSAND_SET)]
    if not cell.kind:
        own = board.thousand_teacher if cell.generated else board.teacher
        made = str(out / CELLS / own.name / TEACHER)
        trained = cell.generated or board.options.trains_teacher
        words += ["--teacher", made if trained else board.options.teacher or ""]
    return [*words, "--out", str(out / CELLS / cell.name)]


def run(cell: Cell, board: Board) -> str | None:
    """Run `train` to its end; what it said last when it failed. It dies when this process does."""
    if cell.generated:
        write_thousand(board.options.out / THOUSAND_SET)
    line = [sys.executable, "-m", "patchbloom.train.cli", *command(cell, board)]
    said = ""
    with subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to us, and from us to it: once
        preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    ) as process:
        assert process.stderr is not None
        try:
            for told in process.stderr:
                print(f"  {told}", end="", file=sys.stderr, flush=True)
                said = told.strip() or said
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    return (said or f"exit code {process.returncode}") if process.returncode else None


def read_row(cell: Cell, size: Size, folder: Path, base: Row | None) -> Row:
    """What a finished cell tells."""
    row: Row = {"cell": cell.name, "words": list(cell.words), **asdict(size)}
    row |= {"classes": cell.classes, "ceiling": None}
    if cell.kind:
        stage = json.loads((folder / "stages" / f"{cell.kind}.json").read_bytes())
        result, row["total_s"] = stage["result"], round(stage["seconds"], 1)
        if cell.kind == "teacher":
            per_epoch = round(stage["seconds"] / size.epochs, 3)
            return row | {"accuracy": [result["accuracy"], None], "seconds_per_epoch": per_epoch}
        shared = {key: base.get(key) for key in OF_CORESET} if base else {}
        row |= {"accuracy": mean_and_std(result["accuracies"]), **shared}
    else:
        summary = json.loads((folder / "summary.json").read_bytes())
        method, settings = size.method, summary["settings"]
        labels = summary["bytes"][method]["labels"]
        row |= {
            "accuracy": summary["accuracy"][method],
            "ceiling": summary["ceiling"],
            "evals": summary["evals_per_image"][method],
            "bytes": summary["bytes"][method],
            "label_bytes": round(labels / (size.samples * size.epochs), 1),
            "recognised": _recognised(folder / "coreset"),
            "total_s": round(sum(summary["seconds"].values()), 1),
            "teacher": {k: summary["teacher"].get(k) for k in ("architecture", "accuracy")},
            "data": summary["data"],
            "recipe": settings["recipe"],
            "content_sha256": summary["content_sha256"][method],
        }
    return row | {"seconds_per_epoch": _seconds_per_epoch(folder, size.method)}


def _recognised(coreset: Path) -> float | None:
    """What the teacher recognises of the last epoch, in percent; None without stored labels."""
    labels = open_coreset(coreset, verify=False).soft_labels()
    return None if labels is None else round(labels.recognised(labels.epochs - 1), 1)


def _seconds_per_epoch(folder: Path, method: str) -> float | None:
    """The median that the log tells; None when the log was lost to a full disk."""
    log = folder / "log.jsonl"
    lines = (json.loads(line) for line in log.open()) if log.is_file() else iter(())
    seconds = [line["value"] for line in lines if line.get("tag") == f"{method}/seconds"]
    return round(statistics.median(seconds), 4) if seconds else None


def read_rows(board: Board, cells: Sequence[Cell]) -> dict[str, Row]:
    """Rows of the cells that are done; ValueError for one that was run with other options."""
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
    return rows


def measured_rows(places: Iterable[Path]) -> list[Row]:
    """Rows of other boards, or of files with a row per line; ValueError for anything else."""
    rows: list[Row] = []
    for place in places:
        found = sorted((place / ROWS).glob("*.json")) if place.is_dir() else [place]
        if not found or not all(path.is_file() for path in found):
            raise ValueError(f"--rates {place}: expected a board or a file of rows, found none")
        rows += [json.loads(line) for path in found for line in path.read_text().splitlines()]
    return rows


def estimate_s(cell: Cell, size: Size, rows: Iterable[Row]) -> float | None:
    """Seconds from the nearest cell that was measured; None when no such cell was.

    Nearest is the same cell, then one of the same method, student and image size, at best with as
    many students. Epochs grow with epochs and images, the rest of a cell is taken as it was.
    """

    def distance(row: Row) -> tuple[bool, bool, int]:
        return (
            row["cell"] != cell.name,
            row["seeds"] != size.seeds,
            abs(row["samples"] - size.samples),
        )

    like = ("method", "student", "image_size")
    near = [
        row
        for row in rows
        if all(row[key] == getattr(size, key) for key in like) and row["seconds_per_epoch"]
    ]
    if not near:
        return None
    row = min(near, key=distance)
    rest = max(0.0, row["total_s"] - row["epochs"] * row["seconds_per_epoch"])
    return rest + size.epochs * row["seconds_per_epoch"] * size.samples / row["samples"]


def list_cells(board: Board, cells: Sequence[Cell], rows: Mapping[str, Row]) -> None:
    """--dry-run: every cell, how much work it is, and the time that is left."""
    measured = [*rows.values(), *measured_rows(board.options.rates)]
    table = [["cell", "images per epoch", "epochs", "time", ""]]
    left, unknown = 0.0, 0
    for cell in cells:
        size, row = board.size(cell), rows.get(cell.name)
        seconds = row["total_s"] if row else estimate_s(cell, size, measured)
        begun = (board.options.out / CELLS / cell.name).is_dir()
        state = "done" if row else "begun" if begun else ""
        told = "not known" if seconds is None else duration(seconds)
        table.append([cell.name, str(size.samples), str(size.epochs), told, state])
        left += 0.0 if row else seconds or 0.0
        unknown += seconds is None
    print_table(table)
    print(f"{len(cells)} cells, {len(rows)} done, {duration(left)} left")
    if unknown:
        print(
            f"and {unknown} of unknown time: run them in another --out with a few --epochs, and "
            "give that board to --rates"
        )


def run_all(board: Board, cells: Sequence[Cell], rows: dict[str, Row]) -> dict[str, str]:
    """Run what is not done, filling `rows`; {cell: why it failed}."""
    out, failed = board.options.out, {}
    device = resolve_device(board.shared.device)
    for number, cell in enumerate(cells, 1):
        if cell.name in rows:
            continue
        size = board.size(cell)
        seconds = estimate_s(cell, size, rows.values())
        about = "" if seconds is None else f", about {duration(seconds)}"
        print(f"[{number}/{len(cells)}] {cell.name}{about}", file=sys.stderr, flush=True)
        base = None if cell.base is None else rows.get(cell.base.name)
        if cell.base is not None and base is None:
            failed[cell.name] = f"it needs {cell.base.name}, which failed"
        elif (error := run(cell, board)) is not None:
            failed[cell.name] = error
        if cell.name in failed:
            print(f"failed: {cell.name}: {failed[cell.name]}", file=sys.stderr, flush=True)
            if cell is board.teacher:
                raise ValueError(f"no cell can go on without its teacher: {failed[cell.name]}")
            continue
        row: Row = environment(device) | {"benchmark": "scoreboard"}
        row |= read_row(cell, size, out / CELLS / cell.name, base)
        replace_file(out / ROWS / f"{cell.name}.json", json.dumps(row).encode())
        rows[cell.name] = row
        publish(row, record=board.options.record, as_json=False)
        print(
            f"{cell.name}: {plus_minus(row['accuracy'])} %, {duration(row['total_s'])}", flush=True
        )
    return failed


def main(options: Options, common: Sequence[str]) -> int:
    """Run or list the cells, then write the page; 1 when a cell failed."""
    board = Board(options=options, common=tuple(common))
    cells = board.cells()
    for cell in cells:
        board.size(cell)
    rows = read_rows(board, cells)
    if "patches" in options.parts and (left_out := board.left_out()):
        print(f"left out of --factors: {', '.join(map(str, left_out))}", file=sys.stderr)
    if options.dry_run:
        list_cells(board, cells, rows)
        return 0
    for name in (CELLS, ROWS, PLOTS):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    try:
        failed = run_all(board, cells, rows)
    finally:
        page = render(board.lines(), rows, failed)
        replace_file(options.out / MARKDOWN, page.encode())
        result = {"rows": rows, "failed": failed}
        replace_file(options.out / JSON, (json.dumps(result, indent=1) + "\n").encode())
        write_plots(board.lines(), rows, options.out / PLOTS)
    print(page)
    if options.json:
        print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    ends = given.index("--") if "--" in given else len(given)
    try:
        sys.exit(main(tyro.cli(Options, args=given[:ends]), given[ends + 1 :]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
