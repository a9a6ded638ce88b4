"""`train` on the command line: options, help, one-line errors."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
from cli_cases import Command
from patchbloom.engine import cli as engine_cli
from patchbloom.engine.cli import COMMANDS
from patchbloom.train import cli
from patchbloom.train.config import DecoderConfig, PriorConfig
from patchbloom.train.coreset_options import (
    DataOptions,
    LoaderOptions,
    StudentElsewhere,
    TrainCheck,
    TrainVerify,
)
from patchbloom.train.options import (
    STAGES,
    RunOptions,
    Train,
    TrainCompare,
    TrainDecoder,
    TrainPrior,
    TrainPublish,
    TrainReport,
    TrainReproduce,
)
from patchbloom.train.run.progress import duration, pace

RUN_OPTIONS = [
    "data",
    "where",
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
    "teacher_precision",
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
    "evaluate_every",
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
    "where",
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
    "evaluate_every",
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
    "where",
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
    "vae_factor",
    "latent_channels",
    "patch_factor",
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
    own = ["decoder", "image_size", "device", "skip_corrupt", "shapes_per_class"]
    assert names(TrainDecoder) == ["model", "data", "where", "out", *own, "resume", "overwrite"]
    assert names(DecoderConfig) == ["steps", "batch", "width", "blocks", "seed"]
    assert names(TrainReport) == ["run"]
    assert names(TrainCompare) == ["runs", "out", "reference", "json"]
    assert names(StudentElsewhere) == ELSEWHERE_OPTIONS
    assert names(TrainVerify) == VERIFY_OPTIONS
    assert names(LoaderOptions) == LOADER_OPTIONS
    licences = ["data_licence", "generator_licence"]
    private = ["private", "overwrite"]
    assert names(TrainPublish) == ["run", "to", "method", "data_name", *licences, *private]
    assert names(DataOptions) == ["val_data", "val_fraction", "root"]
    assert names(TrainCheck)[-6:] == ["folder", "data", "where", "files_only", "out", "backend"]
    assert names(TrainReproduce) == REPRODUCE_OPTIONS
    stages = [
        "teacher",
        "coreset",
        "labels",
        "student",
        "verify",
        "prior",
        "decoder",
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
        for option in names(DataOptions) if name == "where" else [name]:
            assert f"--{option.replace('_', '-')}" in told


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
        (
            ["--select", "random"],
            "--select random: expected lowest-loss, facility-location,",
        ),
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


@pytest.mark.parametrize(
    "words",
    [
        "engine list",
        "engine --help",
        "train --help",
        "train --version",
        "train reproduce tiny --list",
    ],
)
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


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_is_grouped_and_wrapped(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    told = capsys.readouterr().out
    lines = told.splitlines()
    groups = ["Data:", "Method:", "Model:", "Labels:", "Student:", "Machine:", "Other:"]
    assert [line for line in lines if line in groups] == groups
    example = next(line for line in lines if line.startswith("example: train --data shapes"))
    assert lines.index(example) < lines.index("Data:")
    assert "None" not in told
    assert "--model STR" in told
    assert "default: 0.8" in told.replace("\n", " ")
    assert max(len(line) for line in lines if line != example) <= min(columns, 100)
    indent = min(26, columns // 3, 33) * " "
    for line, after in pairwise(lines):
        if line.startswith(indent) and after.startswith(indent):
            assert len(f"{line} {after.split()[0]}") > min(columns, 100), "could be longer"


@pytest.mark.parametrize("kind", [Train, StudentElsewhere, *STAGES.values(), *COMMANDS.values()])
def test_every_command_has_an_example_and_groups_of_its_options(kind: type) -> None:
    program, *words = shlex.split(vars(kind)["example"])
    parse = cli._parse if program == "train" else engine_cli._parse
    assert type(parse(words)) is kind
    grouped = " ".join(getattr(kind, "groups", {}).values()).split()
    assert len(grouped) == len(set(grouped))
    if kind in (Train, StudentElsewhere, TrainVerify, TrainPrior, TrainDecoder):
        assert set(names(kind)) <= set(grouped)


@pytest.mark.parametrize("words", ["train", "engine", "engine coreset", "train --json"])
def test_without_a_command_the_short_help_is_told(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *more = words.split()
    with pytest.raises(SystemExit, match="2"):
        (cli if program == "train" else engine_cli).main(more)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"usage: {words.removesuffix(' --json')} ")
    assert "example: " in err
    assert "--verify" not in err


@pytest.mark.parametrize("main", [cli.main, engine_cli.main])
def test_the_version(main: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[1] == version("patchbloom")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("lables", "unrecognized: lables. Perhaps you meant: labels (see"),
        ("lables --data a --out b", "unrecognized: lables. Perhaps you meant: labels (see"),
        ("--dta a --out b", "unrecognized: --dta a. Perhaps you meant: --data (see"),
        ("labels a --data b --out c", "unrecognized: a. Commands: teacher, coreset, labels,"),
    ],
)
def test_what_is_mistyped_is_told_the_nearest(train: Command, words: str, told: str) -> None:
    assert told in train(*words.split()).error


def test_a_terminal_gets_a_table_and_json_on_request(
    train: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = ("reproduce", "cifar10", "--list")
    piped = train(*listing).out.splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = train(*listing).out
    assert shown.splitlines()[:2] == piped[:2]
    assert piped[-1] not in shown
    assert train(*listing, "--json").out.splitlines() == piped[-1:]
    assert engine_cli.main(["list", "--bundles", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no engines, 0.0 MB, in {tmp_path}\n"
    monkeypatch.setattr(cli, "_execute", lambda *_: {"report": "r.html", "bytes": 2048})
    assert train("report", "r").out.splitlines() == [
        "report          r.html",
        "bytes           2.0 KiB",
    ]
    assert train("report", "r", "--json").out == '{"report": "r.html", "bytes": 2048}\n'


def test_times_read_well() -> None:
    seconds = (1.4e-6, 3.44, 42.3, 720, 12240)
    assert [*map(duration, seconds)] == ["0 s", "3.4 s", "42 s", "12 min", "3.4 h"]
    assert pace(0.025, "epochs") == "40 s/epoch"
    assert pace(0.5, "classes") == "2 s/class"
    assert pace(12.345, "images") == "12.3 images/s"
