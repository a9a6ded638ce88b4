"""One undecodable file among a thousand JPEGs: refused by name, or left out on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_cases import Command, runner
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.train import cli
from PIL import Image

CLASSES, EACH = 10, 100
BAD = "c4/041.jpg"
OPTIONS = (
    *("--method", "rded", "random", "--recipe", "small", "--image-size", "32", "--factor", "2"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "2", "--student", "convnet-d3-w8"),
    *("--epochs", "1", "--seeds", "1", "--no-ceiling"),
)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `train STAGE ...` in this process; an empty STAGE is the whole job."""
    run = runner(capsys)
    return lambda stage, *more: run(*([stage] if stage else []), *OPTIONS, *more)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/: 999 JPEGs of 32 px, none at BAD; run/: their coresets."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    for split, each in (("train", EACH), ("val", 2)):
        for label in range(CLASSES):
            of_class = folder / "data" / split / f"c{label}"
            of_class.mkdir(parents=True)
            colour = np.array([20 * label, 200 - 15 * label, 90])
            for n in range(each):
                pixels = colour + rng.integers(0, 55, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(of_class / f"{n:03}.jpg")
    (folder / "data" / "train" / BAD).unlink()
    places = ("--data", str(folder / "data"), "--out", str(folder / "run"))
    assert cli.main(["coreset", *places, *OPTIONS]) == 0
    return folder


@pytest.fixture(params=["cut", "text"])
def thousand(request: pytest.FixtureRequest, others: Path, tmp_path: Path) -> Path:
    """The 999 and, at BAD, a truncated JPEG or a text."""
    data = tmp_path / "data"
    shutil.copytree(others / "data", data)
    whole = (data / "train" / BAD).with_name("040.jpg").read_bytes()
    (data / "train" / BAD).write_bytes(whole[:700] if request.param == "cut" else b"no picture\n")
    assert len(list(data.glob("train/*/*.jpg"))) == CLASSES * EACH
    return data


def names(run: Path) -> list[str]:
    folders = (run / "coreset", run / "coreset-random")
    return [open_coreset(folder).content_sha256 for folder in folders]


REFUSED = "was run with images that --skip-corrupt leaves out: start again with --overwrite"


def test_a_run_that_stopped_at_it_starts_again_without_it(
    train: Command, others: Path, thousand: Path, tmp_path: Path
) -> None:
    bad, out = thousand / "train" / BAD, tmp_path / "run"
    given = ("--data", thousand, "--out", out)
    error = train("coreset", *given).error
    assert f"cannot decode {bad}: " in error
    assert error.endswith("replace or remove the file, or leave such files out with --skip-corrupt")
    assert train("coreset", *given).error == error
    assert (
        f"the teacher stage of {out} {REFUSED}" in train("coreset", *given, "--skip-corrupt").error
    )
    assert (
        f"the teacher stage of {out} {REFUSED}"
        in train("", *given, "--skip-corrupt", "--resume").error
    )
    assert train("coreset", *given).error == error
    outcome = train("coreset", *given, "--skip-corrupt", "--overwrite")
    assert outcome.result["skipped_images"] == {"train": 1, "val": 0}
    assert outcome.err.count(f"skipped, it cannot be decoded: {bad}") == 1
    manifest = json.loads((out / "coreset" / "manifest.json").read_text())
    assert manifest["provenance"]["skipped_images"] == [BAD]
    assert names(out) == names(others / "run")
    result = train("", *given, "--skip-corrupt", "--resume").result
    assert result["skipped_images"] == {"train": 1, "val": 0}
    assert set(result["accuracy"]) == {"rded", "random"}
    assert min(result["images_per_s"].values()) > 0


@pytest.mark.parametrize("thousand", ["text"], indirect=True)
def test_scoring_stops_at_it(train: Command, others: Path, thousand: Path, tmp_path: Path) -> None:
    """With a provided teacher, no training image is decoded before patches are scored."""
    out, teacher = tmp_path / "run", others / "run" / "teacher" / "teacher.safetensors"
    given = ("coreset", "--data", thousand, "--out", out, "--teacher", teacher)
    assert f"cannot decode {thousand / 'train' / BAD}: " in train(*given).error
    told = {path.stem: json.loads(path.read_text()) for path in (out / "stages").iterdir()}
    states = {name: stage["state"] for name, stage in told.items()}
    assert states == {"teacher": "done", "coreset": "begun"}
    assert not list(out.glob("*coreset*"))
    assert REFUSED in train(*given, "--skip-corrupt").error
    result = train(*given, "--skip-corrupt", "--overwrite").result
    assert result["skipped_images"] == {"train": 1, "val": 0}
    assert names(out) == names(others / "run")


def test_a_teacher_of_images_that_are_left_out_later_is_not_taken_over(
    train: Command, others: Path, tmp_path: Path
) -> None:
    data, run = (shutil.copytree(others / name, tmp_path / name) for name in ("data", "run"))
    path = data / "train" / "c4" / "040.jpg"
    path.write_bytes(bytes(path.stat().st_size))  # its name and size are the same
    given = ("coreset", "--data", data, "--out", run, "--skip-corrupt")
    assert "1 have other content (train/c4/040.jpg)" in train(*given).error
    (run / "images.safetensors").unlink()  # as in a run of a version that knew no contents
    assert f"the teacher stage of {run} {REFUSED}" in train(*given).error
    assert names(run) == names(others / "run")
