"""Errors of `train` about its images: too few, damaged, of other classes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_cases import SMALL, Command
from patchbloom.engine.cli import main as engine
from patchbloom.export.bundle import default_bundles_folder
from patchbloom.export.durable import file_sha256
from patchbloom.train.data import folder
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.prior.model import new_parts, save_parts


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the set, to damage."""
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
    """Enough for one patch, even for dace, which mixes images of a class."""
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


def test_files_that_are_passed_over_are_counted(train: Command, data: Path, tmp_path: Path) -> None:
    for path in sorted((data / "train" / "star").iterdir())[1:]:
        path.rename(path.with_suffix(".gif"))
    (data / "val" / "loose.jpg").write_bytes(b"")
    options = ("teacher", "--data", data, "--out", tmp_path / "run", "--method", "random", *SMALL)
    told = train(*options, "--factor", "1")
    assert told.result["teacher"]["sha256"]
    assert f"warning: {data / 'train'}: 5 of 60 files passed over (expected <class>/" in told.err
    assert ".webp): star/00001.gif, star/00002.gif, star/00003.gif, star/00004.gif" in told.err
    assert f"{data / 'val'}: 1 of 21 files passed over" in told.err
    assert told.err.count("passed over") == 2


def test_what_is_no_file_is_skipped_with_the_corrupt(
    train: Command, data: Path, tmp_path: Path
) -> None:
    stars = sorted((data / "train" / "star").iterdir())
    for path in stars[:3]:
        path.unlink()
    stars[0].symlink_to("nowhere.jpg")
    os.mkfifo(stars[1])
    stars[2].symlink_to(stars[2].name)
    out = tmp_path / "run"
    options = ("coreset", "--data", data, "--method", "rded", "--factor", "1", *SMALL)
    error = train(*options, "--out", tmp_path / "other").error
    assert f"cannot decode {stars[0].parent}/0000" in error  # whichever comes first
    assert ": it is " in error
    assert "or leave such files out with --skip-corrupt" in error
    told = train(*options, "--out", out, "--skip-corrupt")
    assert told.result["skipped_images"] == {"train": 3, "val": 0}
    for path in stars[:3]:
        assert f"skipped, it cannot be decoded: {path}" in told.err
    again = train(*options, "--out", out, "--skip-corrupt").result
    assert again["coresets"] == told.result["coresets"]


def test_names_that_are_not_utf_8_come_through_a_whole_run(
    train: Command, data: Path, tmp_path: Path
) -> None:
    image = data / "train" / "star" / "00001.jpg"
    image.rename(image.with_name(os.fsdecode(b"\xe9t\xe9.jpg")))
    moved = data.rename(tmp_path / os.fsdecode(b"donn\xe9es"))
    for name in ("train", "val"):
        os.rename(moved / name / "disc", moved / name / "caf\u00e9")
    os.rename(moved / "val" / "caf\u00e9", moved / "val" / "cafe\u0301")
    options = ("--data", moved, "--method", "random", "--no-ceiling", *SMALL)
    told = train(*options, "--out", tmp_path / "run")
    assert set(told.result["accuracy"]) == {"random"}
    assert "donn\\udce9es" in (tmp_path / "run" / "report.html").read_text()
    again = train(*options, "--out", tmp_path / "run", "--resume")
    assert again.result["content_sha256"] == told.result["content_sha256"]


def test_a_locale_without_utf_8_ends_nothing_in_a_traceback(
    train: Command, data: Path, tmp_path: Path
) -> None:
    """Help and names are printed escaped; one line reports a name that the locale cannot spell."""
    plain = shutil.copytree(data, tmp_path / "donn\u00e9es")
    for split in ("train", "val"):
        (data / split / "disc").rename(data / split / "caf\u00e9")
    out, coreset = tmp_path / "run", tmp_path / "run" / "coreset"
    options = ("--method", "random", "--no-ceiling", *SMALL)
    train("--data", data, "--out", out, *options).result  # noqa: B018
    steps = [f"--{phase}-steps=1" for phase in ("vae", "unet", "guidance", "few-step")]
    widths = ("--vae-width=8", "--width=32", "--image-size=32")
    commands = [
        ("train", "--help"),
        ("engine", "--help"),
        ("engine", "coreset", "info", coreset),
        ("engine", "coreset", "verify", coreset),
        ("train", "report", out),
        ("train", "student", "--coreset", coreset, "--out", tmp_path / "students"),
        ("train", "--data", data, "--out", tmp_path / "second", *options),
        ("train", "--data", plain, "--out", tmp_path / "third", *options),
        ("train", "prior", "--data", plain, "--out", tmp_path / "model", *steps, *widths),
    ]
    script = (
        "import json, os, sys\n"
        "from patchbloom.engine.cli import main as engine\n"
        "from patchbloom.train.cli import main as train\n"
        "for program, *words in json.load(sys.stdin):\n"
        "    words = [os.fsdecode(word.encode()) for word in words]\n"
        "    try:\n"
        "        code = {'engine': engine, 'train': train}[program](words)\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "    print('code', code)\n"
    )
    locale = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    words = json.dumps([[str(word) for word in command] for command in commands])
    ended = subprocess.run(
        [sys.executable, "-c", script], input=words, env=locale, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    codes = [int(line[5:]) for line in ended.stdout.splitlines() if line.startswith("code ")]
    assert codes == [0, 0, 0, 2, 0, 2, 2, 0, 0], ended.stderr
    assert ": bars, caf\\xe9, crescent, " in ended.stdout
    missing = "caf\\xe9/000000.png is missing from the coreset: its name may have no spelling in"
    assert ended.stderr.count(f"{missing} ascii: set LC_ALL=C.UTF-8") == 2
    assert "expected names of class folders in ASCII, the encoding of this locale" in ended.stderr


def test_folders_of_numbers_are_told(train: Command, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, path in enumerate(sorted((data / split).iterdir()), 1):
            path.rename(path.with_name(str(number)))
    given = ("teacher", "--data", data, *SMALL, "--model", "sdxl-tiny", "--backend", "eager")
    told = train(*given, "--out", tmp_path / "run").err
    assert told.count("class 1 is folder '10', not '2'") == 1
    assert "10 classes have numbers for names, so that the first prompt is" in told


def padded(path: Path, size: int) -> bytes:
    """The image, with zeros after its end up to `size` bytes."""
    return path.read_bytes().ljust(size, b"\0")


def test_images_that_changed_under_their_names_and_sizes_are_told_at_a_resume(
    train: Command, data: Path, tmp_path: Path
) -> None:
    star, disc = data / "train" / "star" / "00001.jpg", data / "train" / "disc" / "00002.jpg"
    dark = data / "val" / "ring" / "00000.jpg"
    for path in (star, disc):
        path.write_bytes(padded(path, 6000))
    options = ("teacher", "--data", data, "--out", tmp_path / "run", "--method", "random", *SMALL)
    train(*options).result  # noqa: B018
    bright = dark.read_bytes()
    star.rename(data / "x")
    disc.rename(star)
    (data / "x").rename(disc)
    dark.write_bytes(bytes(len(bright)))
    error = train(*options).error
    assert f"the images have changed since {tmp_path / 'run'} was begun: " in error
    assert "3 have other content (train/disc/00002.jpg, train/star/00001.jpg, val/ring" in error
    assert "give the same images, or start again with --overwrite" in error
    assert train(*options).error == error  # the record is still of the first images
    added = star.with_name("more.jpg")
    added.write_bytes(bright)
    disc.unlink()
    error = train(*options).error
    assert "1 were added (train/star/more.jpg); 1 are gone (train/disc/00002.jpg): give" in error


def test_the_same_images_elsewhere_are_read_once_and_go_on(
    train: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(folder, "file_sha256", counted)
    options = ("teacher", "--out", tmp_path / "run", "--method", "random", *SMALL)
    first = train(*options, "--data", data).result
    assert len(read) == 80
    assert train(*options, "--data", data).result == first
    assert len(read) == 80
    shutil.copytree(data, tmp_path / "moved")
    for _ in range(2):
        assert train(*options, "--data", tmp_path / "moved").result == first
        assert len(read) == 160


def test_a_run_of_a_version_without_a_record_goes_on(
    train: Command, data: Path, tmp_path: Path
) -> None:
    options = ("teacher", "--data", data, "--out", tmp_path / "run", "--method", "random", *SMALL)
    first, record = train(*options).result, tmp_path / "run" / "images.safetensors"
    written = record.read_bytes()
    record.unlink()
    assert train(*options).result == first
    assert record.read_bytes() == written
    record.write_bytes(written[:-9])
    assert f"{record} is damaged: remove it" in train(*options).error
    assert train(*options, "--overwrite").result == first


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
    (written,) = (tmp_path / "cache" / "patchbloom").iterdir()
    assert len(list(written.glob("train/*/*.jpg"))) == 50
    assert len(list(written.glob("val/*/*.jpg"))) == 10


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


@pytest.mark.parametrize(
    "line",
    [
        "train --data ~/d --out OUT",
        "train --data DATA --model ~/m --out OUT",
        "train --data DATA --prompts ~/p --out OUT",
        "train --data DATA --teacher ~/t.safetensors --out OUT",
        "train --data DATA --bundles ~/b --out OUT",
        "train student --coreset ~/c --out OUT",
        "train verify --coreset ~/c --teacher t",
        "train prior --data ~/d --out OUT",
        "train --data ~no-such-user/d --out OUT",
        "engine build --backend ort --model ~/m",
        "engine list --bundles ~/b",
        "engine list --bundles ~no-such-user/b",
    ],
)
def test_a_path_in_an_unknown_home_is_refused(
    train: Command,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    places = {"OUT": str(tmp_path / "run"), "DATA": str(shapes)}
    program, *arguments = (places.get(word, word) for word in line.split())
    if program == "engine":
        assert engine(arguments) == 2
        told = capsys.readouterr().err.rstrip().splitlines()[-1]
    else:
        told = train(*arguments).error
    assert "a path begins with ~ for a home folder that is unknown" in told
    assert told.endswith("write the whole path")
    assert not (tmp_path / "run").exists()


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
