"""All methods under one recipe: accuracy, storage and time, plots, and who wins by how much.

    python bench/scoreboard.py --data shapes --recipe small --out board --dry-run
    python bench/scoreboard.py --data DIR --methods random rded upsample dace --ipc 1 10 \\
      --seeds 3 --recipe dace --out board -- --model sdxl-turbo

A board is a folder: cells/NAME are run folders of `train`; rows/NAME.json are the results of
finished cells, which are never run again; scoreboard.md, scoreboard.json and plots/*.png summarize
them. Killed and restarted with the same options, the board resumes the interrupted cell from its
last checkpoint. A failed cell is reported, and the others still run. Words after `--` are options
of `train` (scoreboard_board.py says for which cells); scoreboard_rows.py describes a row.

Each finished cell appends a row to bench/results/DEVICE/scoreboard.jsonl. After --no-record,
`cat board/rows/*.json` gives the same lines to append.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

import tyro
from measure import environment, publish
from patchbloom.engine.console import print_table
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.export.durable import replace_file, replace_json
from patchbloom.train.report.page import plus_minus
from patchbloom.train.run.progress import duration
from scoreboard_board import Board
from scoreboard_cells import CELLS, Cell, Size
from scoreboard_options import Options
from scoreboard_page import render, write_plots
from scoreboard_rows import ROWS, Row, check_alike, read_row, read_rows
from thousand_classes import write_thousand

PLOTS, MARKDOWN, JSON = "plots", "scoreboard.md", "scoreboard.json"
THOUSAND_SET = "thousand-classes"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


def command(cell: Cell, board: Board) -> list[str]:
    """Arguments of `train` that start or resume the cell."""
    out, words = board.options.out, list(cell.words)
    if cell.base is not None:
        words += board.learn_as(cell.base)
    else:
        words += ["--resume"]
    if cell.generated:
        words += ["--data", str(out / THOUSAND_SET)]
    if not cell.kind:
        words += ["--teacher", board.teacher_spec(generated=cell.generated)]
    return [*words, "--out", str(out / CELLS / cell.name)]


def run(cell: Cell, board: Board) -> str | None:
    """Run `train`, which dies with this process; its last message if it failed, else None."""
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
        start_new_session=True,  # we forward Ctrl-C, so that it arrives once
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


def estimate_s(cell: Cell, size: Size, rows: Iterable[Row]) -> float | None:
    """Estimated seconds, from the nearest measured cell; None when there is no similar one.

    The nearest is the same cell, then one of the same method, student and image size, preferably
    with as many students. Training time scales with epochs and images; the rest is constant.
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
    """--dry-run: print every cell, its amount of work, and the time left."""
    table = [["cell", "images per epoch", "epochs", "time", ""]]
    left, unknown = 0.0, 0
    for cell in cells:
        size, row = board.size(cell), rows.get(cell.name)
        seconds = row["total_s"] if row else estimate_s(cell, size, rows.values())
        begun = (board.options.out / CELLS / cell.name).is_dir()
        state = "done" if row else "begun" if begun else ""
        told = "not known" if seconds is None else duration(seconds)
        table.append([cell.name, str(size.samples), str(size.epochs), told, state])
        left += 0.0 if row else seconds or 0.0
        unknown += seconds is None
    print_table(table)
    print(f"{len(cells)} cells, {len(rows)} done, {duration(left)} left")
    if unknown:
        print(f"and {unknown} of unknown time, because no similar cell is done")


def run_all(board: Board, cells: Sequence[Cell], rows: dict[str, Row]) -> dict[str, str]:
    """Run the unfinished cells, filling `rows`; {cell: why it failed}."""
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
                raise ValueError(f"no cell can run without its teacher: {failed[cell.name]}")
            continue
        row: Row = environment(device) | {"benchmark": "scoreboard"}
        row |= read_row(cell, board, base)
        check_alike(board, cells, {**rows, cell.name: row})
        replace_file(out / ROWS / f"{cell.name}.json", f"{json.dumps(row)}\n".encode())
        rows[cell.name] = row
        publish(row, record=board.options.record, as_json=False)
        print(
            f"{cell.name}: {plus_minus(row['accuracy'])} %, {duration(row['total_s'])}", flush=True
        )
    return failed


def main(options: Options, common: Sequence[str]) -> int:
    """Run or list the cells, then write the page; 1 when a cell failed, else 0."""
    board = Board(options=options, common=tuple(common))
    cells = board.cells()
    for cell in cells:
        board.size(cell)
    rows = read_rows(board, cells)
    if "patches" in options.parts and (left_out := board.left_out()):
        print(f"skipped --factors: {', '.join(map(str, left_out))}", file=sys.stderr)
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
        replace_json(options.out / JSON, result)
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
