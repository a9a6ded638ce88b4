"""`make gpu` without a GPU: rehearsal; runner on stages that hang, fail or lack a library."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import requires
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import gpu
import pytest
import tyro
from packaging.requirements import Requirement
from patchbloom.export.config import BackendName
from peer_names import DIFFUSERS, LAUNCHED, split_name

ROOT = Path(__file__).parents[1]
GPU = ROOT / "bench" / "gpu.py"
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
def waits_for_the_device():
    time.sleep(600)
waits_for_the_device()
"""
WHERE = "import patchbloom.kernels.noise as noise; print(noise.__file__)"


def run_gpu(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GPU), *map(str, options)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(1200)  # every library is imported ten times
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_gpu("--dry", "--out", out, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split(maxsplit=3) for line in (out / "summary.txt").read_text().splitlines()]
    names = [stage.name for stage in gpu.make_stages("rehearsal", None, out)]
    assert [line[0] for line in table[1:-1]] == names
    assert {line[1] for line in table[1:-1]} == {"ok"}
    for kind in ("imports", "tests", "kernels", "expand", "profile", "epoch", "score"):
        assert any(name.startswith(kind) for name in names)
    rows = [json.loads(line) for path in out.glob("*/*.jsonl") for line in path.open()]
    assert {row["stage"]: row["benchmark"] for row in rows} == {
        "kernels": "kernels",
        "expand-32px-8-eager": "expand",
        "profile-expand": "profile",
        "epoch-eager": "epoch",
        "score-cpu": "score",
    }
    log = (out / "expand-32px-8-eager.log").read_text()
    told = [json.loads(line) for line in log.splitlines() if line.startswith('{"')]
    assert [("partial" in row, *row["images_per_s"]) for row in told] == [
        (True, "diffusers"),
        (True, "diffusers", "eager"),
        (True, "diffusers", "eager", "eager-launched"),
        (False, "diffusers", "eager", "eager-launched"),
    ]
    (scored,) = (row for row in rows if row["stage"] == "score-cpu")
    assert scored["bottleneck"] in ("loader", "teacher")
    assert scored["speedup"].keys() == {"torchvision", "torchvision-tensor"}
    random = {row["stage"] for row in rows if row.get("weights") == "random"}
    assert random >= {"expand-32px-8-eager", "profile-expand", "epoch-eager"}
    said = {line[0]: line[3] for line in table[1:-1]}
    rates = r"diffusers [\d.]+, eager [\d.]+, eager-launched [\d.]+ images/s"
    assert re.fullmatch(rates, said["expand-32px-8-eager"])
    assert re.fullmatch(r"40 images [\d.]+ s per epoch", said["epoch-eager"])
    assert said["imports"].startswith("StableDiffusionXLImg2ImgPipeline: torch 2.")
    assert re.match(r"busy \d+%: \d+% ", said["profile-expand"])
    assert re.match(r"\d+ skipped", said["tests-kernels"])


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_one_bad_stage_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(name: str, *words: str, limit_s: float = 60, **more: Any) -> Any:
        return gpu.Stage(name=name, words=words, limit_s=limit_s, **{"needs": (), **more})

    row = {"benchmark": "score", "device": "A Card", "images_per_s": {"dali": 12.5}}
    so_far = json.dumps(row | {"partial": True})
    stages = [
        stage("breaks-off", "-c", f"print({so_far!r}); raise OSError('lost')"),
        stage("hangs", "-c", HANGS, str(tmp_path / "pid"), limit_s=2),
        stage("fails", "-c", "raise OSError('out of memory')"),
        stage("forgets", "-c", "print('no row')"),
        stage("lacks", "-c", "", needs=("numpy", "no-such-library")),
        stage("finds", "-c", WHERE, prints_row=False),
        stage("rows", "-c", f"print({json.dumps(row)!r}); print('a warning')"),
    ]
    outcomes = gpu.run_stages(stages, tmp_path)
    assert gpu.report("quick", outcomes, tmp_path) == 1
    found = {outcome.name: (outcome.status, outcome.said) for outcome in outcomes}
    assert found["hangs"] == ("timed out", "limit 2 s")
    assert found["fails"] == ("failed", "exit status 1: OSError: out of memory")
    assert found["forgets"] == ("failed", "exit status 0, but no row")
    assert found["lacks"] == ("skipped", "needs no-such-library")
    assert found["breaks-off"] == (
        "failed",
        "exit status 1: OSError: lost; until then dali 12.5 images/s",
    )
    assert found["finds"][0] == "ok"
    assert str(ROOT) not in found["finds"][1]  # imported through links, not from ROOT
    assert found["rows"] == ("ok", "dali 12.5 images/s")
    first, line = (tmp_path / "a-card" / "score.jsonl").read_text().splitlines()
    assert json.loads(first)["partial"]
    assert json.loads(line) == row | {"stage": "rows", "command": ["python", *stages[-1].words]}
    assert "in waits_for_the_device" in (tmp_path / "hangs.log").read_text()
    assert not is_alive(int((tmp_path / "pid").read_text()))
    told = capsys.readouterr().out
    assert "in waits_for_the_device" in told
    assert told.index("--- fails, failed") < told.index("stage    ")
    assert gpu.report("quick", outcomes[4:], tmp_path) == 0
    assert gpu.report("quick", outcomes[4:6], tmp_path) == gpu.NOTHING_MEASURED == 3
    assert "nothing was measured" in capsys.readouterr().out


def test_unused_time_is_handed_on_and_later_stages_keep_their_least() -> None:
    death_s = gpu.TRACEBACK_S + gpu.DEATH_S

    def stage(least_s: float, limit_s: float) -> Any:
        return gpu.Stage(name="any", words=(), limit_s=limit_s, needs=(), least_s=least_s)

    now, later = stage(20, 100), [stage(30, 100), stage(40, 100)]
    for left_s, allowed_s in ((480, 100), (150, 150 - 70 - death_s), (90, 20), (20, 5), (10, -5)):
        assert gpu.allowed_s(now, later, left_s) == allowed_s


SLEEPS = "import time; print('sleeping', flush=True); time.sleep(600)"
OUTLIVES = f"import signal; signal.signal(signal.SIGABRT, signal.SIG_IGN); {SLEEPS}"


def sleeper(name: str, program: str, limit_s: float = 60) -> Any:
    return gpu.Stage(name=name, words=("-c", program), limit_s=limit_s, needs=(), prints_row=False)


def test_the_quick_form_ends_in_time_whatever_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time to kill counts: the second hanging stage gets only the time left before it."""
    monkeypatch.setitem(gpu.TOTAL_S, "quick", 12.0)
    for name, seconds in {"TRACEBACK_S": 1.5, "DEATH_S": 1.5, "REPORT_S": 1.0}.items():
        monkeypatch.setattr(gpu, name, seconds)
    stages = [
        sleeper("hangs", OUTLIVES, limit_s=2),
        sleeper("hangs-too", OUTLIVES),
        sleeper("late", "print('done')"),
    ]
    monkeypatch.setattr(gpu, "make_stages", lambda *_: stages)
    monkeypatch.setattr(gpu, "require_device", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    try:
        assert gpu.main(["--out", str(tmp_path)]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 12
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert re.fullmatch(r"hangs +timed out +\d+  limit 2 s", lines[1])
    assert re.fullmatch(r"hangs-too +timed out +\d+  limit \d s, what was left, of 60 s", lines[2])
    assert re.fullmatch(r"late +not run +-  no time left", lines[3])


def test_a_process_that_does_not_die_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a driver call: no signal arrives."""
    monkeypatch.setattr(gpu, "TRACEBACK_S", 0.2)
    monkeypatch.setattr(gpu, "DEATH_S", 0.2)
    monkeypatch.setattr(gpu.os, "killpg", lambda *_: None)
    stages = [sleeper("hangs", OUTLIVES, limit_s=5), sleeper("next", "print('done')")]
    began = time.monotonic()
    hung, following = gpu.run_stages(stages, tmp_path)
    assert time.monotonic() - began < 60
    assert hung.status == "timed out"
    found = re.fullmatch(
        r"limit 5 s; process (\d+) does not die, it hangs in the driver", hung.said
    )
    assert found is not None, hung.said
    monkeypatch.undo()
    os.killpg(int(found[1]), signal.SIGKILL)
    assert (following.status, following.said) == ("ok", "done")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped(sent: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            str(GPU),
            "--dry",
            "--stages",
            "tests-overlap",
            "tests-models",
            "--out",
            tmp_path,
        ],
        stdout=subprocess.PIPE,
        text=True,
        # A shell without job control starts background processes with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        log = tmp_path / "tests-overlap.log"
        while not log.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^tests-overlap +stopped", told, re.MULTILINE)
    assert re.search(r"^tests-models +not run", told, re.MULTILINE)
    assert not (tmp_path / "tests-models.log").exists()


def test_a_stopped_stage_keeps_its_row_so_far(tmp_path: Path) -> None:
    row = {"benchmark": "score", "device": "A Card", "images_per_s": {"dali": 12.5}}
    program = f"import os; print({json.dumps(row)!r}, flush=True)\n"
    program += f"os.kill(os.getppid(), {int(signal.SIGUSR1)}); {SLEEPS}"
    stage = gpu.Stage(name="stops", words=("-c", program), limit_s=60, needs=())
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        stopped, following = gpu.run_stages([stage, sleeper("next", SLEEPS)], tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (stopped.status, stopped.said) == ("stopped", "until then dali 12.5 images/s")
    assert following.status == "not run"
    (line,) = (tmp_path / "a-card" / "score.jsonl").read_text().splitlines()
    assert json.loads(line)["images_per_s"] == {"dali": 12.5}


def test_the_wheels_are_all_that_a_usual_machine_lacks(tmp_path: Path) -> None:
    """Closed under what they import, at versions that were tested together."""
    done = subprocess.run(
        ["make", "--dry-run", "gpu-wheels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, rest = (line for line in done.stdout.splitlines() if " pip download " in line)
    assert first.endswith("'diffusers==0.36.0'")
    names = rest.partition("--constraint constraints.txt ")[2].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").open()}
    assert set(names) <= pinned
    wheels = {name.replace("_", "-") for name in (*names, "diffusers")}
    for name in wheels - {"diffusers"}:
        needs = map(Requirement, requires(name) or ())
        for each in (need for need in needs if not need.marker or need.marker.evaluate()):
            assert each.name.lower().replace("_", "-") in wheels | {"pytest"}, name
    usual = {"torch", "triton", "transformers", "safetensors", "rich", "a C++ compiler"}
    for stage in gpu.make_stages("quick", None, tmp_path):
        if stage.name.startswith(("imports", "expand", "kernels", "epoch", "profile")):
            assert set(stage.needs) <= usual | wheels


def test_the_table_is_complete(tmp_path: Path) -> None:
    """Every GPU test is listed, and the quick form ends in time whatever hangs."""
    files = {
        f"tests/{path.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu"
    }
    quick = gpu.make_stages("quick", None, tmp_path)
    kinds = [stage.name.partition("-")[0] for stage in quick]
    order = ["imports", "expand", "kernels", "epoch", "expand", "profile", "score", "tests"]
    assert [kind for kind, _ in groupby(kinds)] == order
    first = quick[1].words[quick[1].words.index("--backends") + 1 :]
    assert {"diffusers", "diffusers-compiled"} < set(first)
    assert {f"{name}{more}" for name in ("eager", "compile") for more in ("", LAUNCHED)} < set(
        first
    )
    assert files == {word for stage in quick for word in stage.words if word.startswith("tests/")}
    own_s = gpu.TRACEBACK_S + gpu.DEATH_S + gpu.REPORT_S
    assert sum(stage.least_s for stage in quick) + 2 * own_s <= gpu.TOTAL_S["quick"] == 480
    assert all(0 < stage.least_s < stage.limit_s for stage in quick)
    for form in ("quick", "full", "rehearsal"):
        stages = gpu.make_stages(form, ROOT / "photographs", tmp_path)
        assert len({stage.name for stage in stages}) == len(stages)
        (cpu,) = (stage for stage in stages if stage.name == "score-cpu")
        assert cpu.words[cpu.words.index("--data") + 1] == str(ROOT / "photographs")
        assert "score-images" not in {stage.name for stage in stages}


@pytest.mark.parametrize("form", ["quick", "full"])
def test_options_of_the_gpu_forms_are_known(tmp_path: Path, form: str) -> None:
    """The rehearsal's options differ, so each benchmark parses its GPU options here."""
    for stage in gpu.make_stages(form, None, tmp_path):
        program, *words = stage.words
        if stage.prints_row:
            bench = importlib.import_module(Path(program).stem)
            options = tyro.cli(bench.Options, args=words)
            for name in getattr(options, "backends", ()):
                peer = split_name(name)[0].removesuffix(LAUNCHED)
                assert peer in (*DIFFUSERS, *get_args(BackendName))
            assert (options.device, options.json, options.record) == (
                "cpu" if stage.name == "score-cpu" else "cuda",
                True,
                False,
            )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dry", "--stages", "expnd"], "error: --stages expnd: expected the beginning of one of"),
        (["--dry", "--data", "nowhere"], "error: --data nowhere: expected an image folder"),
        (["--full"], "error: expected a CUDA device, found none"),
    ],
)
def test_what_cannot_be_run_is_told(options: list[str], told: str, tmp_path: Path) -> None:
    done = run_gpu(*options, "--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
