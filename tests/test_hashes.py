"""Hashes of large files: remembered while a file is the same, never longer, and only if asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import KEY, fill
from cli_cases import SMALL, Command
from patchbloom.engine import cli as engine
from patchbloom.export import hashes
from patchbloom.export.bundle import BundleError, find_or_build, open_bundle
from patchbloom.export.durable import take_lock
from patchbloom.export.hashes import known_sha256
from patchbloom.export.models import TINY_FOLDER, find_model, weights_sha256

MIB = 1 << 20
TICK_NS = hashes._TICK_NS


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """hashes.json of this test; files that were just written count as old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_TICK_NS", -1)
    monkeypatch.setattr(hashes, "_hashed", {})
    monkeypatch.setattr(hashes, "_trusts_others", True)
    return tmp_path / "cache" / "patchbloom" / "hashes.json"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file whose bytes are read for their hash."""
    paths: list[Path] = []
    hashed = hashes._hash

    def hash_file(path: Path, file: Any) -> str:
        paths.append(path)
        return hashed(path, file)

    monkeypatch.setattr(hashes, "_hash", hash_file)
    return paths


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * MIB))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path) -> None:
    """Flip one byte in place, and restore the times that can be restored."""
    before = path.stat()
    with path.open("r+b") as file:
        (byte,) = file.read(1)
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock has moved
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lie(stored: Path, path: Path, sha256: str) -> None:
    """Store a hash under the stamp that the file has now, as if a disk had changed it since."""
    status = path.stat()
    stamp = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps({str(path.resolve()): {"stamp": stamp, "sha256": sha256}}))


def start_again() -> None:
    """As a new process."""
    hashes._hashed.clear()


def test_a_large_file_is_read_once_under_any_name(
    stored: Path, read: list[Path], large: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(large)
    for path in (large, large, link):
        assert known_sha256(path) == sha256(large)
        start_again()
    assert read == [large]
    small = tmp_path / "small"
    small.write_bytes(b"small")
    assert known_sha256(small) == sha256(small)
    assert list(json.loads(stored.read_text())) == [str(large)]


def swap(path: Path) -> None:
    """Move another file of the same size and modification time to its place."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(os.urandom(status.st_size))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [flip, swap, append])
@pytest.mark.parametrize("process", ["same", "new"])
def test_a_changed_file_is_read_again(
    stored: Path, read: list[Path], large: Path, change: Callable[[Path], None], process: str
) -> None:
    before = known_sha256(large)
    change(large)
    if process == "new":
        start_again()
    assert before != known_sha256(large) == sha256(large)
    start_again()
    assert known_sha256(large) == sha256(large)
    assert read == [large, large]


def test_a_file_of_this_moment_is_not_remembered(
    stored: Path, read: list[Path], large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may get the same times from the file system's clock."""
    monkeypatch.setattr(hashes, "_TICK_NS", TICK_NS)
    for _ in range(2):
        large.write_bytes(os.urandom(2 * MIB))
        assert known_sha256(large) == sha256(large)
    assert not hashes._hashed
    assert not stored.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    stored: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = hashes._hash

    def hash_file(path: Path, file: Any) -> str:
        found = hashed(path, file)
        flip(path)
        return found

    monkeypatch.setattr(hashes, "_hash", hash_file)
    known_sha256(large)
    assert not hashes._hashed
    assert not stored.exists()


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"LARGE": 7}', '{"LARGE": {"stamp": STAMP, "sha256": 7}}', "[" * 9999, "\xff"],
)
def test_a_damaged_memory_is_replaced(
    stored: Path, read: list[Path], large: Path, damage: str
) -> None:
    known_sha256(large)
    (entry,) = json.loads(stored.read_text()).values()
    whole = stored.read_bytes()
    damage = damage.replace("LARGE", str(large)).replace("STAMP", str(entry["stamp"]))
    stored.write_bytes(damage.encode("latin-1"))
    start_again()
    assert known_sha256(large) == sha256(large)
    assert read == [large, large]
    assert stored.read_bytes() == whole


@pytest.mark.parametrize("fault", ["read-only", "no home", "a file", "a folder"])
def test_without_a_memory_a_process_hashes_once(
    stored: Path, read: list[Path], large: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    elif fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    elif fault == "a file":
        stored.parent.parent.write_bytes(b"")
    else:
        stored.mkdir(parents=True)
    for _ in range(2):
        assert known_sha256(large) == sha256(large)
    assert read == [large]
    start_again()
    assert known_sha256(large) == sha256(large)


def test_a_full_disk_costs_only_time(
    stored: Path, read: list[Path], large: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    known_sha256(large)
    whole = (small_disk / "patchbloom" / "hashes.json").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(MIB))
    flip(large)
    assert known_sha256(large) == known_sha256(large) == sha256(large)
    assert read == [large, large]
    assert (small_disk / "patchbloom" / "hashes.json").read_bytes() == whole


def test_a_busy_memory_is_waited_for_by_nobody(stored: Path, large: Path, tmp_path: Path) -> None:
    stored.parent.mkdir(parents=True)
    lock = take_lock(stored.with_suffix(".lock"))
    assert known_sha256(large) == sha256(large)
    assert not stored.exists()
    lock.release()
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB))
    known_sha256(other)
    assert set(json.loads(stored.read_text())) == {str(large), str(other)}


def test_what_is_gone_is_dropped_and_others_hashes_stay(
    stored: Path, large: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(bytes(MIB))
        known_sha256(path)
        start_again()
    paths[0].unlink()
    known_sha256(large)
    assert set(json.loads(stored.read_text())) == {str(path) for path in (*paths[1:], large)}


def test_long_hashing_tells_how_far_it_is(
    stored: Path, large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hashes, "_PATIENCE_S", -1)
    monkeypatch.setattr(hashes, "_CHUNK_BYTES", MIB)
    for _ in range(2):
        known_sha256(large)
    name = f"{large.parent.name}/large"
    told = [f"hashing {name}: {percent} % of 2,097,152 bytes" for percent in (50, 100)]
    assert capsys.readouterr().err.splitlines() == told


def test_forgotten_hashes_are_taken_again_and_replaced(
    stored: Path, read: list[Path], large: Path
) -> None:
    lie(stored, large, "0" * 64)
    assert known_sha256(large) == "0" * 64
    for times in (1, 2):
        hashes.forget_hashes()
        for _ in range(2):
            assert known_sha256(large) == sha256(large)
        assert read == [large] * times
    assert json.loads(stored.read_text())[str(large)]["sha256"] == sha256(large)


def fill_large(folder: Path) -> dict[str, Any]:
    (folder / "weights.bin").write_bytes(bytes(3 * MIB))
    return fill(folder)


def test_a_bundle_is_hashed_at_its_first_opening(
    stored: Path, read: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = find_or_build(tmp_path / "bundles", KEY, fill_large).folder
    read.clear()
    for _ in range(3):
        find_or_build(tmp_path / "bundles", KEY, fill_large)
        start_again()
    weights = folder / "weights.bin"
    assert read.count(weights) == 1

    true = sha256(weights)
    flip(weights)
    with pytest.raises(BundleError, match=r"weights\.bin was changed after the build"):
        open_bundle(folder)
    lie(stored, weights, true)
    start_again()
    assert open_bundle(folder)
    capsys.readouterr()
    assert engine.main(["verify", "--bundles", str(tmp_path / "bundles")]) == 2
    assert "weights.bin was changed after the build" in capsys.readouterr().err


def test_weights_are_hashed_once(stored: Path, read: list[Path]) -> None:
    model = find_model("sdxl-tiny")
    first = weights_sha256(model)
    assert max(path.stat().st_size for path in read) > MIB
    read.clear()
    start_again()
    assert weights_sha256(model) == first
    assert max(path.stat().st_size for path in read) < MIB


def test_an_engine_is_looked_for_by_the_weights_as_they_are(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = TINY_FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    lie(stored, weights, "0" * 64)
    wrong = weights_sha256(find_model("sdxl-tiny"))
    options = ("--model", "sdxl-tiny", "--backend", "ort", "--device", "cpu", "--batch", "4")
    words = ["build", *options, "--bundles", "/proc/none"]
    assert engine.main(words) == 2  # after the key is made
    assert weights_sha256(find_model("sdxl-tiny")) == wrong
    assert engine.main([*words, "--verify"]) == 2
    assert weights_sha256(find_model("sdxl-tiny")) != wrong


def test_verify_makes_a_run_hash_again(
    stored: Path, large: Path, train: Command, shapes: Path, tmp_path: Path
) -> None:
    lie(stored, large, "0" * 64)
    run = ("coreset", "--data", shapes, "--out", tmp_path / "run", "--method", "random", *SMALL)
    elsewhere = (
        *("student", "--coreset", tmp_path / "run" / "coreset", "--out", tmp_path / "elsewhere"),
        *("--recipe", "small", "--student", "convnet-d3-w8", "--epochs", "1", "--seeds", "1"),
        *("--targets", "hard"),
    )
    for words in (run, elsewhere):
        hashes._trusts_others = True
        lie(stored, large, "0" * 64)
        start_again()
        assert train(*words).result
        assert known_sha256(large) == "0" * 64
        again = "--overwrite" if words is elsewhere else "--resume"
        assert train(*words, again, "--verify").result
        assert known_sha256(large) == sha256(large)
    assert "verify" not in json.loads((tmp_path / "run" / "config.json").read_text())["options"]
