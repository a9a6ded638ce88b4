"""The run folder: its owner, refused resumes, full disks, changed files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cli_cases import SMALL, Command
from patchbloom.engine.coreset import coreset
from patchbloom.export import durable
from patchbloom.train.labels import run_labels
from patchbloom.train.run.folder import RunError, RunFolder, check_out
from patchbloom.train.run.progress import Report
from PIL import Image


@pytest.mark.parametrize("found", ["file", "folder", "run"])
def test_an_out_folder_that_is_not_empty(
    train: Command, shapes: Path, tmp_path: Path, found: str
) -> None:
    out = tmp_path / "run"
    if found == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    if found == "run":
        (out / "run.json").write_text('{"schema": "patchbloom.run/1"}')
    for option in ([], ["--overwrite"], ["--resume"]):
        error = train("--data", shapes, "--out", out, *option).error
        assert "not a folder" in error if found == "file" else "'thesis.tex'" in error
        assert "choose another --out" in error
    assert "mine" in (out if found == "file" else out / "thesis.tex").read_text()


def test_a_run_is_neither_resumed_nor_replaced_unasked(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"schema": "patchbloom.run/1"}')
    error = train("--data", shapes, "--out", tmp_path).error
    assert "--resume goes on with that run, --overwrite replaces it" in error


def test_another_process_at_work_in_the_folder(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--out", tmp_path / "run", "--method", "rded", *SMALL)
    with Report() as record, RunFolder(tmp_path / "run", record):
        (tmp_path / "run" / "teacher").mkdir()
        for option in ("--resume", "--overwrite"):
            error = train(*options, option).error
            assert f"another process works in {tmp_path / 'run'}" in error
        assert (tmp_path / "run" / "teacher").is_dir()


def start_twice(folder: Path, trials: int) -> list[list[str]]:
    """Messages of two processes that start at one moment, in one fresh folder per trial."""
    context = multiprocessing.get_context("fork")
    together, told = context.Barrier(2), [context.SimpleQueue() for _ in range(2)]

    def start(own: Any) -> None:
        for trial in range(trials):
            out, outcome = folder / str(trial), "held"
            together.wait(60)
            with Report() as record, ExitStack() as stack:
                try:
                    check_out(out, resume=False, overwrite=False)
                    stack.enter_context(RunFolder(out, record))
                    assert json.loads((out / "run.json").read_text())
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}".replace(str(out), "OUT")
                together.wait(60)  # the holder stays until the other has tried
            own.put(outcome)

    processes = [context.Process(target=start, args=(own,)) for own in told]
    for process in processes:
        process.start()
    outcomes = [sorted(own.get() for own in told) for _ in range(trials)]
    for process in processes:
        process.join()
    return outcomes


def test_one_of_two_starts_at_one_moment_has_the_folder(tmp_path: Path) -> None:
    refused = "RunError: another process works in OUT: wait for it, or end it"
    assert start_twice(tmp_path, 50) == [[refused, "held"]] * 50


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    holding = (
        "import sys; from pathlib import Path; from patchbloom.export.durable import take_lock\n"
        "lock = take_lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    mark = tmp_path / "run.json"
    mark.write_text('{"schema": "patchbloom.run/1"}')
    command = [sys.executable, "-c", holding, str(mark)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Report() as record, subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process works in"):
            RunFolder(tmp_path, record)
        process.kill()
        process.wait()
        with RunFolder(tmp_path, record):
            assert json.loads(mark.read_text()) == {"schema": "patchbloom.run/1"}


def test_other_options_than_before_are_refused(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--out", tmp_path / "run", "--method", "random", *SMALL)
    first = train("teacher", *options).result
    assert first == train("teacher", *options).result
    error = train("teacher", *options, "--seed", "7").error
    assert "was run with --seed = 0, now asked for 7: give the same options" in error
    error = train("teacher", *options, "--teacher-epochs", "3").error
    assert "was run with --teacher-epochs = 1, now asked for 3" in error
    again = train("teacher", *options, "--seed", "7", "--overwrite").result
    assert again["teacher"]["sha256"] != first["teacher"]["sha256"]
    dace = ("coreset", "--data", shapes, "--out", tmp_path / "dace", "--model", "sdxl-tiny", *SMALL)
    train(*dace).result  # noqa: B018
    error = train(*dace, "--mixup-weight", "0.5").error
    assert "was run with --mixup-weight = uniform, now asked for 0.5" in error


def test_what_was_asked_for_is_written_down_once(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--data", shapes, "--out", out, "--method", "random", *SMALL, "--cutmix", "on")
    train("teacher", *options)
    first = (out / "config.json").read_text()
    assert json.loads(first)["student"]["cutmix"] is True
    assert "was run with --seed = 0" in train("teacher", *options, "--seed", "7").error
    assert (out / "config.json").read_text() == first
    sessions = json.loads((out / "environment.json").read_text())
    assert ["--seed 7" in session["command"] for session in sessions] == [False, True]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any(line.get("said", "").startswith("data: ") for line in lines)


def test_a_changed_byte_in_a_coreset(train: Command, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data", shapes, "--out", out, "--method", "random", *SMALL)
    train("coreset", *options).result  # noqa: B018
    path = out / "coreset" / "patches" / "star" / "000001.png"
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    error = train("student", *options).error
    assert f"{path} is not as the coreset stage left it (it was changed)" in error
    path.unlink()
    error = train("student", *options).error
    assert "(it is missing)" in error
    assert "restore it, or start again with --overwrite" in error


def test_a_recording_cut_short_under_finished_students_is_made_again(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise OSError("as if killed")

    given = ("student", "--data", shapes, "--method", "random", *SMALL, "--no-ceiling")
    train(*given, "--out", tmp_path / "whole").result  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(run_labels, "attach_labels", killed)
        assert "as if killed" in train(*given, "--out", tmp_path / "cut").error
    recording = tmp_path / "cut" / "students" / "random.labels.partial"
    os.truncate(recording, 100)
    told = train(*given, "--out", tmp_path / "cut")
    assert told.result["students"]["random"]["losses"]
    assert f"labels: {recording} is truncated or holds other labels: starting over" in told.err
    stored = [tmp_path / out / "coreset" / "labels.safetensors" for out in ("whole", "cut")]
    assert stored[0].read_bytes() == stored[1].read_bytes()


def test_a_full_disk(train: Command, shapes: Path, small_disk: Path) -> None:
    options = ("--data", shapes, "--method", "rded", *SMALL, "--teacher", "convnet-d3-w64")
    error = train("--out", small_disk / "run", *options).error
    assert f"no space left for {small_disk / 'run'}" in error
    assert "free some, or choose an --out on another disk" in error


@pytest.mark.parametrize("full", ["teacher", "coreset", "students", "stages"])
def test_a_disk_that_is_full_at_any_moment_and_resumed(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """ENOSPC raised in each writer, without a mount; then --resume."""
    out = tmp_path / "run"

    def refuse(path: Path, data: bytes) -> None:
        if full in path.parts[len(out.parts) :]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    write = durable.write_durably
    with monkeypatch.context() as patch:
        for module in (durable, coreset):
            patch.setattr(module, "write_durably", refuse)
        options = ("--data", shapes, "--out", out, "--method", "random", "--no-ceiling", *SMALL)
        error = train(*options).error
    assert f"no space left for {out}" in error
    assert set(train(*options, "--resume").result["accuracy"]) == {"random"}


def test_a_link_in_a_run_is_neither_read_nor_written_through(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out, secret = tmp_path / "run", tmp_path / "secret"
    options = ("--data", shapes, "--out", out, "--method", "random", *SMALL, "--no-ceiling")
    assert train(*options).result["accuracy"]
    secret.write_text("mine")
    for name in (
        "pictures/curves.png",
        "report.html.partial",
        "coreset/labels.safetensors.partial",
    ):
        path = out / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
        for arguments in (("report", out), (*options, "--resume")):
            assert (
                f"{path} is a symbolic link, and a run holds plain files" in train(*arguments).error
            )
        path.unlink()
    (out / "pictures" / "curves.png").symlink_to(secret)
    (out / "pictures" / "folder").symlink_to(tmp_path)
    assert train(*options, "--overwrite").result["accuracy"]
    assert secret.read_text() == "mine"


def test_a_file_is_written_beside_a_link_and_not_through_it(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "picture.png"
    secret.write_text("mine")
    (tmp_path / "picture.png.partial").symlink_to(secret)
    durable.replace_file(target, b"ours")
    assert not target.is_symlink()
    assert (target.read_bytes(), secret.read_text()) == (b"ours", "mine")
    (tmp_path / "new").symlink_to(secret)
    with pytest.raises(FileExistsError):
        durable.write_durably(tmp_path / "new", b"ours")
    assert secret.read_text() == "mine"


def test_curves_that_are_removed_during_a_run_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(tmp_path) as record:
        record.open_log()
        record.scalar("loss", 0, 2.0)
        shutil.rmtree(tmp_path / "tensorboard")
        record.scalar("loss", 1, 1.0)
        record.scalar("loss", 2, 0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no more curves for TensorBoard (")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(each).get("value") for each in lines] == [2.0, 1.0, None, 0.5]
    assert not (tmp_path / "tensorboard").exists()


def test_curves_are_what_tensorboard_reads(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    Image.new("RGB", (6, 4)).save(tmp_path / "sheet.png")
    with Report(tmp_path) as record:
        for step, value in enumerate((2.0, 1.0)):
            record.scalar("dace/loss", step, value)
            record.scalar("rded/loss", step, 3 * value)
        record.outcome("dace", {"ipc": 1, "rho": None}, 47.5, tmp_path / "sheet.png")
        record.outcome("rded", {"ipc": 1}, 17.5, tmp_path / "removed.png")
    read = EventAccumulator(str(tmp_path / "tensorboard" / "dace")).Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [(0, 2.0), (1, 1.0)]
    assert [each.value for each in read.Scalars("accuracy")][-1] == 47.5
    (image,) = read.Images("rendered")
    assert (image.width, image.height) == (6, 4)
    assert image.encoded_image_string == (tmp_path / "sheet.png").read_bytes()
    (settings,) = (
        data.session_start_info.hparams
        for content in read.PluginTagToContent("hparams").values()
        if (data := HParamsPluginData.FromString(content)).HasField("session_start_info")
    )
    assert settings["method"].string_value == "dace"
    assert settings["ipc"].number_value == 1
    assert "rho" not in settings
    other = EventAccumulator(str(tmp_path / "tensorboard" / "rded")).Reload()
    assert [each.value for each in other.Scalars("accuracy")] == [17.5]
    assert other.Tags()["images"] == []
    assert [each.value for each in other.Scalars("loss")] == [6.0, 3.0]
