"""Hard-target students of a coreset folder equal those of `train --targets hard`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import runner, write_small_model
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes
from safetensors.torch import load_file

STUDENTS = ("--student", "convnet-d3-w8", "--epochs", "2", "--seeds", "2")
RECIPE = ("--recipe", "rded", *STUDENTS, "--batch", "8", "--student-precision", "bf16")
RUN = (
    *("--backend", "eager", "--no-ceiling", "--seed", "3", "--factor", "2", "--image-size", "32"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "1", "--steps", "2", "--rho", "0.5"),
    *RECIPE,
)
METHODS = ("dace", "rded", "t2i")

Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Run `train student ...`: its result or error; its stderr under "told"."""
    run = runner(capsys)

    def student(*arguments: str | Path) -> dict[str, Any]:
        outcome = run("student", *arguments)
        return {**outcome.told, "told": outcome.err}

    return student


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/, hard/ (a run with hard targets), soft/ (rded's coreset with labels)."""
    folder = tmp_path_factory.mktemp("given")
    write_shapes(folder / "data", train_per_class=5, val_per_class=2)
    write_small_model(folder)
    places = ("--data", str(folder / "data"), "--model", str(folder / "model"), *RUN)
    hard = ("--targets", "hard", "--out", str(folder / "hard"), "--method", *METHODS)
    assert cli.main(["student", *places, *hard]) == 0
    assert cli.main(["labels", *places, "--out", str(folder / "soft"), "--method", "rded"]) == 0
    return folder


def coreset_of(run: Path, method: str) -> Path:
    named = run / f"coreset-{method}"
    return named if named.is_dir() else run / "coreset"


def assert_same_students(given: Path, out: Path, method: str) -> None:
    for seed in (3000, 3001):
        name = f"students/{method}-seed{seed}.safetensors"
        then, now = load_file(given / "hard" / name), load_file(out / name)
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then)


@pytest.mark.parametrize("method", METHODS)
def test_a_coreset_without_labels_gives_the_students_of_hard_targets(
    train: Train, given: Path, tmp_path: Path, method: str
) -> None:
    coreset, out = tmp_path / "alone", tmp_path / "out"
    shutil.copytree(coreset_of(given / "hard", method), coreset)
    assert open_coreset(coreset).soft_labels() is None
    own = {
        "dace": ("--model", given / "model", "--backend", "eager"),
        "t2i": ("--factor", "2"),  # whole images: the views' factor is not stored
    }
    options = ("--coreset", coreset, "--out", out, *RECIPE, *own.get(method, ()))
    result = train(*options, "--data", given / "data")
    assert result["targets"] == "hard"
    assert "targets: hard, the classes alone, as the coreset holds no" in result["told"]
    assert_same_students(given, out, method)
    stage = json.loads((given / "hard" / "stages" / f"student-{method}.json").read_text())
    assert result["students"]["accuracies"] == stage["result"]["accuracies"]


def test_a_coreset_with_labels_may_be_learnt_without_them(
    train: Train, given: Path, tmp_path: Path
) -> None:
    """The recipe is the manifest's; without labels any epochs, batch and cutmix are allowed."""
    coreset, out = given / "soft" / "coreset", tmp_path / "out"
    seeds = ("--coreset", coreset, "--out", out, "--seeds", "2")
    train(*seeds, "--targets", "hard")
    assert_same_students(given, out, "rded")
    assert "--targets = hard, now asked for soft" in train(*seeds)["error"]
    others = ("--targets", "hard", "--epochs", "3", "--batch", "10", "--cutmix", "off")
    result = train("--coreset", coreset, "--out", tmp_path / "others", *others)
    assert [len(losses) for losses in result["students"]["losses"]] == [3, 3, 3]


def test_small_images_are_learnt_by_the_small_recipe(
    train: Train, given: Path, tmp_path: Path
) -> None:
    coreset = coreset_of(given / "hard", "rded")
    result = train("--coreset", coreset, "--out", tmp_path / "out", *STUDENTS, "--seeds", "1")
    assert "recipe: small (Few images" in result["told"]
    config = json.loads((tmp_path / "out" / "stages" / "student.json").read_text())["config"]
    taken = {"--cutmix": False, "--batch": 10, "student.crop_scale": [0.5, 1.0]}
    assert {key: config[key] for key in taken} == taken


@pytest.mark.parametrize(
    ("labels", "method", "options", "told"),
    [
        ("hard", "rded", ["--targets", "soft"], "or train students on the classes alone with"),
        ("hard", "rded", ["--factor", "4"], "have factor 2: leave it out"),
        ("hard", "t2i", ["--factor", "3"], "one whose square divides 4, the images of a class"),
        ("hard", "rded", ["--recipe", "large"], "invalid choice 'large' for argument '--recipe'"),
        ("hard", "rded", ["--batch", "0"], "--batch 0: expected 1 or more"),
        ("soft", "rded", ["--cutmix", "off"], "leave it out, or give --targets hard"),
        ("soft", "rded", ["--recipe", "small"], "leave it out, or give --targets hard"),
        (
            *("soft", "rded", ["--targets", "hard", "--recipe", "small"]),
            "--recipe small: the manifest of",
        ),
        (
            *("soft", "rded", ["--targets", "hard", "--factor", "1"]),
            "holds the recipe of its students, and single options change it: leave it out",
        ),
    ],
)
def test_what_contradicts_the_coreset_is_refused(
    train: Train,
    given: Path,
    tmp_path: Path,
    labels: str,
    method: str,
    options: list[str],
    told: str,
) -> None:
    coreset = coreset_of(given / labels, method)
    assert told in train("--coreset", coreset, "--out", tmp_path / "out", *options)["error"]
    assert not (tmp_path / "out").exists()
