"""`train --method dsco --dsco.data-free` reads no training image."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import Command, runner, write_small_model
from patchbloom.engine.coreset.coreset import Coreset, open_coreset
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes

OPTIONS = (
    *("--method", "dsco", "--backend", "eager", "--recipe", "small", "--image-size", "32"),
    *("--teacher-epochs", "1", "--student", "convnet-d3-w8", "--epochs", "2", "--seeds", "1"),
    *("--steps", "3", "--dsco.iterations", "4", "--no-ceiling", "--ipc", "2"),
)
FREE = ("--dsco.data-free", "--dsco.templates", "3")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options: a random-weight model, a teacher, and a set with undecodable training images."""
    folder = tmp_path_factory.mktemp("given")
    write_small_model(folder)
    write_shapes(folder / "data", train_per_class=4, val_per_class=2)
    own = ("--data", str(folder / "data"), "--model", str(folder / "model"))
    trained = ("--teacher", "convnet-d3-w8", "--out", str(folder / "trained"))
    assert cli.main(["teacher", *OPTIONS, *own, *trained]) == 0
    for path in folder.glob("data/train/*/*.jpg"):
        path.write_bytes(b"no picture\n")
    return (*own, "--teacher", str(folder / "trained" / "teacher" / "teacher.safetensors"))


@pytest.fixture
def train(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> Command:
    run = runner(capsys)
    return lambda *more: run(*OPTIONS, *given, *more)


def test_images_are_made_of_no_real_one(train: Command, tmp_path: Path) -> None:
    """As many per class as requested, and different from unoptimised ones."""

    def made(name: str, *more: str) -> Coreset:
        result = train("--out", tmp_path / name, *FREE, *more).result
        assert 0 <= result["accuracy"]["dsco"][0] <= 100
        return open_coreset(tmp_path / name / "coreset")

    coreset, plain = made("run"), made("plain", "--dsco.iterations", "0")
    assert coreset.labels_N.bincount().tolist() == [2] * 10
    assert coreset.settings["dsco"]["data_free"]
    images, others = coreset.patches().float(), plain.patches().float()
    assert float((images - others).abs().mean()) > 0.1
    before, after = zip(*coreset.manifest["provenance"]["losses"], strict=True)
    assert all(b > a for b, a in zip(before, after, strict=True))
    assert (tmp_path / "run" / "pictures" / "coreset.png").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), ".jpg: it is not a JPEG, PNG, WebP, BMP or TIFF image"),
        ((*FREE, "--steps", "1"), "--steps 1: expected 2 or more for dsco, which optimises"),
        (("--dsco.data-free", "--dsco.templates", "0"), "--dsco.templates 0: expected 1 or more"),
        ((*FREE, "--dsco.learning-rate", "inf"), "learning-rate inf: expected a finite number"),
        ((*FREE, "--dsco.match-weight", "nan"), "match-weight nan: expected a finite number, 0"),
        (
            (*FREE, "--dsco.learning-rate", "1e30"),
            "in 4 iterations: give a smaller --dsco.learning-rate than 1e+30",
        ),
        (("--data-free",), "Perhaps you meant: --dsco.data-free"),
    ],
)
def test_what_cannot_be_optimised_is_told(
    train: Command, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    assert told in train("--out", tmp_path / "run", *options).error
    assert not (tmp_path / "run" / "coreset").exists()
