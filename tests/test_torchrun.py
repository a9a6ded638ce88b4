"""torchrun with 1, 2 and 3 processes: one result, one log, and a crash that loses nothing.

The processes are real, on the CPU with gloo. Shared work is compared bit for bit, at one thread
each and one engine batch. Students, without BatchNorm, are compared up to ROUNDING: the ranks'
gradients are summed in another order, and AdamW makes whole steps of gradients near zero.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.engine import interrupts
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.labels import recording as labels
from patchbloom.train.methods.pools import answer_pool
from patchbloom.train.run import world
from patchbloom.train.run.checkpoint import read_tensors
from patchbloom.train.run.launch import Launch, read_launch

TORCHRUN = Path(sys.executable).with_name("torchrun")
PROBE = Path(__file__).with_name("torchrun_probe.py")
IMAGES = 15  # per class: 150 are three batches of the scorer, one for each of three ranks
OPTIONS = (
    *("--model", "sdxl-tiny", "--method", "dace", "random", "t2i", "--backend", "eager"),
    *("--recipe", "rded", "--factor", "2", "--image-size", "32", "--steps", "2", "--rho", "0.5"),
    # 40 samples: five engine calls and two forward passes of the teacher
    *("--engine-batch", "8", "--epochs", "4", "--teacher", "convnet-d3-w8"),
    *("--teacher-epochs", "1", "--student", "convnet-d3-w8-in", "--batch", "9", "--no-ceiling"),
)
ROUNDING = 5e-4  # per weight, after 20 steps of up to 1e-3 each


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(
        tmp_path_factory.mktemp("given") / "data", train_per_class=IMAGES, val_per_class=4
    )


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one process."""
    return trained(1, data, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    assert cli.main(["teacher", *OPTIONS, "--data", str(data), "--out", str(out)]) == 0
    return out / "teacher" / "teacher.safetensors"


def torchrun(size: int, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(TORCHRUN), "--standalone", "--nproc-per-node", str(size), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **more}
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)


def trained(size: int, data: Path, folder: Path) -> dict[str, Any]:
    """Run `train student` in a world of `size`; return its coresets, students and shared work."""
    notes, out = folder / "notes", folder / "run"
    arguments = ("student", "--data", data, "--out", out, *OPTIONS, "--seeds", "2")
    run = torchrun(size, PROBE, notes, "-", *arguments)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1
    told = [line for line in run.stderr.splitlines() if line.startswith("patches, random")]
    assert len(told) == 1, run.stderr
    shared = {path.stem: json.loads(path.read_text()) for path in notes.iterdir()}
    for of_ranks in shared.values():
        assert len(of_ranks) == size
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        assert of_ranks[0]["few"]
        assert of_ranks[0]["any"] == [False, True]
    return {
        "names": names_in(out),
        "students": {p.stem: read_tensors(p) for p in (out / "students").glob("*.safetensors")},
        "shared": {method: of_ranks[0] for method, of_ranks in shared.items()},
    }


def names_in(out: Path) -> dict[str, str]:
    folders = {"dace": "coreset", "random": "coreset-random", "t2i": "coreset-t2i"}
    return {method: open_coreset(out / name).content_sha256 for method, name in folders.items()}


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("train: error:")]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_world_of_any_size_makes_the_same(size: int, data: Path, alone, tmp_path: Path) -> None:
    """Labelled coresets, expansions, the teacher's answers and accuracy, and students."""
    assert alone["shared"].keys() == {"dace", "random", "t2i"}
    assert alone["names"]["dace"] != alone["names"]["random"]
    together = trained(size, data, tmp_path)
    assert together["names"] == alone["names"]
    assert together["shared"] == alone["shared"]
    assert len(alone["students"]) == 6
    for name, (weights, told) in alone["students"].items():
        others, told_together = together["students"][name]
        assert told_together["losses"] == pytest.approx(told["losses"], rel=1e-2)
        differences = [float((others[key] - weights[key]).abs().max()) for key in weights]
        assert max(differences) < ROUNDING


@pytest.mark.parametrize(
    ("choice", "sizes"),
    [
        # 40 patches are cut again, in one batch: rank 1 gets none. 80 are two, one for each.
        ("facility-location", ("--ipc", "1", "--candidates", "3")),
        ("k-center", ("--ipc", "2", "--candidates", "2")),
    ],
)
def test_a_diverse_choice_is_that_of_one_process(
    data: Path, teacher: Path, tmp_path: Path, choice: str, sizes: tuple[str, ...]
) -> None:
    options = (*OPTIONS, "--method", "rded", "--data", data, "--teacher", teacher)
    words = [str(word) for word in ("coreset", *options, "--select", choice, *sizes)]
    assert cli.main([*words, "--out", str(tmp_path / "alone")]) == 0
    run = torchrun(2, TORCHRUN.with_name("train"), *words, "--out", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    alone, two = (open_coreset(tmp_path / out / "coreset") for out in ("alone", "two"))
    assert two.content_sha256 == alone.content_sha256
    origins = [each.manifest["provenance"]["patches"] for each in (alone, two)]
    assert origins[0] == origins[1]
    lowest = sorted(origins[0], key=lambda patch: (patch["image"].split("/")[-2], patch["loss"]))
    assert origins[0] != lowest, "in the order of the choice"


def test_a_basis_of_labels_is_that_of_one_process(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    codec = ("--method", "random", "--codec", "pca", "--components", "4")
    given = ("labels", *OPTIONS, *codec, "--data", str(data), "--teacher", str(teacher))
    assert cli.main([*given, "--out", str(tmp_path / "alone")]) == 0
    run = torchrun(2, TORCHRUN.with_name("train"), *given, "--out", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    alone, two = (open_coreset(tmp_path / out / "coreset") for out in ("alone", "two"))
    assert two.content_sha256 == alone.content_sha256
    assert alone.manifest["labels"]["codec"] == "pca"
    assert run.stderr.count("labels: 4 components keep") == 1


def test_a_killed_rank_ends_the_run_and_nothing_is_lost(
    data: Path,
    alone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun restarts the world, which resumes and is killed again; then one process finishes.

    The first kill leaves two epochs of dace's labels, the second all of them.
    """
    notes, out = tmp_path / "notes", tmp_path / "run"
    arguments = ("labels", "--data", str(data), "--out", str(out), *OPTIONS, "--resume")
    run = torchrun(2, "--max-restarts", "1", PROBE, notes, "1", *arguments)
    assert run.returncode != 0
    assert time.time() - float((notes / "killed").read_text()) < 20
    assert "SIGKILL" in run.stderr
    assert run.stderr.count("Traceback") <= 1, run.stderr  # torchrun's own
    assert len(errors(run.stderr)) <= 2  # at most one per start, rank 0's if it noticed
    done = {path.stem: path.read_bytes() for path in (out / "stages").iterdir()}
    assert json.loads(done["labels-random"])["state"] == "begun"
    assert open_coreset(out / "coreset-random").soft_labels() is None
    assert open_coreset(out / "coreset").content_sha256 == alone["names"]["dace"]

    asked: list[int] = []

    def counted(teacher, views_PCHW, world):
        asked.append(len(views_PCHW))
        return answer_pool(teacher, views_PCHW, world)

    monkeypatch.setattr(labels, "answer_pool", counted)
    assert cli.main(arguments) == 0
    assert asked == [40] * 8  # random, whose first pool was the third of the second start, and t2i
    output = capsys.readouterr()
    assert names_in(out) == alone["names"]
    assert "labels-dace: done before" in output.err
    assert (out / "stages" / "teacher.json").read_bytes() == done["teacher"]


def test_an_error_of_all_is_told_once(data: Path, tmp_path: Path) -> None:
    run = torchrun(3, "-m", "patchbloom.train.cli", "--data", data, "--out", tmp_path, "--ipc", "x")
    assert run.returncode != 0
    assert run.stdout == ""
    assert errors(run.stderr) == [
        "train: error: --ipc: expected INT, got 'x' (see train --help)"
    ], run.stderr


def test_an_error_of_one_is_told_by_it(data: Path, teacher: Path, tmp_path: Path) -> None:
    """A damaged file in the second scored batch, which is rank 1's."""
    damaged = shutil.copytree(data, tmp_path / "data")
    path = sorted((damaged / "train").iterdir())[6] / "00003.jpg"
    path.write_bytes(path.read_bytes()[:100])
    options = (*OPTIONS, "--data", damaged, "--out", tmp_path / "run", "--teacher", teacher)
    train = TORCHRUN.with_name("train")
    run = torchrun(2, train, "coreset", *options)
    assert run.returncode != 0
    (error,) = errors(run.stderr)
    assert f"cannot decode {path}" in error
    assert run.stderr.count("Traceback") == 1, run.stderr  # torchrun's own
    assert (
        json.loads((tmp_path / "run" / "stages" / "teacher.json").read_bytes())["state"] == "done"
    )


def test_images_that_changed_are_told_once_and_nothing_goes_on(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    """Under the same names and sizes, between a start of one process and one of two."""
    given, out = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "run"
    words = ("teacher", *OPTIONS, "--data", given, "--teacher", teacher, "--out", out)
    assert cli.main([str(word) for word in words]) == 0
    before = {path: path.read_bytes() for path in (out / "stages").iterdir()}
    dark = given / "train" / "ring" / "00000.jpg"
    dark.write_bytes(bytes(dark.stat().st_size))
    run = torchrun(2, TORCHRUN.with_name("train"), *words)
    assert run.returncode != 0
    assert run.stdout == ""
    (error,) = errors(run.stderr)
    assert "1 have other content (train/ring/00000.jpg): give the same images" in error
    assert run.stderr.count("Traceback") == 1, run.stderr  # torchrun's own
    assert {path: path.read_bytes() for path in (out / "stages").iterdir()} == before


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def test_what_has_nothing_to_share_is_refused(
    monkeypatch, capfd, tmp_path: Path, free_port: int
) -> None:
    launch = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**launch, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port}.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["report", str(tmp_path)]) == 2
    (error,) = errors(capfd.readouterr().err)
    assert "start it without torchrun" in error


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(world, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch = Launch(rank=2, size=3, local_rank=2, local_size=3)
    with pytest.raises(ValueError, match=r"3 processes .* 2 GPUs: give --nproc-per-node 2"):
        world.own_device(launch, "auto")


@pytest.fixture
def started(monkeypatch, free_port: int, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs one process of two, this one, whose peer never comes."""

    def run(rank: int, *options: str) -> int:
        numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        launch = {**numbers, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port}
        for name, value in launch.items():
            monkeypatch.setenv(name, str(value))
        return cli.main(["--data", "shapes", "--out", str(tmp_path / "run"), *options])

    monkeypatch.setattr(world, "LOOK_UP_S", 0.01)
    yield run
    world._store.cache_clear()
    world._fails_first.cache_clear()


@pytest.mark.parametrize(
    ("rank", "number", "code"), [(0, signal.SIGINT, 130), (1, signal.SIGTERM, 143)]
)
def test_a_peer_that_never_comes_is_told_and_a_signal_ends_the_wait(
    rank: int, number: int, code: int, started, free_port: int, monkeypatch, capfd
) -> None:
    def look_at_signals() -> None:
        os.kill(os.getpid(), number)
        interrupts.safe_point()

    monkeypatch.setattr(world, "TOLD_AFTER_S", 0)
    monkeypatch.setattr(world, "safe_point", look_at_signals)
    assert started(rank) == code
    missing = ("1 of 2 processes", f"rank 0 at localhost:{free_port} (Connection refused)")[rank]
    ends = {130: "interrupted", 143: "terminated"}[code]
    assert capfd.readouterr().err == f"waiting for {missing}\ntrain: error: {ends}\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_comes_is_waited_for_so_long(rank: int, started, capfd) -> None:
    assert started(rank, "--start-timeout", "0.05") == 2
    (error,) = errors(capfd.readouterr().err)
    assert error.startswith("train: error: waited 0.05 s for ")
    assert error.endswith("or allow more time with --start-timeout")


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ({"RANK": "1"}, "RANK='1' without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK='0', WORLD_SIZE='1' without LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict each other"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "contradict each other"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "are not numbers"),
    ],
)
def test_what_another_launcher_left_is_refused_by_name(
    launch: dict[str, str], told: str, monkeypatch, capfd, tmp_path: Path
) -> None:
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} if len(launch) == 3 else {}
    for name, value in {**launch, **meeting}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--data", "shapes", "--out", str(tmp_path / "run")]) == 2
    (error,) = errors(capfd.readouterr().err)
    assert told in error
    assert "start with torchrun, which sets all of them, or unset RANK" in error or len(launch) == 1
    assert not (tmp_path / "run").exists()


def test_the_place_of_a_launch_alone_is_no_launch(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert read_launch() == Launch()
