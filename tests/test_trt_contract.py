"""Our TensorRT code against the real bindings of both majors that it is for, without TensorRT.

The bindings' attributes, enums and signatures are real (trt_standins.py), what TensorRT does is
played (trt_cases.py). No engine is built: that needs the library and a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.export import to_tensorrt
from patchbloom.export.models import Unavailable

TESTS = Path(__file__).parent
BINDINGS = TESTS.parent / ".trt"


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_the_whole_build_and_run(version: str):
    folder = BINDINGS / version
    missing = None
    if not (folder / "tensorrt_bindings").is_dir():
        missing = f"the bindings of TensorRT {version} are not in {folder}: run make setup"
    elif shutil.which("cc") is None:
        missing = "a C compiler, cc, is needed for empty libraries"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    cases = [str(TESTS / "trt_cases.py"), "--trt-bindings", str(folder)]
    done = subprocess.run([*command, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "8 passed" in done.stdout
    assert "skipped" not in done.stdout


def installed(monkeypatch: Any, version: str | None, gpu: bool) -> None:
    monkeypatch.setattr(to_tensorrt, "_installed_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("version", "gpu", "device", "told"),
    [
        (None, False, "cpu", r"needs an NVIDIA GPU .* and TensorRT 10\.12 to 11 \(pip install"),
        (None, True, "cuda", r"needs TensorRT 10\.12 to 11 \(pip install"),
        ("10.11.0.33", True, "cuda", r"10\.12 to 11, not 10\.11\.0\.33"),
        ("12.0.1", True, "cuda", r"10\.12 to 11, not 12\.0\.1"),
        ("11.4.0.106", True, "cpu", "needs an NVIDIA GPU .*asked for another device"),
        ("11.4.0.106", True, "cuda", "is installed but does not load"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: Any, version: str | None, gpu: bool, device: str, told: str
):
    installed(monkeypatch, version, gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match=told):
        to_tensorrt.require("fp16", device)
