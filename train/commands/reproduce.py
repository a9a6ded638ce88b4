"""`train reproduce PLAN`: every cell of a paper's table as a run of `train`, in this process.

    OUT/teacher-NETWORK/    `train teacher`: the teacher that cells share
    OUT/CELL/               a run folder, which resumes; a finished one is not opened again
    OUT/table.md, OUT/results.json    rewritten after each cell

A cell is finished when its summary names the command that would run it now. With other options it
runs again, and its stages refuse options that they were not begun with.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ...engine.console import print_table
from ...export.documents import read_json
from ...export.durable import replace_file, replace_json
from ...export.terminal import say
from ..config import is_ready_teacher
from ..options import Train, TrainReproduce, TrainTeacher
from ..papers import PLANS, Cell, PaperPlan
from ..report.page import SUMMARY, ReportError, Summary
from ..report.published import ABOUT, compare, markdown, table
from ..run.progress import Report, duration

if TYPE_CHECKING:
    from ..plan import Plan

TEACHER = Path("teacher", "teacher.safetensors")
TABLE, RESULTS = "table.md", "results.json"
ANY_METHOD = ("--method", "random", "--seed", "0")  # a teacher does not depend on the method


def reproduce(options: TrainReproduce) -> dict[str, Any]:
    """List the plan; or tell the time that it takes, ask, and run the cells.

    Returns the table, plain JSON. Raises ValueError for options that do not fit the data, without a
    yes, and at the end when a cell failed.
    """
    plan = PLANS[options.plan]
    job = _Reproduction(options, options.out or Path(), _chosen(options))
    if options.list:
        print(f"{plan.source}.\n--data: {plan.data}.")
        print_table(
            [("cell", "options of train"), *((c.name, " ".join(c.words)) for c in job.cells)]
        )
        return {"plan": options.plan, "cells": [cell.name for cell in job.cells]}
    waiting = [cell for cell in job.cells if job.result(cell) is None]
    if waiting:
        job.estimate()
        _ask(options)
    failed = job.run(waiting)
    rows = job.write(failed)
    print_table(table(plan, rows))
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(job.cells)} cells failed; {name}: {reason}")
    return {"plan": options.plan, "out": str(job.out), "rows": rows}


def _chosen(options: TrainReproduce) -> list[Cell]:
    cells = PLANS[options.plan].cells(options.coresets)
    named = {
        only: [c for c in cells if f"{c.name}-".startswith(f"{only}-")] for only in options.only
    }
    for only, found in named.items():
        if not found:
            raise ValueError(f"--only {only}: no cell of {options.plan} (see --list)")
    return [cell for cell in cells if not named or any(cell in found for found in named.values())]


def _ask(options: TrainReproduce) -> None:
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("expected a yes, and there is no terminal to ask: give --yes to start")
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not started")


@dataclass(frozen=True)
class _Reproduction:
    """The chosen cells of a plan in one folder."""

    options: TrainReproduce
    out: Path
    cells: Sequence[Cell]

    def _words(self, cell: Cell, folder: str) -> list[str]:
        """The teacher is yet to be trained, unless the options after `--` bring one along."""
        paths = ("--data", str(self.options.data), "--out", str(self.out / folder))
        return [*paths, *cell.words, *self.options.words]

    def _given(self, cell: Cell) -> Train:
        return tyro.cli(Train, args=self._words(cell, cell.name))

    def _teacher(self, cell: Cell) -> Path | None:
        """The run folder of its teacher; None for one that the options bring along."""
        if is_ready_teacher(self._given(cell).teacher or ""):
            return None
        return self.out / f"teacher-{cell.teacher}"

    def _command(self, cell: Cell) -> list[str]:
        """Arguments of `train` that run or resume the cell."""
        teacher = self._teacher(cell)
        brings = () if teacher is None else ("--teacher", str(teacher / TEACHER))
        return [*self._words(cell, cell.name), *brings, "--resume"]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The summary of a finished cell; None for one that is to run."""
        path = self.out / cell.name / SUMMARY
        if not path.is_file():
            return None
        summary = read_json(path, ReportError, "remove the folder of this cell", Summary)
        return summary if summary["provenance"]["command"] == _line(self._command(cell)) else None

    def estimate(self) -> None:
        """Print every cell with the time that it takes here, and the time left.

        Computed from measured rates, and corrected by how long finished cells took. Raises
        ValueError when a cell cannot run on this data.
        """
        from .estimates import run_seconds, teacher_seconds  # torch

        say("measuring how fast this machine trains, answers and renders")
        cells = {cell.row: cell for cell in self.cells}  # coresets of a row take as long
        plans = {row: self._plan(cell) for row, cell in cells.items()}
        computed = {row: run_seconds(plan) for row, plan in plans.items()}
        took = {c: sum(r["seconds"].values()) for c in self.cells if (r := self.result(c))}
        over = sum(took.values()) / sum(computed[cell.row] for cell in took) if took else 1.0
        left = {c.name: over * computed[c.row] for c in self.cells if c not in took}
        rows = [("cell", "images per epoch", "epochs", "time")]
        for cell in self.cells:
            plan, teacher = plans[cell.row], self._teacher(cell)
            work = (str(plan.samples), str(plan.student.epochs))
            told = f"{duration(took[cell])}, done" if cell in took else _about(left[cell.name])
            rows.append((cell.name, *work, told))
            if teacher and teacher.name not in left and not (teacher / TEACHER).is_file():
                left[teacher.name] = teacher_seconds(plan)
                shown = (str(len(plan.train)), str(plan.teacher.epochs))
                rows.insert(1, (teacher.name, *shown, _about(left[teacher.name])))
        print_table(rows)
        print(f"{len(self.cells)} cells, {_about(sum(left.values()))} left", flush=True)

    def _plan(self, cell: Cell) -> Plan:
        from ...engine.builds.cards import card_here
        from ...engine.expand.backends import resolve_device
        from .planning import make_plan

        given = self._given(cell)
        cards = [card_here()] if resolve_device(given.device) == "cuda" else []
        with redirect_stderr(io.StringIO()):  # the cell says it when it runs
            return make_plan(given, Report(), cards)

    def run(self, waiting: Sequence[Cell]) -> dict[str, str]:
        """Run the cells, each after its teacher, and write the table; {cell: why it failed}."""
        from .train import run_stages  # torch

        failed: dict[str, str] = {}
        ready: set[Path] = set()
        for number, cell in enumerate(waiting, 1):
            say(f"[{number}/{len(waiting)}] {cell.name}")
            try:
                teacher = self._teacher(cell)
                if teacher is not None and teacher not in ready:
                    words = [*self._words(cell, teacher.name), *ANY_METHOD]
                    run_stages(tyro.cli(TrainTeacher, args=words), _line(["teacher", *words]))
                    ready.add(teacher)
                words = self._command(cell)
                run_stages(tyro.cli(Train, args=words), _line(words))
            except (ValueError, OSError) as error:
                failed[cell.name] = str(error)
                say(f"failed: {cell.name}: {error}")
            self.write(failed)
        return failed

    def write(self, failed: Mapping[str, str]) -> list[dict[str, Any]]:
        """Write table.md and results.json from all finished cells of the plan; returns the rows."""
        plan = PLANS[self.options.plan]
        ours: dict[str, list[list[float | None]]] = {}
        cells: dict[str, Any] = {}
        for cell in plan.cells(self._coresets(plan)):
            summary = self.result(cell)
            if summary is None:
                continue
            (accuracy,), (content,) = (summary[k].values() for k in ("accuracy", "content_sha256"))
            ours.setdefault(cell.row, []).append(accuracy)
            ours[f"teacher-{cell.teacher}"] = [[summary["teacher"]["accuracy"], None]]
            cells[cell.name] = {"accuracy": accuracy, "students": summary["settings"]["seeds"]}
            cells[cell.name] |= {"content_sha256": content, "seconds": summary["seconds"]}
        rows = compare(plan, ours)
        page = f"# {self.options.plan}\n\n{plan.source}.\n\n{ABOUT}\n\n"
        self.out.mkdir(parents=True, exist_ok=True)
        replace_file(self.out / TABLE, f"{page}{markdown(table(plan, rows))}".encode())
        told = {"plan": self.options.plan, "source": plan.source, "data": self.options.data}
        told |= {"options": self.options.words, "rows": rows, "cells": cells}
        replace_json(self.out / RESULTS, {**told, "failed": dict(failed)})
        return rows

    def _coresets(self, plan: PaperPlan) -> int:
        """Coresets per row of the table: as many as asked for, and those finished before."""
        count = self.options.coresets
        rows = [cell.row for cell in plan.cells()]
        while any((self.out / f"{row}-seed{count}" / SUMMARY).is_file() for row in rows):
            count += 1
        return count


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}"


def _line(words: Sequence[str]) -> str:
    return shlex.join(["train", *words])
