"""The generated set: reproducible images, plausible outlines, idempotent writing."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patchbloom.train.data import shapes
from PIL import Image


def test_an_image_is_a_function_of_its_name() -> None:
    first = shapes.image(0, "train", 4, 17)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, shapes.image(0, "train", 4, 17))
    for other in [(1, "train", 4, 17), (0, "val", 4, 17), (0, "train", 5, 17), (0, "train", 4, 18)]:
        assert not np.array_equal(first, shapes.image(*other))


def test_the_outlines_are_where_they_should_be() -> None:
    """Signed distances are negative inside: each object covers a plausible share of its square."""
    axis = ((np.arange(64) + 0.5) / 32 - 1).astype(np.float32)
    u, v = np.meshgrid(axis, axis)
    covered = {name: float((f(u, v, 0.0) < 0).mean()) for name, f in shapes.OUTLINES.items()}
    assert len(covered) == 10
    assert all(0.15 < share < 0.75 for share in covered.values()), covered
    assert shapes.OUTLINES["ring"](np.zeros(1), np.zeros(1), 0.0) > 0  # a hole in the middle
    assert shapes.OUTLINES["star"](np.zeros(1), np.zeros(1), 0.0) < 0
    disc = np.pi * 0.88**2 / 4
    assert covered["disc"] == pytest.approx(disc, abs=0.02)


def test_hsv_matches_the_standard_conversion() -> None:
    import colorsys

    for h, s, v in [(0.0, 1, 1), (0.1, 0.5, 0.9), (0.49, 0.3, 0.2), (0.84, 0.8, 0.7), (1.3, 1, 1)]:
        expected = colorsys.hsv_to_rgb(h % 1, s, v)
        np.testing.assert_allclose(shapes._hsv(h, s, v), expected, atol=1e-6)


def _tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_write_shapes_is_an_image_folder_and_idempotent(tmp_path: Path) -> None:
    folder = shapes.write_shapes(tmp_path / "set", train_per_class=3, val_per_class=2)
    assert sorted(p.name for p in (folder / "train").iterdir()) == sorted(shapes.CLASS_NAMES)
    assert len(list(folder.glob("train/*/*.jpg"))) == 30
    assert len(list(folder.glob("val/*/*.jpg"))) == 20
    decoded = np.asarray(Image.open(folder / "train" / "heart" / "00001.jpg"), np.float32)
    drawn = shapes.image(0, "train", shapes.CLASS_NAMES.index("heart"), 1).astype(np.float32)
    assert np.abs(decoded - drawn).mean() < 4  # JPEG loss only
    before = _tree_hash(folder)
    shapes.write_shapes(folder, train_per_class=3, val_per_class=2)
    again = shapes.write_shapes(tmp_path / "again", train_per_class=3, val_per_class=2)
    assert _tree_hash(folder) == before == _tree_hash(again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "set"]


def test_write_shapes_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not the shapes set"):
        shapes.write_shapes(tmp_path / "mine", train_per_class=1, val_per_class=1)
    shapes.write_shapes(tmp_path / "set", train_per_class=1, val_per_class=1)
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        shapes.write_shapes(tmp_path / "set", train_per_class=2, val_per_class=1)


@pytest.mark.timeout(90)
def test_workers_end_with_a_killed_process_and_the_next_one_clears_up(tmp_path: Path) -> None:
    writing = (
        "import sys; from pathlib import Path; from patchbloom.train.data import shapes\n"
        "shapes.write_shapes(Path(sys.argv[1]), train_per_class=5000, val_per_class=1)"
    )
    deadline = time.monotonic() + 60
    command = [sys.executable, "-c", writing, str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".set.partial-*/train/*/*.jpg")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert process.stdout is not None
        while process.stdout.read():  # it ends when no worker holds it
            pass
    assert list(tmp_path.glob(".set.partial-*"))
    shapes.write_shapes(tmp_path / "set", train_per_class=1, val_per_class=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)  # in the workers too, which are forked
    with pytest.raises(OSError, match=r"for .*set: it needs up to 0.2 MiB; free"):
        shapes.write_shapes(tmp_path / "set", train_per_class=1, val_per_class=1)
    assert not list(tmp_path.iterdir())
