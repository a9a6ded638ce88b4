"""How a command ends, and what a terminal gets of names from folders and manifests."""

from __future__ import annotations

import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from patchbloom.engine.console import print_fields, print_table, run_command
from patchbloom.export.terminal import say, visible

HOSTILE = "cat\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\udcff\nline"


@pytest.mark.parametrize(
    "show",
    [
        lambda: print_fields({"classes": {"a": HOSTILE, HOSTILE: "b"}, "name": HOSTILE}),
        lambda: print_table([["class", "n"], [HOSTILE, "1"]]),
        lambda: say(f"engine: error: {HOSTILE}"),
    ],
    ids=["fields", "table", "error"],
)
def test_names_do_not_reach_a_terminal_as_commands(
    show, capsys: pytest.CaptureFixture[str]
) -> None:
    show()
    told = "".join(capsys.readouterr())
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egpj\\udcff\\nline" in told
    assert told.replace("\n", "").isprintable()


def test_fields_have_units(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [2.5 / (1 + epoch) for epoch in range(9)]
    teacher = {"accuracy": 97.05, "losses": losses, "size_px": 64, "views": {"crop": [0.5, 1.0]}}
    sizes = {"labels": 80_080, "generator": 9_961_472}
    print_fields({"patches": 40, "bytes": sizes, "teacher": teacher, "model": None})
    assert capsys.readouterr().out.splitlines() == [
        "patches         40 images",
        "bytes           labels: 78.2 KiB",
        "                generator: 9.5 MiB",
        "teacher         accuracy: 97.05 %",
        "                losses: 2.5 … 0.277778 (9)",
        "                size_px: 64 px",
        "                views.crop: 0.5, 1",
        "model           -",
    ]


def refuse(_: object) -> None:
    raise ValueError(HOSTILE)


def test_no_process_prints_an_error_with_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Under torchrun another function prints it."""
    told: list[str] = []
    assert run_command("train", {}, ["x"], refuse, lambda _: {}, told.append) == 2
    assert "\\x1b]0;owned" in told[0]
    assert told[0].isprintable()


def test_what_is_printable_stays() -> None:
    assert visible("café, 北京 'a\\b' 🦊") == "café, 北京 'a\\b' 🦊"


def compile_big(folder: Path) -> None:
    """As torch runs g++: 200 KB of assembly are among its temporary files."""
    from torch._inductor.exc import CppCompileError

    (folder / "big.cpp").write_text(f"extern const int x[] = {{{'1,' * 40_000}}};")
    command = ["g++", "-c", "big.cpp", "-o", "big.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CppCompileError(command, done.stderr)


def unpack_big(folder: Path) -> None:
    """As older versions of torch open every engine of the inductor backend."""
    import torch

    with zipfile.ZipFile(folder / "big.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/data/aotinductor/model/x.cpp", bytes(400_000))
    torch._inductor.aoti_load_package(str(folder / "big.pt2"), run_single_threaded=True)


def fill_a_file(_: Path) -> None:
    """As torch passes on an error of Python's."""
    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
    except OSError as error:
        raise RuntimeError(f"OSError: {error}\n\nSet TORCHDYNAMO_VERBOSE=1 for more") from error


def outcome(work: Callable[[Path], None], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    code = run_command("engine", {}, ["x"], lambda _: folder, lambda folder: {"told": work(folder)})
    assert code == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("work", [compile_big, unpack_big, fill_a_file])
def test_a_full_temporary_folder_is_told(
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    work: Callable[[Path], None],
) -> None:
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    (small_disk / "full").write_bytes(bytes(100_000))
    told = outcome(work, tmp_path, capfd)
    assert told.startswith("engine: error: temporary files cannot be written (")
    assert told.endswith("free some space there, or choose another folder with TMPDIR")
    assert len(told) < 500


def test_a_temporary_folder_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    told = outcome(unpack_big, tmp_path, capfd)
    assert "(Error generating temporary directory: No such file or directory)" in told
    assert told.endswith("choose another folder with TMPDIR")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
        told = outcome(lambda _: tempfile.TemporaryFile().close(), tmp_path, capfd)
    assert "No usable temporary directory found in" in told
    assert told.endswith("choose another folder with TMPDIR")


def test_another_error_of_a_library_keeps_its_traceback(tmp_path: Path) -> None:
    def fail(_: Path) -> dict[str, object]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_command("engine", {}, ["x"], lambda _: tmp_path, fail)
