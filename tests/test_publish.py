"""`train publish` and `train check`: numbers that others can check, wherever the folder lies."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_cases import SMALL, Command
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.manifest import seal, spelled
from patchbloom.train import cli
from patchbloom.train.commands import publication

RUN = (*SMALL, "--seeds", "2", "--epochs", "2", "--no-ceiling", "--method")


@pytest.fixture(scope="module")
def runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """soft/ with two methods, and hard/: finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    hard = ("--targets", "hard", "--cutmix", "on", "--batch", "4", "--learning-rate", "0.002")
    for name, more in (("soft", ("random", "rded")), ("hard", ("random", *hard))):
        places = ("--data", str(shapes), "--out", str(folder / name))
        assert cli.main([*places, *RUN, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def published(runs: Path) -> Path:
    """The publication of soft/; read-only."""
    to = runs / "published"
    assert cli.main(["publish", str(runs / "soft"), "--to", str(to), "--data-name", "a|b"]) == 0
    return to


@pytest.fixture
def moved(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "moved here"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and its hash."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(spelled(seal(manifest, manifest["provenance"])))


def test_a_publication_that_was_moved_comes_out_again(
    train: Command, runs: Path, moved: Path, shapes: Path
) -> None:
    told = train("check", moved, "--data", shapes).result
    summary = json.loads((runs / "soft" / "summary.json").read_text())
    for method in ("random", "rded"):
        assert told[method]["now"] == told[method]["published"]
        assert (told[method]["bit_for_bit"], told[method]["agrees"]) == (True, True)
        given = open_coreset(runs / "soft" / ("coreset-rded" if method == "rded" else "coreset"))
        copied = open_coreset(moved / f"coreset-{method}")
        assert copied.content_sha256 == given.content_sha256 == summary["content_sha256"][method]
        assert [*copied.manifest["provenance"]] == [*given.manifest["provenance"]]
    for path in moved.rglob("*"):
        assert path.is_dir() or str(runs.parent).encode() not in path.read_bytes(), path
    made = json.loads((moved / "manifest.json").read_text())["provenance"]["run"]["command"]
    assert "--out soft" in made


def test_hard_targets_come_out_again_too(
    train: Command, runs: Path, shapes: Path, tmp_path: Path
) -> None:
    to, out = tmp_path / "to", tmp_path / "out"
    train("publish", runs / "hard", "--to", to).result  # noqa: B018
    first = train("check", to, "--data", shapes, "--out", out)
    assert first.result["random"]["bit_for_bit"]
    assert train("check", to, "--data", shapes, "--out", out).result == first.result  # resumed
    assert "--out" in train("check", to, "--data", shapes, "--out", to / "out").error


def test_the_card_has_the_numbers_and_guesses_no_licence(published: Path) -> None:
    card = (published / "README.md").read_text()
    manifest = json.loads((published / "manifest.json").read_text())
    command = manifest["provenance"]["published"]["command"]
    assert shlex.split(command)[-1] == "a|b"
    assert command.endswith("'a|b'")  # can be typed again
    mean, std = json.loads((published.parent / "soft" / "summary.json").read_text())["accuracy"][
        "rded"
    ]
    assert f"| rded | {mean:.1f} ± {std:.1f} | - |" in card
    assert "over n = 2 students" in card
    assert "learn soft labels" in card
    assert "on all 20 validation images of a\\|b" in card
    assert "- Data, a\\|b: not stated" in card
    assert "- Generator: none" in card
    assert "train check . --data DIR" in card
    assert manifest["teacher"]["sha256"] in card
    assert manifest["teacher"]["recipe"]["epochs"] == 1
    for picture in (published / "pictures").iterdir():
        assert f"](pictures/{picture.name})" in card
    names = {path.name for path in (published / "pictures").iterdir()}
    assert names == {f"{k}-{m}.png" for k in ("coreset", "rendered") for m in ("random", "rded")}


@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", "README.md", "teacher.safetensors", "pictures/coreset-rded.png"),
        *("coreset-rded/manifest.json", "coreset-rded/labels.safetensors"),
        "coreset-random/patches/disc/000001.png",
    ],
)
def test_a_changed_byte_is_named(train: Command, moved: Path, name: str) -> None:
    path = moved / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert train("check", moved, "--files-only").error.startswith(f"train: error: {path}")
    path.unlink()
    missing = "has no manifest.json: give" if name == "manifest.json" else f"{path} is missing from"
    assert missing in train("check", moved, "--files-only").error


def test_a_file_or_a_coreset_that_was_not_published_is_named(train: Command, moved: Path) -> None:
    (moved / "coreset-rded" / "more.png").write_bytes(b"")
    error = train("check", moved, "--files-only").error
    assert "more.png is not part of this publication" in error
    (moved / "coreset-rded" / "more.png").unlink()
    reseal(moved, lambda m: m["methods"]["rded"].update(m["methods"]["random"]))
    error = train("check", moved, "--files-only").error
    assert "manifest.json: expected coreset-rded with content sha256" in error
    path = moved / "manifest.json"
    path.write_text(path.read_text().replace('"seeds": 2', '"seeds": 3'))  # valid JSON
    assert f"{path} was changed after it was written" in train("check", moved, "--files-only").error


def test_other_images_are_refused(
    train: Command, moved: Path, shapes: Path, tmp_path: Path
) -> None:
    assert "give it, or --files-only" in train("check", moved).error
    assert "found nothing" in train("check", moved, "--data", tmp_path / "none").error
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    images = sorted((data / "val" / "ring").iterdir())
    images[0].rename(images[0].with_name(f"renamed{images[0].suffix}"))
    assert train("check", moved, "--data", data).result["random"]["agrees"]
    shutil.copyfile(images[1], data / "val" / "ring" / f"renamed{images[0].suffix}")
    error = train("check", moved, "--data", data).error
    assert f"--data {data}: expected the published validation images, sha256" in error


def test_an_accuracy_that_does_not_agree_is_refused(
    train: Command, moved: Path, shapes: Path
) -> None:
    options = ("check", moved, "--data", shapes)
    reseal(moved, lambda m: m["methods"]["random"]["students_sha256"].reverse())
    assert "random does not agree" in (error := train(*options).error)
    assert " % published: expected equal bits, as the CPU, its threads and all versions" in error
    reseal(moved, lambda m: m["machine"].update(torch="1.0"))
    outcome = train(*options)
    assert outcome.result["random"]["agrees"] is True
    assert outcome.result["random"]["bit_for_bit"] is False
    assert "the bits may differ, as these do: torch" in outcome.err
    assert "difference +0.00, chance explains" in outcome.result["random"]["told"]
    reseal(moved, lambda m: m["methods"]["random"].update(accuracies=[99.0, 98.0]))
    error = train(*options).error
    assert "% now, 98.50 ± 0.71 % published: difference -" in error
    reseal(moved, lambda m: m["methods"]["random"].update(accuracies=[99.0]))
    assert train(*options).result["random"]["agrees"] is None


def test_means_may_differ_by_what_chance_explains() -> None:
    then, near, far = [50.0, 52.0, 54.0], [52.0, 54.0, 56.0], [59.0, 61.0, 63.0]
    told = "difference +2.00, chance explains 7.50"  # 4.60 · sqrt(4 / 3 + 4 / 3); exactly 4.604
    assert publication.within_chance(near, then) == (True, told)
    assert publication.within_chance(far, then)[0] is False
    assert publication.within_chance(then, far)[0] is False


def test_one_honest_check_in_a_hundred_is_refused() -> None:
    draws = np.random.default_rng(0).normal(50, 2, (4000, 2, 3)).tolist()
    agree = [publication.within_chance(now, then)[0] for now, then in draws]
    assert 0.985 < sum(map(bool, agree)) / len(agree) < 0.995


def test_a_path_with_spaces_keeps_its_last_name_alone() -> None:
    made = {
        "command": "train --data '/home/my name/set' --out=/tmp/runs/a '--model=/my models/b c'",
        "file": "/home/my name/teacher.safetensors",
        "said": "it's 1/2 and http://a.org/b",
    }
    assert publication._without_folders(made) == {
        "command": "train --data 'set' --out=a '--model=b c'",
        "file": "teacher.safetensors",
        "said": "it's 1/2 and http://a.org/b",
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bundles": "/tmp"}, "student.bundles.[key]: expected 'network', "),
        ({"epochs": "two"}, "manifest.json, student, epochs: expected a valid integer"),
    ],
)
def test_a_publication_names_nothing_but_the_students_config(
    train: Command, moved: Path, options: dict[str, Any], told: str
) -> None:
    reseal(moved, lambda m: m["student"].update(options))
    assert told in train("check", moved, "--files-only").error


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(
    train: Command, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    child = os.fork()
    if not child:
        killed = partial(os.kill, os.getpid(), signal.SIGKILL)
        monkeypatch.setattr(publication, "write_card", lambda *_: killed())
        cli.main(["publish", str(runs / "soft"), "--to", str(to)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert "has no manifest.json: give" in train("check", left, "--files-only").error
    train("publish", runs / "soft", "--to", to).result  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_full_disk_is_one_line(
    train: Command, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(publication.shutil, "copyfile", full)
    error = train("publish", runs / "soft", "--to", tmp_path / "to").error
    assert f"no space left for {tmp_path / 'to'}: it needs up to" in error
    assert "choose a --to on another disk" in error
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_published_is_told(train: Command, runs: Path, tmp_path: Path) -> None:
    run, to = Path(shutil.copytree(runs / "soft", tmp_path / "run")), tmp_path / "to"
    give = ("publish", run, "--to", to)
    assert "lies in the run itself" in train("publish", run, "--to", run / "to").error
    assert "expected one or several of random, rded" in train(*give, "--method", "dace").error
    stage = run / "stages" / "student-rded.json"
    done = stage.read_text()
    stage.write_text(done.replace('"state": "done"', '"state": "begun"'))
    assert "is unfinished, its student-rded stage is not done: finish" in train(*give).error
    assert not to.exists()
    train(*give, "--method", "random").result  # noqa: B018
    stage.write_text(done)
    assert "to is not empty: choose another --to, or --overwrite" in train(*give).error
    assert [*train(*give, "--overwrite").result["methods"]] == ["random", "rded"]
    (to / "thesis.tex").write_text("mine")
    assert "thesis.tex is not part of a publication" in train(*give, "--overwrite").error
    teacher = run / "teacher" / "teacher.safetensors"
    teacher.write_bytes((run / "students" / "rded-seed0.safetensors").read_bytes())
    assert "expected the run's teacher, sha256" in train(*give[:-1], tmp_path / "other").error
    shutil.rmtree(run / "coreset-rded")
    assert "its coreset of rded, sha256" in train(*give[:-1], tmp_path / "other").error
    (run / "summary.json").unlink()
    assert "give the folder of a finished run" in train(*give).error


def test_students_that_nobody_can_train_again_are_not_published(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    teacher, run = tmp_path / "t.safetensors", tmp_path / "run"
    options = ("--data", shapes, *RUN, "random")
    train("teacher", *options, "--out", tmp_path / "teacher").result  # noqa: B018
    (tmp_path / "teacher" / "teacher" / "teacher.safetensors").rename(teacher)
    given = (*options, "--out", run, "--teacher", teacher)
    train(*given, "--labels", "online").result  # noqa: B018
    error = train("publish", run, "--to", tmp_path / "to").error
    assert "coreset holds no soft labels, and nobody can train its students again" in error
    train(*given, "--overwrite").result  # noqa: B018
    train("publish", run, "--to", tmp_path / "to").result  # noqa: B018
    assert (tmp_path / "to" / "teacher.safetensors").read_bytes() == teacher.read_bytes()
    teacher.unlink()
    outcome = train("publish", run, "--to", tmp_path / "without")
    assert "teacher: not published, as" in outcome.err
    assert outcome.code == 0
    manifest = json.loads((tmp_path / "without" / "manifest.json").read_text())
    assert manifest["teacher"]["file"] is None
