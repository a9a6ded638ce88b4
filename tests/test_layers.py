"""Import direction, no `__init__.py`, and a `--help` that loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from import_direction import ROOMS, ROOT, violations

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
        ("train/prior/__init__.py", "", "namespace packages"),
        ("train/cli.py", "from .public.coreset import open", "LAYERS has it higher"),
        ("train/public/coreset.py", "import bench.measure", "relatively"),
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
        ("train/public/__init__.py", "from patchbloom.coreset import open"),
        ("kernels/noise.py", "import math\nimport torch\nimport triton.language as tl"),
    ],
)
def test_what_goes_left_is_no_breach(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


def run_counting_imports(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; its last line of stdout lists the heavy modules that it imported."""
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
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


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
    run = run_counting_imports(command)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {command.split()[0]}")
    assert run.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize("command", ["list", "list --json", "verify", "remove --all"])
def test_commands_without_engines_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    run = run_counting_imports(f"engine {command} --bundles {tmp_path / 'none'}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("HEAVY []\n")


RUN = "--data {here} --out {here}/run"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train --data {none} --out {here}/run", "data folder {none}: found nothing; give an"),
        ("train prior --data {none} --out {here}/m", "data folder {none}: found nothing; give an"),
        (f"train {RUN} --class-names {{none}}", "--class-names {none}: no such file"),
        (f"train coreset {RUN} --prompts {{none}}", "--prompts {none}: no such file"),
        (f"train {RUN} --teacher {{none}}", "--teacher {none}: network '{none}' is unknown"),
        (f"train {RUN} --student resnet1", "--student resnet1: network 'resnet1' is unknown"),
        (f"train prior {RUN} --teacher {{none}}", "teacher {none}: no such file; give a file"),
        (
            "train verify --coreset {none} --teacher resnet18",
            "{none} is not a coreset: no such folder",
        ),
        (
            "train student --coreset {here} --out {here}/run",
            "{here} is not a coreset: it has no manifest.json",
        ),
        (
            "train compare {none}",
            "{none} is no run folder, it has no summary.json: give a finished",
        ),
        ("engine coreset info {none}", "{none} is not a coreset: no such folder"),
        ("engine info any --bundles {none}", "no engine in {none} is called 'any'"),
    ],
)
def test_a_path_that_is_not_there_is_told_before_heavy_imports(
    command: str, told: str, tmp_path: Path
) -> None:
    places = {"here": tmp_path, "none": tmp_path / "none"}
    run = run_counting_imports(command.format(**places))
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{command.split()[0]}: error: {told.format(**places)}")
    assert run.stdout == "HEAVY []\n"


FLOATS = {"zeros", "ones", "empty", "full", "tensor", "linspace", "rand", "randn", "eye"}


def without_dtype(source: str) -> list[int]:
    """Lines of calls as torch.zeros(…) whose result has the default dtype, which users change."""
    found = []
    for call in ast.walk(ast.parse(source)):
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                floats = any(isinstance(getattr(arg, "value", 0), float) for arg in call.args)
                named = {keyword.arg for keyword in call.keywords} & {"dtype", "out"}
                if not named and (name in FLOATS or (name == "arange" and floats)):
                    found.append(call.lineno)
    return found


def test_no_tensor_takes_the_default_dtype() -> None:
    """Except in export's graphs, whose bytes are part of every engine's key."""
    assert without_dtype("torch.zeros(1)\ntorch.arange(3)\ntorch.arange(0, 1.0)") == [1, 3]
    keyed = {*ROOT.glob("export/to_*.py"), ROOT / "export/modules.py", ROOT / "export/graphs.py"}
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*.py")} - keyed
    assert {str(path): at for path in files if (at := without_dtype(path.read_text()))} == {}
