"""``--require-gpu`` fails a job in which no GPU test ran, whatever else passed.

Runs pytest in its own folder with our conftest.py and a fake torch that has CUDA or not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MESSAGE = "--require-gpu: not one GPU test ran"
TESTS = """
import pytest

@pytest.mark.gpu
def test_on_the_gpu():
    assert {passes}

def test_elsewhere():
    pass
"""


@pytest.mark.parametrize(
    ("cuda", "passes", "options", "code", "named"),
    [
        (True, True, ["--require-gpu"], 0, False),
        (True, False, ["--require-gpu"], 1, False),
        (False, True, ["--require-gpu"], 1, True),
        (True, True, ["--require-gpu", "-k", "elsewhere"], 1, True),
        (False, True, [], 0, False),
    ],
)
def test_a_gpu_job_needs_a_gpu_test(
    cuda: bool, passes: bool, options: list[str], code: int, named: bool, tmp_path: Path
) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {cuda}\n")
    (tmp_path / "test_both.py").write_text(TESTS.format(passes=passes))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert (MESSAGE in done.stdout) == named
