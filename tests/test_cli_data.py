"""Guards what `train` says of the images that it is given: too few, damaged, of other classes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_cases import SMALL, Command
from patchbloom.engine.cli import main as engine
from patchbloom.export.bundle import default_bundles_folder
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.prior.model import new_parts, save_parts


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def test_no_such_folder(train: Command, tmp_path: Path) -> None:
    error = train("--data", tmp_path / "nowhere", "--out", tmp_path / "run").error
    assert f"data folder {tmp_path / 'nowhere'}: found nothing; give an existing folder" in error
    assert not (tmp_path / "run").exists()


def test_no_images(train: Command, data: Path, tmp_path: Path) -> None:
    for path in data.glob("train/*/*.jpg"):
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"{data / 'train'}: no images in it" in error


def test_no_validation_split(train: Command, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "val")
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"{data}: no val/ or test/ folder in it" in error


def test_validation_classes_that_differ(train: Command, data: Path, tmp_path: Path) -> None:
    (data / "val" / "star").rename(data / "val" / "moon")
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"only in {data / 'train'}: star; only in {data / 'val'}: moon" in error


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images(train: Command, data: Path, tmp_path: Path, split: str) -> None:
    for path in (data / split / "star").iterdir():
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run", "--method", "random").error
    assert f"{data / split}: no images in class folder star; add images" in error
    assert "or remove the folder" in error
    assert not (tmp_path / "run").exists()


def test_a_class_with_fewer_images_than_patches_are_needed(
    train: Command, data: Path, tmp_path: Path
) -> None:
    for path in sorted((data / "train" / "star").iterdir())[3:]:
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run", "--method", "rded").error
    assert "class 'star' has 3 training images, but ipc · factor² = 4 patches are wanted" in error
    assert "give a smaller --ipc or --factor, or more images" in error


def test_an_ipc_that_a_class_has_no_images_for(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--method", "random", "--ipc", "2", "--factor", "2")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "has 6 training images, but ipc · factor² = 8 patches are wanted" in error
    assert not (tmp_path / "run").exists()


def test_more_doping_than_a_class_has_images(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = ("--method", "random", "--factor", "1", "--dope", "7")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "has 6 training images, but --dope 7 asks for more: give a smaller one" in error


def test_a_class_of_one_image(train: Command, data: Path, tmp_path: Path) -> None:
    """It is enough for one patch, also where dace would mix it with another of its class."""
    for path in sorted((data / "train" / "star").iterdir())[1:]:
        path.unlink()
    save_parts(new_parts(32, tmp_path / "tokenizer"), tmp_path / "model")
    model = ("--model", tmp_path / "model", "--backend", "eager", "--steps", "2", "--rho", "0.5")
    options = ("--data", data, "--method", "dace", "random", *model, *SMALL, "--no-ceiling")
    error = train(*options, "--out", tmp_path / "two", "--factor", "2").error
    assert "class 'star' has 1 training images, but ipc · factor² = 4 patches are wanted" in error
    result = train("student", *options, "--out", tmp_path / "one", "--factor", "1").result
    for method in ("dace", "random"):
        assert np.isfinite(result["students"][method]["losses"]).all()
    patches = tmp_path / "one" / "coreset" / "patches"
    assert [path.name for path in (patches / "star").iterdir()] == ["000000.png"]


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_an_image_that_cannot_be_decoded_is_named(
    train: Command, data: Path, tmp_path: Path, damage: str
) -> None:
    path = sorted((data / "train" / "star").iterdir())[2]
    path.write_bytes(path.read_bytes()[:700] if damage == "cut" else b"this is no picture\n")
    options = ("--method", "rded", *SMALL)
    error = train("coreset", "--data", data, "--out", tmp_path / "run", *options).error
    assert str(path) in error
    assert "--skip-corrupt" in error


def test_one_corrupt_jpeg_among_a_thousand(train: Command, tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", train_per_class=100, val_per_class=1)
    path = sorted((data / "train" / "star").iterdir())[41]
    path.write_bytes(path.read_bytes()[:700])
    options = ("coreset", "--data", data, "--method", "rded", *SMALL)
    error = train(*options, "--out", tmp_path / "run").error
    assert f"cannot decode {path}" in error
    outcome = train(*options, "--out", tmp_path / "run2", "--skip-corrupt")
    assert outcome.result["skipped_images"] == {"train": 1, "val": 0}
    assert outcome.err.count("skipped, it cannot be decoded") == 1
    manifest = json.loads((tmp_path / "run2" / "coreset" / "manifest.json").read_text())
    used = {patch["image"] for patch in manifest["provenance"]["patches"]}
    assert len(used) == 40
    assert f"star/{path.name}" not in used


def test_skip_corrupt_goes_on_and_counts(train: Command, data: Path, tmp_path: Path) -> None:
    damaged = [sorted((data / "train" / name).iterdir())[0] for name in ("star", "disc")]
    damaged.append(next((data / "val" / "ring").iterdir()))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:700])
    options = ("--skip-corrupt", "--method", "rded", *SMALL)
    outcome = train("coreset", "--data", data, "--out", tmp_path / "run", *options)
    assert outcome.result["skipped_images"] == {"train": 2, "val": 1}
    for path in damaged:
        assert f"skipped, it cannot be decoded: {path}" in outcome.err
    path = sorted((data / "train" / "star").iterdir())[1]
    path.write_bytes(b"")
    path.with_name("00002.jpg").write_bytes(b"")
    error = train("coreset", "--data", data, "--out", tmp_path / "again", *options).error
    assert "class 'star' has 3 training images, but ipc · factor² = 4 patches are wanted" in error


def test_the_generated_set_is_written_once(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("--data", "shapes", "--shapes-per-class", "5", "--method", "random", *SMALL)
    first = train("coreset", *options, "--out", tmp_path / "a")
    assert "writing the generated set" in first.err
    again = train("coreset", *options, "--out", tmp_path / "b")
    assert "writing the generated set" not in again.err
    names = [o.result["coresets"]["random"]["content_sha256"] for o in (first, again)]
    assert names[0] == names[1]
    (folder,) = (tmp_path / "cache" / "patchbloom").iterdir()
    assert len(list(folder.glob("train/*/*.jpg"))) == 50
    assert len(list(folder.glob("val/*/*.jpg"))) == 10


def test_a_user_without_a_home_is_told_what_to_set(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As in a container that runs under a number without a passwd entry."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    error = train("--data", "shapes", "--out", tmp_path / "run").error
    assert engine(["list"]) == 2
    for told in (error, capsys.readouterr().err):
        assert "HOME is not set, and user 2147483639 has none" in told
        assert "set XDG_CACHE_HOME to a folder that you may write to" in told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_bundles_folder() == tmp_path / "patchbloom" / "bundles"


def test_a_home_that_cannot_be_written_is_told(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    error = train("--data", "shapes", "--out", tmp_path / "run").error
    assert "the generated set cannot be written to /proc/.cache/patchbloom/shapes-" in error
    assert "set XDG_CACHE_HOME to a folder that you may write to" in error
    assert "Errno" not in error
    assert default_bundles_folder() == Path("/proc/.cache/patchbloom/bundles")
