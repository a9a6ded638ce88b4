"""`train`: images → teacher → coreset → labels → students → report.

In a pipe the last line of stdout is one JSON object. Under torchrun all processes run the same
command, and rank 0 prints. Importing this module imports neither torch nor TensorRT: each command
imports what it needs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from ..engine.console import print_fields, run_command
from ..engine.coreset.hub import fetched
from ..engine.coreset.manifest import require_manifest
from ..engine.data.names import require_text_file
from ..export.terminal import say
from .config import naming_option, require_network, teacher_file
from .coreset_options import LabelsElsewhere, StudentElsewhere, TrainCheck, TrainVerify
from .options import (
    STAGES,
    Command,
    RunOptions,
    Train,
    TrainCompare,
    TrainDecoder,
    TrainPrior,
    TrainPublish,
    TrainReport,
    TrainReproduce,
)
from .papers import PLANS
from .run.launch import Launch, read_launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 unusable input, 130 interrupted, 143
    terminated)."""
    # OpenMP reads it when it is loaded. With other work on the same cores, a training step of two
    # threads takes 1300 ms when waiting threads spin, and 160 ms when they sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        launch = read_launch()
    except ValueError:
        launch = Launch()  # `_execute` tells it, in any process
    with launch.one_voice():
        return run_command(
            "train",
            STAGES,
            given,
            _parse,
            lambda command: _execute_and_show(command, given),
            say if launch.size == 1 else _tell_once,
        )


def _tell_once(line: str) -> None:
    from .run.world import tell_once

    tell_once(line)


def _parse(given: Sequence[str]) -> Command:
    words = [word for word in given if word != "--json"]
    kind = STAGES.get(words[0]) if words else None
    if any(word.split("=")[0] == "--coreset" for word in words):
        kind = {"student": StudentElsewhere, "labels": LabelsElsewhere}.get(words[0], kind)
    if kind is TrainReproduce:
        return _parse_reproduce(words[1:])
    if kind is None:
        return tyro.cli(Train, prog="train", args=words)
    json = ["--json"] if kind is TrainCompare and "--json" in given else []
    return tyro.cli(kind, prog=f"train {words[0]}", args=[*words[1:], *json])


def _parse_reproduce(given: list[str]) -> TrainReproduce:
    """Options of the command, and after `--` those of every cell, which are tried on each."""
    ends = given.index("--") if "--" in given else len(given)
    asked = tyro.cli(TrainReproduce, prog="train reproduce", args=given[:ends])
    words = tuple(given[ends + 1 :])
    for cell in PLANS[asked.plan].cells() if words else ():
        tyro.cli(Train, prog="train", args=["--data", ".", "--out", ".", *cell.words, *words])
    return replace(asked, words=words)


def _check_named(command: Command) -> None:
    """Check that named files and networks exist, before importing torch takes seconds.

    Later checks raise the same errors, by the same functions.
    """
    named = vars(command)
    for data in (named.get("data"), getattr(named.get("where"), "val_data", None)):
        if data is not None:
            from .data.forms import check_data  # numpy

            check_data(data)
    if named.get("class_names") is not None:
        require_text_file("--class-names", named["class_names"])
    if named.get("prompts") is not None:
        require_text_file("--prompts", named["prompts"].expanduser())
    if named.get("coreset") is not None:
        require_manifest(named["coreset"].expanduser())
    teacher, student = named.get("teacher"), named.get("student")
    if teacher is not None and isinstance(command, TrainPrior | TrainVerify | LabelsElsewhere):
        teacher_file(teacher)
    elif teacher is not None and not Path(teacher).expanduser().is_file():
        with naming_option("--teacher", teacher):
            require_network(teacher)
    if student is not None:
        with naming_option("--student", student):
            require_network(student)


def _execute_and_show(command: Command, given: list[str]) -> dict[str, Any]:
    """The result, which is printed for people where stdout is a terminal and has no table yet."""
    result = _execute(command, given)
    has_table = isinstance(command, Train | TrainVerify | TrainReproduce | TrainCompare)
    if sys.stdout.isatty() and (not has_table or "engines" in result):  # of --build-only
        print_fields(result)
    return result


def _execute(command: Command, given: list[str]) -> dict[str, Any]:
    line = shlex.join(["train", *given])
    launch = read_launch()
    if isinstance(command, StudentElsewhere | TrainVerify):
        command = replace(command, coreset=fetched(command.coreset))
    elif isinstance(command, TrainCheck):
        command = replace(command, folder=fetched(command.folder, whole=True))
    _check_named(command)
    if not isinstance(command, RunOptions):
        elsewhere = isinstance(command, StudentElsewhere | LabelsElsewhere)
        from_coreset = " --coreset" if elsewhere else ""
        launch.require_alone(f"train {given[0]}{from_coreset}")
    match command:
        case TrainPrior():
            from .commands.prior import run_prior

            return run_prior(command, line)
        case TrainDecoder():
            from .commands.decoder import run_decoder

            return run_decoder(command, line)
        case TrainReproduce():
            from .commands.reproduce import reproduce

            return reproduce(command)
        case TrainReport():
            from .report.page import write_report

            return write_report(command.run)
        case TrainCompare():
            from .report.comparison import compare_runs

            return compare_runs(command)
        case TrainPublish():
            from .commands.publication import publish_run

            return publish_run(command, line)
        case TrainCheck():
            from .commands.publication import check_publication

            return check_publication(command, line)
        case StudentElsewhere():
            from .commands.student_from_coreset import train_elsewhere

            return train_elsewhere(command, line)
        case LabelsElsewhere():
            from .commands.labels_of_coreset import label_coreset

            return label_coreset(command, line)
        case TrainVerify():
            from .commands.verify import verify_labels

            return verify_labels(command)
        case _:
            from .commands.train import run_stages

            return run_stages(command, line)


if __name__ == "__main__":  # torchrun -m patchbloom.train.cli
    sys.exit(main())
