"""`train` as a user meets it: its options, and one clear line for every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from patchbloom.train import cli
from patchbloom.train.commands import STAGES, RunOptions, TrainPrior, TrainReport
from patchbloom.train.config import PriorConfig
from patchbloom.train.shapes import write_shapes

RUN_OPTIONS = [
    "data",
    "out",
    "model",
    "backend",
    "method",
    "ipc",
    "factor",
    "image_size",
    "steps",
    "rho",
    "mixup",
    "start",
    "precision",
    "engine_batch",
    "recipe",
    "epochs",
    "teacher_epochs",
    "teacher",
    "student",
    "labels",
    "seed",
    "seeds",
    "batch",
    "ceiling",
    "class_names",
    "device",
    "skip_corrupt",
    "shapes_per_class",
    "resume",
    "overwrite",
]
PRIOR_OPTIONS = [
    "data",
    "out",
    "prior",
    "class_names",
    "skip_corrupt",
    "shapes_per_class",
    "resume",
    "overwrite",
]
PRIOR_CONFIG = [
    "image_size",
    "steps",
    "guidance",
    "vae_steps",
    "vae_batch",
    "unet_steps",
    "unet_batch",
    "guidance_steps",
    "few_step_steps",
    "substeps",
    "seed",
]


@dataclass
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line of stderr, which must be the only line that reports the error."""
        lines = [line for line in self.err.splitlines() if line.startswith("train: error: ")]
        assert self.code == 2, self.err
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]

    @property
    def result(self) -> dict:
        """The last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Outcome]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `train ...` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "s", train_per_class=6, val_per_class=2)


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def test_the_options_are_frozen() -> None:
    """An option added, renamed or removed changes what scripts say: then change it here."""
    assert names(RunOptions) == RUN_OPTIONS
    for name in ("teacher", "coreset", "labels", "student"):
        assert names(STAGES[name]) == RUN_OPTIONS
    assert names(TrainPrior) == PRIOR_OPTIONS
    assert names(PriorConfig) == PRIOR_CONFIG
    assert names(TrainReport) == ["run"]
    assert list(STAGES) == ["teacher", "coreset", "labels", "student", "prior", "report"]


@pytest.mark.parametrize("stage", ["", *STAGES])
def test_help_is_quick_and_imports_no_heavy_library(stage: str) -> None:
    code = (
        "import sys\n"
        "from patchbloom.train.cli import main\n"
        "try:\n main(sys.argv[1:])\n"
        "except SystemExit as end:\n assert not end.code\n"
        "heavy = {'torch', 'tensorrt', 'nvidia.dali', 'diffusers', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *filter(None, [stage]), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"usage: train {stage}".strip() in told
    if stage in ("", "student"):
        for name in RUN_OPTIONS:
            assert f"--{name.replace('_', '-')}" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "dcae"], "--method dcae: expected one or several of dace, rded, random"),
        (["--method", "rded,t2i"], "--method t2i: expected one or several of"),
        (["--backend", "tensorrt"], "invalid choice 'tensorrt' for argument '--backend'"),
        (
            ["--rho", "0.1"],
            "--rho 0.1 of --steps 5 rounds to 0 evaluations: give --rho 0.2 or more",
        ),
        (["--rho", "1.2"], "--rho 1.2: expected more than 0, and 1 at most"),
        (["--factor", "0"], "--factor 0: expected 1 or more"),
        (["--ipc", "0"], "--ipc 0: expected 1 or more"),
        (["--epochs", "ten"], "invalid choice 'ten' for argument '--epochs'"),
        (["--recipe", "large"], "invalid choice 'large' for argument '--recipe'"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_options_that_cannot_be_used(
    train: Command, tmp_path: Path, options: list[str], told: str
) -> None:
    outcome = train("--data", tmp_path, "--out", tmp_path / "run", *options)
    assert told in outcome.error
    assert not (tmp_path / "run").exists()


def test_no_such_folder(train: Command, tmp_path: Path) -> None:
    error = train("--data", tmp_path / "nowhere", "--out", tmp_path / "run").error
    assert f"data folder {tmp_path / 'nowhere'}: found nothing; give an existing folder" in error
    assert not (tmp_path / "run").exists()


def test_no_images(train: Command, data: Path, tmp_path: Path) -> None:
    for path in data.glob("train/*/*.jpg"):
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"{data / 'train'}: no images in it" in error


def test_no_validation_split(train: Command, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "val")
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"{data}: no val/ or test/ folder in it" in error


def test_a_class_with_fewer_images_than_patches_are_needed(
    train: Command, data: Path, tmp_path: Path
) -> None:
    for path in sorted((data / "train" / "star").iterdir())[3:]:
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run", "--method", "rded").error
    assert "class 'star' has 3 training images, but ipc · factor² = 4 patches are wanted" in error
    assert "give a smaller --ipc or --factor, or more images" in error


def test_validation_classes_that_differ(train: Command, data: Path, tmp_path: Path) -> None:
    (data / "val" / "star").rename(data / "val" / "moon")
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"only in {data / 'train'}: star; only in {data / 'val'}: moon" in error


@pytest.mark.parametrize("factor", [3, 65, 128])
def test_a_factor_that_does_not_fit_the_image(
    train: Command, shapes: Path, tmp_path: Path, factor: int
) -> None:
    options = ("--method", "rded", "--factor", str(factor), "--recipe", "small")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert f"--factor {factor}: expected a divisor of the image size, 64 px" in error


def test_an_unknown_model(train: Command, shapes: Path, tmp_path: Path) -> None:
    error = train("--data", shapes, "--out", tmp_path / "run", "--model", "sdxl-huge").error
    assert "unknown model 'sdxl-huge': it is neither a folder nor one of sdxl-turbo" in error


def test_a_folder_that_is_no_model(train: Command, shapes: Path, tmp_path: Path) -> None:
    error = train("--data", shapes, "--out", tmp_path / "run", "--model", shapes).error
    assert "is no model in diffusers' SDXL layout" in error


@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_an_unknown_network(train: Command, shapes: Path, tmp_path: Path, option: str) -> None:
    options = ("--method", "rded", option, "resnet19")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert f"{option} resnet19" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cuda"], "torch finds no CUDA GPU here"),
        (["--backend", "trt"], "trt"),
    ],
)
def test_what_this_machine_lacks(
    train: Command, shapes: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert told in error


def test_an_interrupted_download(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def cut(*_: object, local_files_only: bool, **__: object) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise ConnectionError("Connection broken: IncompleteRead(1048576 bytes read)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    error = train("--data", shapes, "--out", tmp_path / "run", "--model", "sdxl-turbo").error
    assert "download of stabilityai/sdxl-turbo did not finish (Connection broken" in error
    assert "run the same command again and it goes on where it stopped" in error


@pytest.mark.parametrize("found", ["file", "folder", "run"])
def test_an_out_folder_that_is_not_empty(
    train: Command, shapes: Path, tmp_path: Path, found: str
) -> None:
    out = tmp_path / "run"
    if found == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    if found == "run":
        (out / "run.json").write_text('{"schema": "patchbloom.run/1"}')
    for option in ([], ["--overwrite"], ["--resume"]):
        error = train("--data", shapes, "--out", out, *option).error
        assert "not a folder" in error if found == "file" else "'thesis.tex'" in error
        assert "choose another --out" in error
    assert "mine" in (out if found == "file" else out / "thesis.tex").read_text()


def test_a_run_is_neither_resumed_nor_replaced_unasked(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"schema": "patchbloom.run/1"}')
    error = train("--data", shapes, "--out", tmp_path).error
    assert "--resume goes on with that run, --overwrite replaces it" in error


def test_a_report_without_a_run(train: Command, tmp_path: Path) -> None:
    error = train("report", tmp_path).error
    assert "has no summary.json: give the folder of a finished run" in error
