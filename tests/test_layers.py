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
        ("kernels/noise.py", "from ..engine.peers import Peers", "imports go left only"),
        ("engine/cli.py", "def f():\n    from ..train import loader", "imports go left only"),
        ("engine/data/images.py", "from ...train import loader", "imports go left only"),
        ("engine/data/images.py", "from ..labels.basis import fit_basis", "LAYERS has it higher"),
        ("train/methods/t2i.py", "from ..students.loop import Result", "LAYERS has it higher"),
        ("train/helpers.py", "from .config import Recipe", "no place in the LAYERS"),
        ("engine/cli.py", "from patchbloom.kernels import noise", "relatively"),
        ("train/loader.py", "import kernels.noise", "relatively"),
        ("train/loader.py", "from ..bench import measure", "leaves the four folders"),
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


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "engine/data").mkdir(parents=True)
    (tmp_path / "engine/data/one.py").write_text("from .two import x")
    (tmp_path / "engine/data/two.py").write_text("def f():\n    from .one import y")
    (found,) = violations(tmp_path)
    assert "engine.data.one" in found
    assert "engine.data.two" in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/loader.py", "from ..kernels.noise import normal\nfrom .config import Recipe"),
        ("train/prior/loop.py", "from ..config import Recipe\nfrom ...kernels.noise import Draw"),
        ("engine/labels/pca.py", "from ..data.images import x\nfrom ...export import models"),
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
