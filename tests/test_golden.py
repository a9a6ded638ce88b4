"""Holds what is written against tests/golden, which an earlier version wrote (golden_cases.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_cases import one_thread
from golden_cases import RUNS, describes, frozen, prior, run_all, run_of, stages


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden run, made anew."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all()
    return folder


def plain(value: Any) -> Any:
    """As it is read from JSON."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "compute"), [("describes", describes), ("stages", stages), ("prior", prior)]
)
def test_what_is_said_is_what_was_said(name: str, compute: Any) -> None:
    assert plain(compute()) == frozen(name)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_what_it_wrote(made: Path, name: str) -> None:
    now, before = plain(run_of(made / name)), frozen("runs")[name]
    assert now["names"] == before["names"]
    assert now["scalars"] == before["scalars"]
    for file, content in before["contents"].items():
        assert now["contents"][file] == content, file
    assert now["contents"].keys() == before["contents"].keys()
