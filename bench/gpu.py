"""`make gpu`: run every stage of gpu_stages.py in turn, and print a table of the results.

    python bench/gpu.py                     on a machine with a CUDA device, under 8 minutes
    python bench/gpu.py --full --stages expand-512
    python bench/gpu.py --dry               the rehearsal, on the CPU

A stage is its own process group. At its limit Python writes into the log where it hung, the whole
group is killed, and the next stage starts. A stage that hangs in the driver, where no signal
arrives, is abandoned after DEATH_S, and the table says so. A stage, its kill included, gets at most
what is left of the form's total after reserving the least times of the later stages; when nothing
is left, it is not run. A stage that lacks libraries is skipped, and the table names them. `--out`
gets a log per stage, summary.txt, and rows as in bench/results/, <device>/<benchmark>.jsonl, each
with its stage and command; a benchmark that did not end leaves the row so far.

Nothing is installed or downloaded: stages find the package through links to this checkout. Options
are parsed by argparse, because tyro may be missing.

Exit status: 0 when no stage failed; 1 when one failed, timed out or was not run; 2 when the options
are invalid or there is no device; 3 when every requested benchmark was skipped; 130 when stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, Literal

from gpu_needs import find_lacking
from gpu_stages import TOTAL_S, Form, Stage, make_stages

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "export", "engine", "train")
TRACEBACK_S, DEATH_S = 5.0, 10.0
"""Time for a hung stage to write its traceback, and for its processes to die."""
ANSWER_S = 60.0
"""Time for torch to report whether there is a device."""
REPORT_S = 5.0
"""Part of a form's total that is reserved for the table."""
TOLD_LINES, TOLD_WIDTH = 15, 300
"""Printed lines of a failed stage's log (without rows), and characters per line."""
COST_WIDTH = 40
"""Printed characters of a kernel's name."""
NOTHING_MEASURED = 3
"""Exit status."""

Status = Literal["ok", "skipped", "failed", "timed out", "stopped", "not run"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a stage."""

    name: str
    status: Status
    seconds: float = 0.0
    said: str = ""
    """Its result or its error, in one line."""
    is_benchmark: bool = False


def allowed_s(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Seconds of `left_s` for a stage: at most its limit, after reserving the least times of later
    stages, but not below its own least; time to kill it is always reserved."""
    left_s -= TRACEBACK_S + DEATH_S
    spare_s = left_s - sum(each.least_s for each in later)
    return min(stage.limit_s, max(spare_s, min(stage.least_s, left_s)))


def run_stage(stage: Stage, out: Path, environment: Mapping[str, str], limit_s: float) -> Outcome:
    """Run one stage for at most `limit_s`; write its output to out/<name>.log and its row to out.

    Ctrl-C or SIGTERM ends it as "stopped", after its processes are dead and its row so far is kept.
    """
    if limit_s <= 0:
        return Outcome(stage.name, "not run", said="no time left")
    log, began = out / f"{stage.name}.log", time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end, died = wait(process, limit_s)
    seconds, text = time.monotonic() - began, log.read_text("utf-8", "replace")
    row = last_row(text) if stage.prints_row else None
    told = ""
    if row is not None:
        record(row | {"stage": stage.name, "command": ["python", *stage.words]}, out)
        told = headline(row)
    so_far = f"; until then {told}" if told else ""
    if end == "stopped":
        return Outcome(stage.name, end, seconds, so_far.removeprefix("; "))
    if end == "timed out":
        said = "" if limit_s == stage.limit_s else f", what was left, of {stage.limit_s:.0f} s"
        if not died:
            said += f"; process {process.pid} does not die, it hangs in the driver"
        return Outcome(stage.name, end, seconds, f"limit {limit_s:.0f} s{said}{so_far}")
    if process.returncode:
        said = f"exit status {process.returncode}: {last_line(text)}{so_far}"
        return Outcome(stage.name, "failed", seconds, said)
    if not stage.prints_row:
        return Outcome(stage.name, "ok", seconds, last_line(text).strip("= "))
    if row is None:
        return Outcome(stage.name, "failed", seconds, "exit status 0, but no row")
    return Outcome(stage.name, "ok", seconds, told)


def wait(process: subprocess.Popen[bytes], limit_s: float) -> tuple[Status, bool]:
    """How a stage ended, "ok" whatever its exit status; whether its processes are dead."""
    end: Status = "ok"
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end = "timed out"
    except KeyboardInterrupt:
        end = "stopped"
    finally:
        died = kill(process)
    return end, died


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill a stage's process group; whether the stage died."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler then writes every thread's traceback
            with suppress(subprocess.TimeoutExpired):
                process.wait(TRACEBACK_S)
    finally:  # also after a second Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(DEATH_S)
    return process.poll() is not None


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def last_row(text: str) -> dict[str, Any] | None:
    """The last line that is a row; libraries may print warnings after it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                if "benchmark" in row:
                    return row
    return None


def record(row: Mapping[str, Any], out: Path) -> None:
    """Append the row to out/<device>/<benchmark>.jsonl."""
    from measure import append_row  # which imports torch

    append_row(str(row["benchmark"]), row, out)


def headline(row: Mapping[str, Any]) -> str:
    """The main figures of a row, in one line."""
    if "images_per_s" in row:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in row["images_per_s"].items())
        bound = f", the {row['bottleneck']} bounds" if "bottleneck" in row else ""
        return f"{rates} images/s{bound}"
    if "factors" in row:
        seconds = (
            f"{factor['patches']} images {factor['seconds']['overlapped']['p50']:g}"
            for factor in row["factors"].values()
        )
        return f"{', '.join(seconds)} s per epoch"
    if "costs" in row:
        costs = (f"{each['share']:.0%} {each['name'][:COST_WIDTH]}" for each in row["costs"][:3])
        return f"busy {row['busy']:.0%}: {', '.join(costs)}"
    cases = row["cases"].values()
    behind = sum(bool(case.get("missed")) for case in cases)
    return f"{len(cases)} cases, targets missed by {behind}, copy {row['copy_gb_per_s']:g} GB/s"


def summary(form: Form, outcomes: Sequence[Outcome]) -> str:
    """The table."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'stage':{width}}  {'':9}  {'s':>5}  result"]
    for each in outcomes:
        seconds = f"{each.seconds:5.0f}" if each.seconds else f"{'-':>5}"
        lines.append(f"{each.name:{width}}  {each.status:9}  {seconds}  {each.said}".rstrip())
    total = sum(outcome.seconds for outcome in outcomes)
    good = sum(outcome.status == "ok" for outcome in outcomes)
    return "\n".join([*lines, f"{form}: {good} of {len(outcomes)} stages ok, {total:.0f} s", ""])


def link_package(folder: Path) -> None:
    """Link this checkout's package into `folder`, for PYTHONPATH."""
    (folder / "patchbloom").mkdir()
    for name in FOLDERS:
        (folder / "patchbloom" / name).symlink_to(ROOT / name, target_is_directory=True)


def run_stages(stages: Sequence[Stage], out: Path, deadline: float = inf) -> list[Outcome]:
    """Run every stage in turn, all before `deadline` (in time.monotonic()).

    Ctrl-C or SIGTERM stops the running stage; later stages are not run.
    """
    outcomes: list[Outcome] = []
    lacking = find_lacking(name for stage in stages for name in stage.needs)
    with tempfile.TemporaryDirectory() as package:
        link_package(Path(package))
        paths = (package, os.environ.get("PYTHONPATH"))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        for number, stage in enumerate(stages):
            print(f"[{number + 1}/{len(stages)}] {stage.name}: ", end="", flush=True)
            later = [each for each in stages[number + 1 :] if not lacking & set(each.needs)]
            limit_s = allowed_s(stage, later, deadline - time.monotonic())
            try:
                if lacks := [name for name in stage.needs if name in lacking]:
                    outcome = Outcome(stage.name, "skipped", said=f"needs {', '.join(lacks)}")
                else:
                    outcome = run_stage(stage, out, environment, limit_s)
            except KeyboardInterrupt:
                outcome = Outcome(stage.name, "stopped")
            outcome = replace(outcome, is_benchmark=stage.prints_row)
            print(f"{outcome.status}, {outcome.seconds:.0f} s: {outcome.said}", flush=True)
            outcomes.append(outcome)
            if outcome.status == "stopped":
                return outcomes + [Outcome(each.name, "not run") for each in stages[number + 1 :]]
    return outcomes


def report(form: Form, outcomes: Sequence[Outcome], out: Path) -> int:
    """Print the ends of failed stages' logs and the table; the exit status."""
    for each in outcomes:
        if each.status in ("failed", "timed out"):
            tail = (out / f"{each.name}.log").read_text("utf-8", "replace").splitlines()
            print(f"\n--- {each.name}, {each.status}; the end of its log:")
            tail = [line[:TOLD_WIDTH] for line in tail if not line.startswith('{"')]
            print("\n".join(tail[-TOLD_LINES:]))
    table = summary(form, outcomes)
    (out / "summary.txt").write_text(table, "utf-8")
    print(f"\n{table}rows and logs: {out}")
    statuses = {outcome.status for outcome in outcomes}
    if "stopped" in statuses:
        return 130
    benchmarks = {outcome.status for outcome in outcomes if outcome.is_benchmark}
    if benchmarks == {"skipped"} and statuses <= {"ok", "skipped"}:
        print("nothing was measured: what every benchmark needs is above")
        return NOTHING_MEASURED
    return 0 if "ok" in statuses <= {"ok", "skipped"} else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested stages; the exit status. Raises ValueError when they cannot be run."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks, stage by stage.")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--dry", action="store_true", help="rehearse on the CPU, with sdxl-tiny")
    forms.add_argument("--full", action="store_true", help="more rounds, and backends that compile")
    parser.add_argument("--stages", nargs="*", default=[], help="prefixes of stage names")
    parser.add_argument("--data", type=Path, help="an ImageFolder to score. Default: generated")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="rows and logs")
    options = parser.parse_args(arguments)
    form: Form = "rehearsal" if options.dry else "full" if options.full else "quick"
    out = options.out.resolve()
    data = options.data and options.data.resolve()
    stages = make_stages(form, data, out / f"images-{form}")
    for wanted in options.stages:
        if not any(stage.name.startswith(wanted) for stage in stages):
            names = ", ".join(stage.name for stage in stages)
            raise ValueError(f"--stages {wanted}: expected the beginning of one of {names}")
    if options.stages:
        stages = [each for each in stages if each.name.startswith(tuple(options.stages))]
    if data and not data.is_dir():
        raise ValueError(f"--data {options.data}: expected an image folder, found none")
    require_device(form)
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # an aborted stage leaves no core file
    outcomes = run_stages(stages, out, began + TOTAL_S[form] - REPORT_S)
    return report(form, outcomes, out)


def require_device(form: Form) -> None:
    """Raises ValueError without torch or, outside a rehearsal, without a responding CUDA device."""
    if find_spec("torch") is None:
        raise ValueError(
            f"expected torch, {sys.executable} has none: run an interpreter that does, with "
            "make gpu VENV= PYTHON=..., or make setup where there is a network"
        )
    if form == "rehearsal":
        return
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    # In a child process: a hung driver would block this one.
    process = subprocess.Popen([sys.executable, "-c", question], start_new_session=True)
    try:
        code = process.wait(ANSWER_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"expected a CUDA device, none answered in {ANSWER_S:.0f} s") from None
    finally:
        kill(process)
    if code:
        raise ValueError("expected a CUDA device, found none: rehearse on the CPU with --dry")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first stage
        sys.exit(130)
