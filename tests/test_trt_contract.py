"""Our TensorRT code against the real bindings of both supported majors, without TensorRT.

The bindings' attributes, enums and signatures are real (trt_standins.py); what TensorRT does is
faked (trt_cases.py). No engine is built: that needs the library and a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patchbloom.export import trt_library
from patchbloom.export.models import Unavailable

TESTS = Path(__file__).parent
BINDINGS = TESTS.parent / ".trt" / sys.implementation.cache_tag
VERSIONS = ("10.16.1.11", "11.4.0.106")


def runnable(folder: Path) -> str | None:
    """Why the cases cannot run on these bindings. None: they can."""
    if not (folder / "tensorrt_bindings").is_dir():
        return f"the bindings of TensorRT {folder.name} are not in {folder}: run make setup"
    if shutil.which("cc") is None:
        return "a C compiler, cc, is needed for empty libraries"
    return None


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The cases on each version, in parallel: 10 s of each are imports and writing graphs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    running = {}
    for version in VERSIONS:
        if runnable(BINDINGS / version) is None:
            cases = [str(TESTS / "trt_cases.py"), "--trt-bindings", str(BINDINGS / version)]
            running[version] = subprocess.Popen(
                [*command, *cases], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    yield running
    for process in running.values():
        with process:
            process.kill()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_build_and_run(version: str, runs: dict[str, subprocess.Popen[str]]):
    missing = runnable(BINDINGS / version)
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    told, _ = runs[version].communicate()
    assert runs[version].returncode == 0, told[-6000:]
    assert "12 passed" in told
    assert "skipped" not in told


def installed(monkeypatch: Any, version: str | None, gpu: str | None) -> None:
    monkeypatch.setattr(
        trt_library._LIBRARIES["tensorrt"].__class__, "version", lambda self: version
    )
    monkeypatch.setattr(trt_library, "here", lambda: gpu)


@pytest.mark.parametrize(
    ("version", "gpu", "device", "told"),
    [
        (None, None, "cpu", r"needs an NVIDIA GPU .* and TensorRT 10\.15 to 11 \(pip install"),
        (None, "sm90", "cuda", r"needs TensorRT 10\.15 to 11 \(pip install"),
        ("10.14.1.48", "sm90", "cuda", r"10\.15 to 11, not 10\.14\.1\.48"),
        ("12.0.1", "sm86", "cuda", r"10\.15 to 11, not 12\.0\.1"),
        ("11.4.0.106", "sm86", "cpu", "needs an NVIDIA GPU .*another device was requested"),
        ("11.4.0.106", "sm86", "cuda", "11.4.0.106 is installed, but "),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: Any, version: str | None, gpu: str | None, device: str, told: str
):
    installed(monkeypatch, version, gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match=told):
        trt_library.choose_library("tensorrt", device=device)
