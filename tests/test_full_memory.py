"""Full memory is told in one line that names the file; an image is not skipped for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patchbloom.engine.console import run_command
from patchbloom.engine.coreset.coreset import write_coreset

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
        "sys.exit(run_command('engine', {}, lambda: None, show))\n"
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

    assert run_command("train", {}, lambda: None, execute) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: error: memory is full (")
    assert line.endswith("): close what else uses it, or ask for less")
