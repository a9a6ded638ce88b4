"""kill -9 in every stage, then --resume: the result is that of a run that nobody stopped.

Runs are real processes, forked from a server that has imported torch once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.train import cli, stages
from patchbloom.train.prior_model import new_parts, save_parts
from patchbloom.train.record import Record
from patchbloom.train.shapes import write_shapes
from patchbloom.train.stages import RunError, RunFolder, StageResult

METHODS = ("random", "dace")
OPTIONS = (
    *("--method", *METHODS, "--backend", "eager", "--factor", "1", "--no-ceiling"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "4", "--student", "convnet-d3-w8"),
    *("--epochs", "12", "--seeds", "2", "--steps", "2", "--rho", "0.5"),
)
STARTED_WITHIN_S = 120

Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Start:
    """Start `train ...` in a process of its own, with one thread: cores are shared with others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["patchbloom.train.run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def started(*arguments: str | Path) -> BaseProcess:
        process = context.Process(target=cli.main, args=([str(word) for word in arguments],))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Data and a model with random weights, both of 32 px."""
    folder = tmp_path_factory.mktemp("given")
    write_shapes(folder / "data", train_per_class=5, val_per_class=2)
    torch.manual_seed(0)
    parts = new_parts(
        32, folder / "tokenizer", unet_channels=(16, 32, 64), vae_channels=(8, 16, 16)
    )
    save_parts(parts, folder / "model")
    return ("--data", str(folder / "data"), "--model", str(folder / "model"))


@pytest.fixture(scope="module")
def reference(
    start: Start, given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finish(start(*given, *OPTIONS, "--out", out))
    return outcome(out)


def finish(process: BaseProcess) -> None:
    process.join(timeout=200)
    assert process.exitcode == 0


def kill_when(process: BaseProcess, is_there: Callable[[], bool]) -> None:
    """kill -9 as soon as the condition holds; it must hold while the process is at work."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while not is_there():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=20)
    assert process.exitcode == -signal.SIGKILL


def state(out: Path, stage: str) -> str | None:
    path = out / "stages" / f"{stage}.json"
    return json.loads(path.read_text())["state"] if path.is_file() else None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(out: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was stopped."""
    summary = json.loads((out / "summary.json").read_text())
    students = sorted((out / "students").iterdir())
    return {
        "accuracy": summary["accuracy"],
        "losses": {name: result["losses"] for name, result in summary["students"].items()},
        "teacher losses": summary["teacher"]["losses"],
        "content_sha256": summary["content_sha256"],
        "patches": patches_sha256(out),
        "labels": {m: sha256(coreset(out, m) / "labels.safetensors") for m in METHODS},
        "teacher": sha256(out / "teacher" / "teacher.safetensors"),
        "students": {path.name: sha256(path) for path in students},
        "leftovers": [path.name for path in (out / "teacher").iterdir()],
    }


def patches_sha256(out: Path) -> dict[str, str]:
    result = json.loads((out / "stages" / "coreset.json").read_text())["result"]
    return {method: result[method]["patches_sha256"] for method in METHODS}


def coreset(out: Path, method: str) -> Path:
    return out / ("coreset" if method == "dace" else f"coreset-{method}")


def test_a_run_leaves_what_it_says(reference: dict[str, Any]) -> None:
    names = [f"{method}-seed{seed}.safetensors" for method in METHODS for seed in (0, 1)]
    assert sorted(reference["students"]) == sorted(names)
    assert len(set(reference["students"].values())) == len(names)
    assert reference["leftovers"] == ["teacher.safetensors"]


def test_killed_in_every_stage_and_resumed(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    students = out / "students"

    def is_written(path: Path) -> Callable[[], bool]:
        return lambda: any(path.parent.glob(path.name))

    def has_begun(stage: str) -> Callable[[], bool]:
        return lambda: state(out, stage) == "begun"

    moments = (
        is_written(out / "run.json"),
        is_written(out / "teacher" / "checkpoint.safetensors"),
        has_begun("coreset"),
        is_written(out / "coreset-random"),
        is_written(students / "random.checkpoint-*.safetensors"),
        is_written(students / "random-seed0.safetensors"),
        has_begun("student-dace"),
        is_written(students / "dace.checkpoint-*.safetensors"),
        has_begun("report"),
    )
    for moment in moments:
        kill_when(start(*given, *OPTIONS, "--out", out, "--resume"), moment)
        assert not (out / "summary.json").exists()
    finish(start(*given, *OPTIONS, "--out", out, "--resume"))
    assert outcome(out) == reference


def test_stage_by_stage_is_the_same_as_all_at_once(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finish(start("teacher", *given, *OPTIONS, "--out", out))
    finish(start("coreset", *given, *OPTIONS, "--out", out))
    recorded = out / "students" / "dace.labels.partial"
    kill_when(start("labels", *given, *OPTIONS, "--out", out), recorded.exists)
    finish(start("labels", *given, *OPTIONS, "--out", out))
    assert not (out / "students" / "dace-seed0.safetensors").exists()
    finish(start("student", *given, *OPTIONS, "--out", out))
    assert not (out / "summary.json").exists()
    finish(start(*given, *OPTIONS, "--out", out, "--resume"))
    assert outcome(out) == reference


def test_a_second_seed_differs(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finish(start("coreset", *given, *OPTIONS, "--out", out, "--seed", "1"))
    patches = patches_sha256(out)
    assert all(patches[method] != reference["patches"][method] for method in METHODS)
    assert sha256(out / "teacher" / "teacher.safetensors") != reference["teacher"]


def test_seconds_are_those_of_all_sessions_even_of_killed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CLOCK_EVERY_S", 0.01)
    told: list[float] = []

    def killed() -> StageResult:
        deadline = time.monotonic() + 20
        while not told or told[-1] < 0.2:
            assert time.monotonic() < deadline, "the file of the stage does not tell the time"
            time.sleep(0.005)
            told.append(json.loads((tmp_path / "stages" / "teacher.json").read_text())["seconds"])
        raise KeyboardInterrupt

    with Record() as record:
        with RunFolder(tmp_path, record) as run, pytest.raises(KeyboardInterrupt):
            run.stage("teacher", {}, killed)
        with RunFolder(tmp_path, record) as run:
            run.stage("teacher", {}, lambda: StageResult({}))
            assert run.seconds()["teacher"] >= told[-1]


def test_a_report_is_made_again_of_more_students_and_other_stages_refuse(tmp_path: Path) -> None:
    """A finished run may be resumed with the ceiling that was left out at first."""
    with Record() as record:
        for number in (1, 2, 2):
            with RunFolder(tmp_path, record) as run:
                made = run.stage(
                    "report", {"n": number}, lambda n=number: StageResult({"n": n}), again=True
                )
                assert made == {"n": number}
        with RunFolder(tmp_path, record) as run, pytest.raises(RunError, match="n = 2, now asked"):
            run.stage("report", {"n": 3}, lambda: StageResult({}))
