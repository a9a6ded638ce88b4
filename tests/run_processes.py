"""Start, kill and finish runs in separate processes, and read their files.

A fork server imports torch once for all of them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from cli_cases import write_small_model
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes

METHODS = ("random", "dace")
OPTIONS = (
    *("--method", *METHODS, "--backend", "eager", "--factor", "1", "--no-ceiling"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "4", "--student", "convnet-d3-w8"),
    *("--epochs", "24", "--seeds", "2", "--steps", "2", "--rho", "0.5"),
)
STARTED_WITHIN_S = 120
EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

Start = Callable[..., BaseProcess]


def starter() -> Start:
    """A function that starts `train ...` in its own single-threaded process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["patchbloom.train.commands.train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def started(*arguments: str | Path) -> BaseProcess:
        process = context.Process(target=_train, args=([str(word) for word in arguments],))
        process.start()
        return process

    return started


def _train(arguments: list[str]) -> None:
    sys.exit(cli.main(arguments))


def write_inputs(folder: Path) -> tuple[str, ...]:
    """Write data and a 32 px model with random weights; return the options that name them."""
    write_shapes(folder / "data", train_per_class=5, val_per_class=2)
    write_small_model(folder)
    return ("--data", str(folder / "data"), "--model", str(folder / "model"))


def finish(process: BaseProcess) -> None:
    process.join(timeout=200)
    assert process.exitcode == 0


def kill_when(
    process: BaseProcess, is_there: Callable[[], bool], number: int = signal.SIGKILL
) -> None:
    """Send a signal as soon as the condition holds; the process must still be running."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while not is_there():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=20)
    assert process.exitcode == EXIT_CODES[number]


def state(out: Path, stage: str) -> str | None:
    path = out / "stages" / f"{stage}.json"
    return json.loads(path.read_text())["state"] if path.is_file() else None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must not depend on how often the run was stopped."""
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
