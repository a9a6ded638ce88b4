"""kill -9 in every stage, then --resume: the result is that of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patchbloom.train.run.folder import RunError, RunFolder, StageResult
from patchbloom.train.run.progress import Report
from run_processes import (
    EXIT_CODES,
    METHODS,
    OPTIONS,
    Start,
    finish,
    kill_when,
    outcome,
    patches_sha256,
    sha256,
    starter,
    state,
    write_inputs,
)

KILLS = 50
DISK_STEP_KIB = 56


@pytest.fixture(scope="module")
def start() -> Start:
    return starter()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_inputs(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def reference(
    start: Start, given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Outcome of an uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finish(start(*given, *OPTIONS, "--out", out))
    return outcome(out)


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


def test_signals_end_with_a_checkpoint_and_their_code(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for number, method in ((signal.SIGTERM, "random"), (signal.SIGINT, "dace")):

        def is_training(method: str = method) -> bool:
            log = out / "log.jsonl"
            return log.is_file() and f'"{method}/loss"' in log.read_text()

        kill_when(start(*given, *OPTIONS, "--out", out, "--resume"), is_training, number)
        assert list((out / "students").glob(f"{method}.checkpoint-*.safetensors"))
    finish(start(*given, *OPTIONS, "--out", out, "--resume"))
    assert outcome(out) == reference


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_at_random_instants_and_resumed(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path, number: int
) -> None:
    """Fifty runs, each stopped once, anywhere between its first and its last moment."""
    began = time.monotonic()
    finish(start(*given, *OPTIONS, "--out", tmp_path / "timed"))
    whole_s, instants = time.monotonic() - began, random.Random(0)
    stages_hit: dict[str, int] = {}
    for each in range(KILLS):
        out, dies_s = tmp_path / f"run{each}", instants.uniform(0.2, whole_s)
        process = start(*given, *OPTIONS, "--out", out)
        process.join(dies_s)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (0, EXIT_CODES[number])
        begun = [
            path.stem for path in out.glob("stages/*.json") if state(out, path.stem) == "begun"
        ]
        stages_hit["".join(begun) or "between"] = stages_hit.get("".join(begun) or "between", 0) + 1
        finish(start(*given, *OPTIONS, "--out", out, "--resume"))
        assert outcome(out) == reference, f"stopped after {dies_s:.3f} s of {whole_s:.1f} s"
    print(f"{KILLS} of {KILLS} resumed to the same bytes; stopped in {stages_hit}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_at_every_size_and_resumed(
    start: Start, given: tuple[str, ...], reference: dict[str, Any], tmp_path: Path
) -> None:
    """Runs on file systems of 4 KiB and up, each a larger one; then with space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    codes: list[int | None] = []
    for size_kib in itertools.count(4, DISK_STEP_KIB):
        if subprocess.run([*mount, f"size={size_kib}k"], capture_output=True).returncode:
            pytest.skip("mounting a small file system takes more rights than this user has")
        try:
            process = start(*given, *OPTIONS, "--out", disk / "run")
            process.join()
            codes.append(process.exitcode)
            assert process.exitcode in (0, 2)
            subprocess.run([*mount, "remount,size=1g"], check=True)
            finish(start(*given, *OPTIONS, "--out", disk / "run", "--resume"))
            assert outcome(disk / "run") == reference, f"full at {size_kib} KiB"
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        if codes[-1] == 0:
            break
    print(f"full on {len(codes) - 1} disks of up to {size_kib - DISK_STEP_KIB} KiB, all resumed")
    assert len(codes) > 20


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


def test_seconds_are_those_of_all_sessions_that_could_write(tmp_path: Path) -> None:
    def stopped() -> StageResult:
        time.sleep(0.2)
        raise KeyboardInterrupt

    with Report() as record:
        with RunFolder(tmp_path, record) as run, pytest.raises(KeyboardInterrupt):
            run.stage("work", {}, stopped)
        told = json.loads((tmp_path / "stages" / "work.json").read_text())
        assert told == {"config": {}, "state": "begun", "seconds": told["seconds"]}
        assert told["seconds"] >= 0.2
        with RunFolder(tmp_path, record) as run:
            run.stage("work", {}, lambda: StageResult({}))
            assert run.seconds()["work"] >= told["seconds"]


def test_a_report_is_made_again_of_more_students_and_other_stages_refuse(tmp_path: Path) -> None:
    """So a finished run may be resumed with the ceiling that it lacked at first."""
    with Report() as record:
        for number in (1, 2, 2):
            with RunFolder(tmp_path, record) as run:
                made = run.stage(
                    "report", {"n": number}, lambda n=number: StageResult({"n": n}), again=True
                )
                assert made == {"n": number}
        with RunFolder(tmp_path, record) as run, pytest.raises(RunError, match="n = 2, now asked"):
            run.stage("report", {"n": 3}, lambda: StageResult({}))
