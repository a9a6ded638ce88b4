"""Files of --prompts and --class-names: duplicate, unknown and missing entries."""

from __future__ import annotations

from pathlib import Path

import pytest
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
