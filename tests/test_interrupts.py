"""Ctrl-C and SIGTERM at any instant: the command's own exit code, one line, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patchbloom.engine import interrupts
from patchbloom.engine.console import run_command
from patchbloom.train.run.progress import Report

ROOT = Path(__file__).resolve().parent.parent
ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
every_signal = pytest.mark.parametrize(("number", "code", "told"), ENDS)


def run(work: Callable[[], Any]) -> int:
    return run_command("program", {}, ["x"], lambda _: None, lambda _: work() or {})


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@every_signal
def test_a_signal_in_a_weakref_callback_is_not_lost(
    number: int, code: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in DALI's shutdown of a pipeline, where Python prints an exception and goes on."""
    reached: list[str] = []

    def work() -> None:
        class Pipeline:
            pass

        pipeline = Pipeline()
        watched = weakref.ref(pipeline, lambda _: send(number))
        del pipeline
        assert watched() is None
        reached.append("shut down")
        Report().progress("teacher", 1, 2, "images")
        reached.append("the next step")

    before = signal.getsignal(number)
    assert run(work) == code
    assert reached == ["shut down"]
    assert signal.getsignal(number) is before
    assert capfd.readouterr() == ("", f"program: error: {told}\n")


@every_signal
def test_a_signal_near_the_end_is_told(number: int, code: int, told: str) -> None:
    assert run(lambda: send(number)) == code


@every_signal
def test_what_fails_after_a_signal_is_that_signal(number: int, code: int, told: str) -> None:
    """A compiler in a child process got it too, and failed."""

    def work() -> None:
        send(number)
        raise RuntimeError("a worker ended")

    assert run(work) == code


def test_a_second_signal_ends_at_once() -> None:
    reached: list[str] = []

    def work() -> None:
        send(signal.SIGINT)
        reached.append("between")
        send(signal.SIGTERM)
        reached.append("after")

    assert run(work) == 130, "the first one's code"
    assert reached == ["between"]


def test_without_a_safe_point_a_signal_ends_after_a_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE_S", 0.05)

    def work() -> None:
        send(signal.SIGINT)
        time.sleep(60)

    began = time.monotonic()
    assert run(work) == 130
    assert time.monotonic() - began < 30


@every_signal
def test_a_signal_at_the_end_of_a_block_goes_to_the_former_handlers(
    number: int, code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our handler stayed once, with its signal, and every later command ended as interrupted."""
    received: list[int] = []
    restore, numbers = signal.signal, [number]

    def send_first(*given: Any) -> Any:
        if numbers:
            send(numbers.pop())
        return restore(*given)

    former = {each: restore(each, lambda *got: received.append(got[0])) for each, *_ in ENDS}
    ours = {each: signal.getsignal(each) for each in former}
    try:
        with interrupts.signals_kept():
            monkeypatch.setattr(signal, "signal", send_first)
        monkeypatch.undo()
        assert {each: signal.getsignal(each) for each in former} == ours
        assert received == [number]
        assert run(lambda: None) == 0
    finally:
        for each, handler in former.items():
            restore(each, handler)


def test_two_signals_at_the_end_of_a_command_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = signal.signal

    def send_first(*given: Any) -> Any:
        send(signal.SIGINT)
        return restore(*given)

    def work() -> None:
        send(signal.SIGINT)
        monkeypatch.setattr(signal, "signal", send_first)

    before = [signal.getsignal(each) for each, *_ in ENDS]
    assert run(work) == 130
    monkeypatch.undo()
    assert [signal.getsignal(each) for each, *_ in ENDS] == before
    assert run(lambda: None) == 0


@every_signal
def test_a_forked_worker_ends_at_a_signal(number: int, code: int, told: str) -> None:
    with interrupts.signals_kept():
        child = os.fork()
        if child == 0:
            send(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


@every_signal
@pytest.mark.parametrize("program", ["train", "engine"])
def test_a_signal_during_the_first_imports(
    program: str, number: int, code: int, told: str, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"][program].partition(":")
    script = (
        "import os, sys\n"
        "class Sends:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'tyro': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Sends())\n"
        f"from {module} import {name}\n"
        f"sys.exit({name}())\n"
    )
    words = [sys.executable, "-c", script, "coreset", "info", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr == f"{program}: error: {told}\n"


@every_signal
def test_a_signal_while_python_takes_itself_down_changes_no_exit_code(
    number: int, code: int, told: str
) -> None:
    script = (
        "import os, sys\n"
        "from patchbloom.engine.interrupts import keep_signals\n"
        "keep_signals()\n"
        "class Module:\n"
        f"    def __del__(self, kill=os.kill, own=os.getpid()): kill(own, {int(number)})\n"
        "last = Module()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
