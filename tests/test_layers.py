"""Guards the house: import direction, no `__init__.py`, and a `--help` that loads no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from import_direction import violations

HEAVY = ("torch", "tensorrt", "transformers", "diffusers", "onnxruntime", "nvidia.dali")


def test_imports_go_left_only() -> None:
    assert violations() == []


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        ("kernels/noise.py", "from ..engine.turbo import Expander", "imports go left only"),
        (
            "engine/expand/expander.py",
            "def f():\n    from ..train import loop",
            "imports go left only",
        ),
        ("export/deep/er.py", "from ...engine import cli", "imports go left only"),
        ("engine/cli.py", "from patchbloom.kernels import noise", "relatively"),
        ("train/students/loop.py", "import kernels.noise", "relatively"),
        ("train/students/loop.py", "from ..bench import measure", "leaves the four folders"),
        ("kernels/noise.py", "import diffusers", "leaf"),
        ("kernels/__init__.py", "", "namespace packages"),
        ("bench/__init__.py", "", "namespace packages"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, text: str, breach: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    (found,) = violations(tmp_path)
    assert breach in found
    assert found.startswith(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "train/students/loop.py",
            "from ..kernels.noise import normal\nfrom .config import Recipe",
        ),
        ("engine/deep/er.py", "from ..turbo import Expander\nfrom ...export import models"),
        ("kernels/noise.py", "import math\nimport torch\nimport triton.language as tl"),
    ],
)
def test_what_goes_left_is_no_breach(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        "engine --help",
        "engine coreset show --help",
        "train --help",
        "train student --help",
    ],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    program, *arguments = command.split()
    script = (
        "import sys\n"
        f"from patchbloom.{program}.cli import main\n"
        "try:\n"
        f"    code = main({arguments})\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])\n"
        "sys.exit(code)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {program}")
    assert run.stdout.endswith("HEAVY []\n")
