"""sdist and wheel: the files they hold, and that an installed wheel runs from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "export", "engine", "train")
NOT_SHIPPED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def _run(*command: object, **keywords) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **keywords
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    source = tmp_path_factory.mktemp("source") / "patchbloom"
    shutil.copytree(ROOT, source, ignore=NOT_SHIPPED)
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


PUBLIC = "train/public/"


def _package_files() -> set[str]:
    """Files that a wheel must hold: every module, and every data file beside one."""
    return {
        f"patchbloom/{path.relative_to(ROOT).as_posix().removeprefix(PUBLIC)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == _package_files()
    assert {"patchbloom/engine/data/imagenet_classes.json", "patchbloom/__init__.py"} <= shipped
    information = {name.split(".dist-info/")[1] for name in names - shipped}
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} <= information


def test_the_sdist_holds_what_the_readme_runs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = {"README.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run"}
    tracked.add("docs/tour.ipynb")
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    modules = {name.removeprefix("patchbloom/") for name in _package_files()}
    public = {path.relative_to(ROOT).as_posix() for path in (ROOT / PUBLIC).iterdir()}
    modules -= {name.removeprefix(PUBLIC) for name in public}
    public = {name for name in public if "__pycache__" not in name}
    assert tracked | tests | modules | public <= names
    junk = (".pyc", ".partial", ".onnx.data")
    assert [name for name in names if name.endswith(junk) or "__pycache__" in name] == []


def test_an_installed_wheel_finds_its_data_from_another_folder(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, built[1])
    script = (
        "import patchbloom\n"
        "assert patchbloom.__version__ and patchbloom.open\n"
        f"assert patchbloom.__path__ == [{str(site / 'patchbloom')!r}]\n"
        "from patchbloom.engine.data import names\n"
        "assert names.display_names(['n01440764']) == ('tench',)\n"
        "print(names.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    place = _run(sys.executable, "-c", script, cwd=tmp_path, env=environment).strip()
    assert Path(place).is_relative_to(site)
    assert not (site / "patchbloom" / "train" / "public").exists()
    for program in ("engine", "train", "patchbloom"):
        told = _run(site / "bin" / program, "--help", cwd=tmp_path, env=environment)
        assert told.startswith(f"usage: {program}")


def test_an_editable_install_finds_the_public_names_and_every_folder(tmp_path: Path) -> None:
    """Also in the repository itself, where transformers looks for Hugging Face's `kernels`."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=NOT_SHIPPED)
    build = "from setuptools.build_meta import build_editable\nbuild_editable('..')"
    _run(sys.executable, "-c", build, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    libraries = str(Path(np.__file__).parents[1])  # without the .pth files in it: -S
    script = (
        f"import site, sys\nsite.addsitedir({str(site)!r})\nsys.path.append({libraries!r})\n"
        "import patchbloom, transformers\n"
        "from importlib.util import find_spec\n"
        "names = 'patchbloom', 'patchbloom.coreset', 'patchbloom.train.prior.loop'\n"
        "print(*(find_spec(name).origin for name in names), sep='\\n')\n"
    )
    told = _run(sys.executable, "-S", "-c", script, cwd=source).splitlines()
    assert told == [
        f"{source}/train/{file}.py" for file in ("public/__init__", "public/coreset", "prior/loop")
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_a_fresh_installation_runs_the_demo(
    built: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """Non-editable, in a new environment, from another directory."""
    package = built[0] if kind == "sdist" else built[1]
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    environment = {**os.environ, "PIP_FIND_LINKS": ""}  # as in the Makefile
    install = ("-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    _run(python, *install, package, env=environment)
    demo = _demo_command()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    told = _run(tmp_path / "venv" / "bin" / demo[0], *demo[1:], cwd=elsewhere)
    assert '"accuracy"' in told.splitlines()[-1]


def _demo_command() -> list[str]:
    """The command of `make demo`, with `out` as its folder."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # set under `make test`
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    dry_run = ("make", "--dry-run", "--always-make", "DEMO_OUT=out", "demo")
    printed = _run(*dry_run, cwd=ROOT, env=environment)
    words = printed.replace("\\\n", " ").splitlines()[-1].split()
    return [Path(words[0]).name, *words[1:]]
