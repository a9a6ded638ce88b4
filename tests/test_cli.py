"""`train` on the command line: options, help, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from cli_cases import Command
from patchbloom.train.config import PriorConfig
from patchbloom.train.coreset_options import (
    LoaderOptions,
    StudentElsewhere,
    TrainCheck,
    TrainVerify,
)
from patchbloom.train.options import (
    STAGES,
    RunOptions,
    TrainCompare,
    TrainPrior,
    TrainPublish,
    TrainReport,
    TrainReproduce,
)

RUN_OPTIONS = [
    "data",
    "out",
    "model",
    "backend",
    "trt_library",
    "cuda_graph",
    "method",
    "ipc",
    "factor",
    "image_size",
    "steps",
    "rho",
    "mixup",
    "mixup_weight",
    "start",
    "prompt",
    "prompts",
    "variants",
    "generate_size",
    "budget_seconds",
    "precision",
    "vae_precision",
    "engine_batch",
    "bundles",
    "recipe",
    "scoring",
    "select",
    "candidates",
    "epochs",
    "teacher_epochs",
    "teacher",
    "student",
    "targets",
    "labels",
    "codec",
    "top_k",
    "components",
    "seed",
    "seeds",
    "batch",
    "learning_rate",
    "accumulate",
    "cutmix",
    "student_precision",
    "student_compile",
    "overlap",
    "refresh",
    "dsco",
    "dope",
    "ceiling",
    "class_names",
    "device",
    "skip_corrupt",
    "shapes_per_class",
    "verify",
    "start_timeout",
    "build_only",
    "resume",
    "overwrite",
]
RENDER_OPTIONS = [
    *("model", "precision", "vae_precision", "engine_batch", "trt_library", "cuda_graph"),
    *("bundles", "device", "verify"),
]
ELSEWHERE_OPTIONS = [
    *RENDER_OPTIONS,
    "coreset",
    "out",
    "data",
    "shapes_per_class",
    "backend",
    "targets",
    "recipe",
    "factor",
    "cutmix",
    "student",
    "epochs",
    "batch",
    "learning_rate",
    "final_lr_fraction",
    "weight_decay",
    "student_precision",
    "student_compile",
    "accumulate",
    "overlap",
    "seed",
    "seeds",
    "overwrite",
]
VERIFY_OPTIONS = [
    *RENDER_OPTIONS,
    "coreset",
    "teacher",
    "other_teacher",
    "samples",
    "backend",
    "seed",
]
REPRODUCE_OPTIONS = ["plan", "data", "out", "only", "coresets", "list", "yes", "words"]
LOADER_OPTIONS = [
    *RENDER_OPTIONS,
    "batch",
    "drop_last",
    "epochs",
    "targets",
    "labels",
    "temperature",
    "class_indices",
    "seed",
    "ahead",
    "backend",
]
PRIOR_OPTIONS = [
    "data",
    "out",
    "prior",
    "class_names",
    "teacher",
    "device",
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
    "vae_width",
    "width",
    "crops",
    "precision",
    "unet_steps",
    "unet_batch",
    "guidance_steps",
    "few_step_steps",
    "substeps",
    "seed",
]


def names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def test_the_options_are_frozen() -> None:
    """Scripts rely on the options: when one is added, renamed or removed, change it here."""
    assert names(RunOptions) == RUN_OPTIONS
    for name in ("teacher", "coreset", "labels", "student"):
        assert names(STAGES[name]) == RUN_OPTIONS
    assert names(TrainPrior) == PRIOR_OPTIONS
    assert names(PriorConfig) == PRIOR_CONFIG
    assert names(TrainReport) == ["run"]
    assert names(TrainCompare) == ["runs", "out", "reference", "json"]
    assert names(StudentElsewhere) == ELSEWHERE_OPTIONS
    assert names(TrainVerify) == VERIFY_OPTIONS
    assert names(LoaderOptions) == LOADER_OPTIONS
    licences = ["data_licence", "generator_licence"]
    assert names(TrainPublish) == ["run", "to", "method", "data_name", *licences, "overwrite"]
    assert names(TrainCheck)[-5:] == ["folder", "data", "files_only", "out", "backend"]
    assert names(TrainReproduce) == REPRODUCE_OPTIONS
    stages = [
        "teacher",
        "coreset",
        "labels",
        "student",
        "verify",
        "prior",
        "reproduce",
        "report",
        "compare",
        "publish",
        "check",
    ]
    assert list(STAGES) == stages


@pytest.mark.parametrize("stage", ["", *STAGES, "student --coreset DIR"])
def test_help_is_quick_and_imports_no_heavy_library(stage: str) -> None:
    code = (
        "import sys\n"
        "from patchbloom.train.cli import main\n"
        "try:\n main(sys.argv[1:])\n"
        "except SystemExit as end:\n assert not end.code\n"
        "heavy = {'torch', 'tensorrt', 'nvidia.dali', 'diffusers', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *stage.split(), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"usage: train {stage.removesuffix(' --coreset DIR')}".strip() in told
    shown = {"": RUN_OPTIONS, "student": RUN_OPTIONS, "student --coreset DIR": ELSEWHERE_OPTIONS}
    for name in shown.get(stage, []):
        assert f"--{name.replace('_', '-')}" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "dcae"], "--method dcae: expected one or several of dace, rded, random"),
        (["--method", "rded,t2v"], "--method t2v: expected one or several of"),
        (["--backend", "tensorrt"], "invalid choice 'tensorrt' for argument '--backend'"),
        (
            ["--rho", "0.1"],
            "--rho 0.1 of --steps 5 rounds to 0 evaluations: give --rho 0.2 or more",
        ),
        (["--rho", "1.2"], "--rho 1.2: expected more than 0, and 1 at most"),
        (["--mixup-weight", "beta"], "--mixup-weight beta: expected uniform, a number from 0"),
        (["--mixup-weight", "0.5", "--no-mixup"], "weight 0.5 has no use with --no-mixup: leave"),
        (["--mixup-weight", "0.5", "--start", "noise"], "has no use with --start noise: leave"),
        (["--refresh", "0"], "--refresh 0: expected 0.001 to 1"),
        (["--learning-rate", "0"], "--learning-rate 0: expected more than 0"),
        (["--seed", "4294967"], "--seed 4294967: expected 0 to 4294966"),
        (["--accumulate", "0"], "--accumulate 0: expected 1 or more"),
        (["--factor", "0"], "--factor 0: expected 1 or more"),
        (["--method", "t2i", "--steps", "5"], "--steps 5: expected 4 at most for t2i: leave it"),
        (
            ["--method", "t2i", "--ipc", "8", "--variants", "4"],
            "--ipc 8: expected a multiple of 5, each generated image and its 4 --variants",
        ),
        (["--variants", "-1"], "--variants -1: expected 0 or more"),
        (["--budget-seconds", "0"], "--budget-seconds 0: expected a number of seconds, more"),
        (["--prompt", "A photo"], "--prompt 'A photo': expected {name} in it"),
        (["--ipc", "0"], "--ipc 0: expected 1 or more"),
        (["--candidates", "0"], "--candidates 0: expected 1 or more"),
        (["--select", "random"], "invalid choice 'random' for argument '--select'"),
        (["--dope", "-1"], "--dope -1: expected 0 or more"),
        (["--method", "dsco", "--steps", "1"], "--steps 1: expected 2 or more for dsco"),
        (["--dsco.groups", "3"], "--dsco.groups 3: expected a power of 2 up to 256"),
        (["--dsco.momentum", "1"], "--dsco.momentum 1.0: expected 0 or more, less than 1"),
        (["--epochs", "ten"], "--epochs: expected INT, got 'ten'"),
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


def test_labels_that_are_not_to_be_stored_are_not(train: Command, tmp_path: Path) -> None:
    error = train("labels", "--data", tmp_path, "--out", tmp_path / "run", "--labels", "online")
    assert "--labels online stores none: leave it out to train labels" in error.error
    options = ("--data", tmp_path, "--out", tmp_path / "run", "--labels", "online")
    for codec in ("topk", "pca"):
        error = train(*options, "--codec", codec).error
        assert f"--labels online stores none, so --codec {codec} has no use" in error


@pytest.mark.parametrize("words", ["engine list", "engine --help", "train --help"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(words: str, tmp_path: Path) -> None:
    """As `| head` does."""
    program, *more = words.split()
    script = f"import sys\nfrom patchbloom.{program}.cli import main\nsys.exit(main({more}))"
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with os.fdopen(writer, "wb") as gone:
        ended = subprocess.run(
            [sys.executable, "-c", script], stdout=gone, stderr=subprocess.PIPE, env=environment
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("columns", [1, 4, 5])
def test_a_narrow_terminal_gets_its_help(columns: int) -> None:
    """Given these widths, tyro loops until the memory is full."""
    script = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "from patchbloom.train.cli import main\n"
        "main(['--help'])"
    )
    environment = os.environ | {"COLUMNS": str(columns)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert ended.returncode == 0
    assert b"--overwrite" in ended.stdout
