"""One line reports full memory and names the file; no image is skipped for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patchbloom.engine.console import run_command
from patchbloom.engine.coreset.coreset import write_coreset
from patchbloom.engine.data.crops import stream_center
from patchbloom.engine.data.images import InputError, open_image_set
from PIL import Image

LEAVE = """
import resource, sys
def leave(mb):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
"""


def with_little_memory(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that calls `leave(mb)`, after its imports."""
    command = [sys.executable, "-c", LEAVE + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_image_of_a_coreset_is_named(tmp_path: Path) -> None:
    side = 3000  # 27 MB of pixels, 26 kB of PNG
    folder = tmp_path / "coreset"
    write_coreset(
        folder,
        patches_NHWC=torch.zeros(1, side, side, 3, dtype=torch.uint8),
        class_ids=["a"],
        class_names=["a"],
        settings={
            **{"method": "random", "seed": 0, "image_size_px": side},
            **{"factor": 1, "patch_px": side, "ipc": 1},
        },
        provenance={},
    )
    script = (
        "from patchbloom.engine.console import run_command\n"
        "from patchbloom.engine.coreset.coreset import open_coreset\n"
        "leave(20)\n"
        "show = lambda _: {'patches': len(open_coreset(sys.argv[1]).patches())}\n"
        "sys.exit(run_command('engine', {}, ['x'], lambda _: None, show))\n"
    )
    ended = with_little_memory(script, folder)
    path = folder / "patches" / "a" / "000000.png"
    told = f"engine: error: memory is full (reading {path}): close what else uses it"
    assert ended.stderr.startswith(told)
    assert ended.stderr.count("\n") == 1
    assert ended.returncode == 2


@pytest.mark.parametrize(
    ("bytes_", "error"),
    [
        (0, MemoryError()),
        (0, RuntimeError("CUDA out of memory. Tried to\nallocate")),
        (2**60, None),
    ],
)
def test_a_command_tells_it_in_one_line(
    bytes_: int, error: Exception | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(_: None) -> dict:
        torch.empty(bytes_, dtype=torch.uint8)
        raise error or AssertionError

    assert run_command("train", {}, ["x"], lambda _: None, execute) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: error: memory is full (")
    assert line.endswith("): close what else uses it, or ask for less")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_an_image_that_memory_cannot_hold_is_named_and_never_skipped(
    tmp_path: Path, kind: str
) -> None:
    """Also in a batch with a damaged file, which is skipped as ever."""
    for folder in ("small", "all"):
        (tmp_path / folder / "a").mkdir(parents=True)
        Image.effect_noise((40, 40), 90).save(tmp_path / folder / "a" / "0.jpg")
    whole = (tmp_path / "all" / "a" / "0.jpg").read_bytes()
    (tmp_path / "all" / "a" / "1.jpg").write_bytes(whole[:-99])
    large = tmp_path / "all" / "a" / f"2.{kind}"
    Image.new("L", (8000, 8000)).save(large)  # 192 MB when decoded, a few hundred kB as a file
    script = (
        "from patchbloom.engine.data.crops import stream_center\n"
        "from patchbloom.engine.data.images import open_image_set\n"
        "small, images = (open_image_set(folder, 'train') for folder in sys.argv[1:])\n"
        "list(stream_center(small, size_px=16))\n"  # loads DALI
        "stream = stream_center(images, size_px=16, skip_corrupt=True)\n"
        "leave(110)\n"
        "try:\n"
        "    list(stream)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(stream.skipped)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "print([batch.index_B.tolist() for batch in stream], stream.skipped)\n"
    )
    ended = with_little_memory(script, tmp_path / "small", tmp_path / "all")
    told, *skipped = ended.stdout.splitlines()
    # Memory may be too short to tell that the damaged one is damaged.
    assert told.startswith(f"memory is full, so {large.parent}/")
    assert skipped[0] in ("[]", "[1]")
    assert skipped[1:] == ["[[0, 2]] [1]"]


def test_a_file_that_is_larger_than_memory_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "0.jpg"
    with path.open("wb") as stream:
        stream.truncate(2**43)  # sparse
    with pytest.raises(InputError, match=f"memory is full, so {path} cannot be decoded"):
        list(stream_center(open_image_set(tmp_path, "train"), size_px=16, skip_corrupt=True))
