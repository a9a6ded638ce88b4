"""Files of --prompts and --class-names: duplicate, unknown and missing entries."""

from __future__ import annotations

from pathlib import Path

import pytest
from patchbloom.engine.data.names import display_names, doubtful_names, doubtful_order
from patchbloom.train import cli
from patchbloom.train.data.shapes import CLASS_NAMES, write_shapes

ALL = "".join(f"{name} a {name}\n" for name in CLASS_NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "s", train_per_class=4, val_per_class=1)


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--prompts", "star a star\nstar a sun\n", "'star' is given twice: keep one of them"),
        (
            *("--prompts", "moon a moon\n"),
            "expected ids of the 10 classes (bars, crescent, cross, …), got 'moon': correct it",
        ),
        ("--prompts", "star\n", "expected a line 'id prompt', got 'star'"),
        ("--prompts", '{"star": ""}', "'star': expected a prompt, got ''"),
        ("--prompts", '{"star": "\\ud800"}', "'star': expected a prompt, got '\\ud800'"),
        ("--class-names", ALL + "star a sun\n", "'star' is named twice: keep one of them"),
        (
            *("--class-names", "".join(ALL.splitlines(keepends=True)[:-1])),
            "a name for each of 10 classes, 1 missing, first 'zigzag': add its id and a name",
        ),
        ("--prompts", None, "no such file"),
        ("--class-names", None, "no such file"),
        # Accepted: a class without its own prompt, and a name of no class.
        ("--prompts", "star a star\n", "unknown model 'nowhere'"),
        ("--class-names", ALL + "moon a moon\n", "unknown model 'nowhere'"),
    ],
)
def test_one_line_says_what_is_wrong_with_the_file(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    text: str | None,
    told: str,
) -> None:
    path = tmp_path / "texts"
    if text is not None:
        path.write_text(text)
    places = ("--data", str(data), "--out", str(tmp_path / "run"), "--model", "nowhere")
    assert cli.main([*places, option, str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert told in error
    assert ("nowhere" in told) or f"train: error: {option} {path}: " in error
    assert not (tmp_path / "run").exists()


def test_doubtful_names_are_told_in_one_line_each() -> None:
    ids = ("00000", "sea-lion", "sea_lion", "sealion")
    names = display_names(ids)
    prompts = tuple(f"A photo of a {name}" for name in names)
    shared, numbers = doubtful_names(ids, names, prompts)
    assert "'sea-lion' and 'sea_lion' share the prompt 'A photo of a sea lion'" in shared
    assert "1 classes have numbers for names, so that the first prompt is" in numbers
    assert "'A photo of a 00000'" in numbers
    assert doubtful_names(("a", "b"), ("crane", "crane"), ("a crane", "a bird")) == []
    assert len(doubtful_names(("a", "b"), ("crane", "crane"), ("a crane", "a crane"))) == 1


def test_folders_of_numbers_in_the_order_of_text_are_told() -> None:
    (warning,) = doubtful_order(("0", "1", "10", "2"))
    assert "class 2 is folder '10', not '2'; pad the numbers with zeros" in warning
    assert doubtful_order(("00", "01", "02", "10")) == []
    assert doubtful_order(("1", "10", "2", "cat")) == []
