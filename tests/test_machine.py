"""The machine's compiler and headers, as export/machine.py finds them."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.engine.builds import doctor
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.export.machine import triton_needs
from patchbloom.export.models import Unavailable


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: Any) -> Path:
    """The only program in PATH, called clang; Python.h lies beside it, in include/."""
    program = tmp_path / "clang"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(include)})
    return program


def test_triton_finds_a_compiler_and_pythons_header(compiler: Path, monkeypatch: Any):
    assert triton_needs() is None
    monkeypatch.setenv("CC", str(compiler))
    assert triton_needs() is None
    assert resolve_device("auto") == "cuda"


@pytest.mark.parametrize("cc", [None, "icx", ""])
def test_without_a_compiler_triton_cannot_launch(compiler: Path, monkeypatch: Any, cc: str | None):
    """CC is taken at its word, as Triton takes it."""
    if cc is None:
        compiler.unlink()
    else:
        monkeypatch.setenv("CC", cc)
    names = "gcc or clang" if cc is None else cc
    with pytest.raises(
        Unavailable, match=rf"a C compiler, and {names} is not here: apt-get .* gcc"
    ):
        resolve_device("auto")
    assert resolve_device("cpu") == "cpu"


def test_without_pythons_header_triton_cannot_launch(
    compiler: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
):
    (tmp_path / "include" / "Python.h").unlink()
    with pytest.raises(Unavailable, match=r"Python\.h, and it is not in .*include: apt-get .*-dev"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.show_examination(doctor.examine(tmp_path))
    assert "for Triton: Python.h, and it is not in" in capsys.readouterr().out
