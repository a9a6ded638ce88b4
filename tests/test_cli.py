"""`train` as a user meets it: its options, and one clear line for every bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patchbloom.engine import coreset, durable
from patchbloom.train import cli, planning, run, run_labels
from patchbloom.train.commands import STAGES, RunOptions, TrainPrior, TrainReport
from patchbloom.train.config import PriorConfig
from patchbloom.train.coreset_options import LoaderOptions, StudentElsewhere, TrainVerify
from patchbloom.train.prior_model import new_parts, save_parts
from patchbloom.train.record import Record
from patchbloom.train.shapes import write_shapes
from patchbloom.train.stages import RunFolder
from PIL import Image
from safetensors.torch import load_file

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
    "resume",
    "overwrite",
]
RENDER_OPTIONS = ["model", "precision", "vae_precision", "engine_batch", "bundles", "device"]
ELSEWHERE_OPTIONS = [
    *RENDER_OPTIONS,
    "coreset",
    "out",
    "data",
    "shapes_per_class",
    "backend",
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
LOADER_OPTIONS = [
    *RENDER_OPTIONS,
    "batch",
    "drop_last",
    "epochs",
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

SMALL = (
    *("--recipe", "small", "--image-size", "32", "--seeds", "1"),
    *("--teacher", "convnet-d3-w8", "--student", "convnet-d3-w8"),
    *("--teacher-epochs", "1", "--epochs", "1"),
)


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


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take minutes on busy cores, for networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "s", train_per_class=6, val_per_class=2)


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def floats(value: Any) -> list[float]:
    """All of them in plain JSON."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return [number for entry in entries for number in floats(entry)]
    return [value] if isinstance(value, float) else []


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
    assert names(StudentElsewhere) == ELSEWHERE_OPTIONS
    assert names(TrainVerify) == VERIFY_OPTIONS
    assert names(LoaderOptions) == LOADER_OPTIONS
    stages = ["teacher", "coreset", "labels", "student", "verify", "prior", "report"]
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
    error = train(*options, "--codec", "topk").error
    assert "--labels online stores none, so --codec topk has no use" in error


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


def test_an_ipc_that_a_class_has_no_images_for(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--method", "random", "--ipc", "2", "--factor", "2")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "has 6 training images, but ipc · factor² = 8 patches are wanted" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images(train: Command, data: Path, tmp_path: Path, split: str) -> None:
    for path in (data / split / "star").iterdir():
        path.unlink()
    error = train("--data", data, "--out", tmp_path / "run", "--method", "random").error
    assert f"{data / split}: no images in class folder star; add images" in error
    assert "or remove the folder" in error
    assert not (tmp_path / "run").exists()


def test_a_class_of_one_image(train: Command, data: Path, tmp_path: Path) -> None:
    """It is enough for one patch, also where dace would mix it with another of its class."""
    for path in sorted((data / "train" / "star").iterdir())[1:]:
        path.unlink()
    save_parts(new_parts(32, tmp_path / "tokenizer"), tmp_path / "model")
    model = ("--model", tmp_path / "model", "--backend", "eager", "--steps", "2", "--rho", "0.5")
    options = ("--data", data, "--method", "dace", "random", *model, *SMALL, "--no-ceiling")
    error = train(*options, "--out", tmp_path / "two", "--factor", "2").error
    assert "class 'star' has 1 training images, but ipc · factor² = 4 patches are wanted" in error
    result = train("student", *options, "--out", tmp_path / "one", "--factor", "1").result
    for method in ("dace", "random"):
        assert np.isfinite(result["students"][method]["losses"]).all()
    patches = tmp_path / "one" / "coreset" / "patches"
    assert [path.name for path in (patches / "star").iterdir()] == ["000000.png"]


def test_one_corrupt_jpeg_among_a_thousand(train: Command, tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", train_per_class=100, val_per_class=1)
    path = sorted((data / "train" / "star").iterdir())[41]
    path.write_bytes(path.read_bytes()[:700])
    options = ("coreset", "--data", data, "--method", "rded", *SMALL)
    error = train(*options, "--out", tmp_path / "run").error
    assert f"cannot decode {path}" in error
    outcome = train(*options, "--out", tmp_path / "run2", "--skip-corrupt")
    assert outcome.result["skipped_images"] == {"train": 1, "val": 0}
    assert outcome.err.count("skipped, it cannot be decoded") == 1
    manifest = json.loads((tmp_path / "run2" / "coreset" / "manifest.json").read_text())
    used = {patch["image"] for patch in manifest["provenance"]["patches"]}
    assert len(used) == 40
    assert f"star/{path.name}" not in used


def test_a_diverse_choice_and_native_scores_are_in_the_manifest(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("coreset", "--data", shapes, "--method", "rded", "random", *SMALL)
    resnet = (*options, "--teacher", "resnet18", "--scoring", "native", "--select", "k-center")
    train(*resnet, "--candidates", "2", "--factor", "2", "--out", tmp_path / "run").result  # noqa: B018
    manifests = [
        json.loads((tmp_path / "run" / name / "manifest.json").read_text())["settings"]
        for name in ("coreset", "coreset-random")
    ]
    kept = [{k: m.get(k) for k in ("selection", "candidates", "scoring")} for m in manifests]
    assert kept == [
        {"selection": "k-center", "candidates": 2, "scoring": "native"},
        {"selection": "random", "candidates": None, "scoring": None},
    ]
    told = "was run with --select = k-center, now asked for facility-location"
    again = (*resnet, "--candidates", "2", "--factor", "2", "--select", "facility-location")
    assert told in train(*again, "--out", tmp_path / "run").error
    error = train(*options, "--scoring", "native", "--out", tmp_path / "other").error
    assert "--teacher convnet-d3-w8: cannot take images of 16 px" in error
    assert "give another --scoring or another network" in error
    assert not (tmp_path / "other").exists()


def test_validation_classes_that_differ(train: Command, data: Path, tmp_path: Path) -> None:
    (data / "val" / "star").rename(data / "val" / "moon")
    error = train("--data", data, "--out", tmp_path / "run").error
    assert f"only in {data / 'train'}: star; only in {data / 'val'}: moon" in error


def test_more_doping_than_a_class_has_images(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = ("--method", "random", "--factor", "1", "--dope", "7")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "has 6 training images, but --dope 7 asks for more: give a smaller one" in error


@pytest.mark.parametrize("factor", [3, 65, 128])
def test_a_factor_that_does_not_fit_the_image(
    train: Command, shapes: Path, tmp_path: Path, factor: int
) -> None:
    options = ("--method", "rded", "--factor", str(factor), "--recipe", "small")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert f"--factor {factor}: expected a divisor of the image size, 64 px" in error


def test_engines_are_built_where_bundles_says(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out that the message of a full cache offers."""
    monkeypatch.setattr(run, "_run", lambda job, *_: {"bundles": str(job.plan.expand.bundles)})
    options = ("--model", "sdxl-tiny", "--bundles", tmp_path / "engines")
    result = train("--data", shapes, "--out", tmp_path / "run", *options).result
    assert result["bundles"] == str(tmp_path / "engines")


def test_generated_images_have_one_recipe_with_and_without_a_model(
    tmp_path: Path,
) -> None:
    """Methods are compared across commands too: random alone, on a GPU, beside dace."""
    options = RunOptions(data="shapes", out=tmp_path, method=("random",))
    for device in ("cpu", "cuda"):
        with Record() as record:
            assert planning._choose_recipe(options, device, None, record).name == "small"
    photographs = dataclasses.replace(options, data="photographs")
    with Record() as record:
        assert planning._choose_recipe(photographs, "cuda", None, record).name == "dace"


def test_an_image_size_that_the_model_cannot_make(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    save_parts(new_parts(32, tmp_path / "tokenizer"), tmp_path / "model")
    options = ("--model", tmp_path / "model", "--image-size", "34")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "--image-size 34: expected a multiple of 4, by which the VAE of model makes" in error


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


def test_a_teacher_that_cannot_be_had_is_told_before_a_run_is_replaced(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with Record() as record, RunFolder(out, record):
        (out / "teacher").mkdir()
    options = ("--data", shapes, "--out", out, "--method", "rded", "--overwrite", "--teacher")
    error = train(*options, "torchvision:resnet19").error
    assert "teacher torchvision:resnet19 is unknown: expected one of alexnet, " in error
    error = train(*options, "torchvision:resnet18").error
    assert "knows ImageNet-1k's classes by their WordNet ids; 'bars' is none" in error
    assert (out / "teacher").is_dir()


def test_large_labels_are_told_before_the_run(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_run", lambda *_: {})
    options = ("--data", shapes, "--out", tmp_path / "run", "--method", "rded")
    assert "labels:" not in train(*options, *SMALL).err
    err = train(*options, *SMALL, "--epochs", "5000000", "--overwrite").err
    assert "labels: dense, 3.7 GiB for each method, and as much again on the disk while" in err
    assert "coreset; --labels online keeps none" in err  # topk would be as large, of ten classes
    topk = ("--codec", "topk", "--top-k", "2", "--epochs", "5000000", "--overwrite")
    assert "labels: topk, 1.5 GiB for each method" in train(*options, *SMALL, *topk).err


def test_labels_that_would_be_no_smaller(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = ("--method", "rded", "--codec", "topk")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "--codec topk --top-k 10 keeps 10 of 10 probabilities, no less than dense" in error
    error = train("--data", shapes, "--out", tmp_path / "run", *options, "--top-k", "5").error
    assert "keeps 5 of 10 probabilities" in error


@pytest.mark.parametrize("codec", [("--codec", "dense"), ("--codec", "topk", "--top-k", "3")])
def test_labels_stored_first_or_recorded_make_the_same_run(
    train: Command, shapes: Path, tmp_path: Path, codec: tuple[str, ...]
) -> None:
    given = ("--data", shapes, "--method", "random", *SMALL, "--no-ceiling", *codec)
    made = {}
    for labels in ("record", "stored"):
        out = tmp_path / labels
        result = train(*given, "--labels", labels, "--out", out).result
        student = (out / "students" / "random-seed0.safetensors").read_bytes()
        made[labels] = (result["content_sha256"], result["accuracy"], student)
        assert ("labels-random" in result["seconds"]) == (labels == "stored")
        assert [path.name for path in (out / "students").iterdir()] == ["random-seed0.safetensors"]
    assert made["record"] == made["stored"]
    settings = json.loads((tmp_path / "stored" / "summary.json").read_text())["settings"]
    assert (settings["labels"], settings["codec"]) == ("stored", codec[1])
    assert settings["top_k"] == (3 if codec[1] == "topk" else None)


def test_labels_of_another_codec_than_asked_for(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    given = ("--data", shapes, "--method", "random", *SMALL, "--out", tmp_path / "run")
    train("labels", *given, "--codec", "topk", "--top-k", "3").result  # noqa: B018
    error = train("student", *given, "--no-ceiling").error
    assert "holds labels of --codec topk --top-k 3, asked for --codec dense: give" in error


def test_a_recording_cut_short_under_finished_students_is_made_again(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise OSError("as if killed")

    given = ("student", "--data", shapes, "--method", "random", *SMALL, "--no-ceiling")
    train(*given, "--out", tmp_path / "whole").result  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(run_labels, "attach_labels", killed)
        assert "as if killed" in train(*given, "--out", tmp_path / "cut").error
    recording = tmp_path / "cut" / "students" / "random.labels.partial"
    os.truncate(recording, 100)
    told = train(*given, "--out", tmp_path / "cut")
    assert told.result["students"]["random"]["losses"]
    assert f"labels: {recording} was cut short or is of other labels: begun anew" in told.err
    stored = [tmp_path / out / "coreset" / "labels.safetensors" for out in ("whole", "cut")]
    assert stored[0].read_bytes() == stored[1].read_bytes()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cuda"], "torch finds no CUDA GPU here: run on a machine with an NVIDIA GPU"),
        (["--backend", "trt"], "the trt backend needs an NVIDIA GPU (torch finds none"),
        (["--backend", "inductor", "--precision", "fp16"], "fp32 or bf16 on the CPU, not fp16"),
        (["--backend", "ort", "--precision", "bf16"], "the ort backend runs fp32 on the CPU"),
    ],
)
def test_what_this_machine_lacks_is_told_before_anything_is_trained(
    train: Command, shapes: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    assert told in train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_an_image_that_cannot_be_decoded_is_named(
    train: Command, data: Path, tmp_path: Path, damage: str
) -> None:
    path = sorted((data / "train" / "star").iterdir())[2]
    path.write_bytes(path.read_bytes()[:700] if damage == "cut" else b"this is no picture\n")
    options = ("--method", "rded", *SMALL)
    error = train("coreset", "--data", data, "--out", tmp_path / "run", *options).error
    assert str(path) in error
    assert "--skip-corrupt" in error


def test_skip_corrupt_goes_on_and_counts(train: Command, data: Path, tmp_path: Path) -> None:
    damaged = [sorted((data / "train" / name).iterdir())[0] for name in ("star", "disc")]
    damaged.append(next((data / "val" / "ring").iterdir()))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:700])
    options = ("--skip-corrupt", "--method", "rded", *SMALL)
    outcome = train("coreset", "--data", data, "--out", tmp_path / "run", *options)
    assert outcome.result["skipped_images"] == {"train": 2, "val": 1}
    for path in damaged:
        assert f"skipped, it cannot be decoded: {path}" in outcome.err
    path = sorted((data / "train" / "star").iterdir())[1]
    path.write_bytes(b"")
    path.with_name("00002.jpg").write_bytes(b"")
    error = train("coreset", "--data", data, "--out", tmp_path / "again", *options).error
    assert "class 'star' has 3 training images, but ipc · factor² = 4 patches are wanted" in error


def test_a_changed_byte_in_a_coreset(train: Command, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data", shapes, "--out", out, "--method", "random", *SMALL)
    train("coreset", *options).result  # noqa: B018
    path = out / "coreset" / "patches" / "star" / "000001.png"
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    error = train("student", *options).error
    assert f"{path} is not as the coreset stage left it (it was changed)" in error
    path.unlink()
    error = train("student", *options).error
    assert "(it is missing)" in error
    assert "restore it, or start again with --overwrite" in error


def test_other_options_than_before_are_refused(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--out", tmp_path / "run", "--method", "random", *SMALL)
    first = train("teacher", *options).result
    assert first == train("teacher", *options).result
    error = train("teacher", *options, "--seed", "7").error
    assert "was run with --seed = 0, now asked for 7: give the same options" in error
    error = train("teacher", *options, "--teacher-epochs", "3").error
    assert "was run with --teacher-epochs = 1, now asked for 3" in error
    again = train("teacher", *options, "--seed", "7", "--overwrite").result
    assert again["teacher"]["sha256"] != first["teacher"]["sha256"]
    dace = ("coreset", "--data", shapes, "--out", tmp_path / "dace", "--model", "sdxl-tiny", *SMALL)
    train(*dace).result  # noqa: B018
    error = train(*dace, "--mixup-weight", "0.5").error
    assert "was run with --mixup-weight = uniform, now asked for 0.5" in error


def test_what_was_asked_for_is_written_down_once(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--data", shapes, "--out", out, "--method", "random", *SMALL, "--cutmix", "on")
    train("teacher", *options)
    first = (out / "config.json").read_text()
    assert json.loads(first)["student"]["cutmix"] is True
    assert "was run with --seed = 0" in train("teacher", *options, "--seed", "7").error
    assert (out / "config.json").read_text() == first
    sessions = json.loads((out / "environment.json").read_text())
    assert ["--seed 7" in session["command"] for session in sessions] == [False, True]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any(line.get("said", "").startswith("data: ") for line in lines)


def test_a_teacher_that_is_brought_along_is_measured_like_one_that_is_trained(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--method", "random", *SMALL)
    network = ("--teacher", "convnet-d4-w24to96")  # the recipe's, which a state dict is taken for
    trained = train("teacher", *options, *network, "--out", tmp_path / "a").result["teacher"]
    torch.save(load_file(tmp_path / "a" / "teacher" / "teacher.safetensors"), tmp_path / "w.pth")
    train("coreset", *options, "--teacher", tmp_path / "w.pth", "--out", tmp_path / "b").result  # noqa: B018
    manifest = json.loads((tmp_path / "b" / "coreset" / "manifest.json").read_text())
    assert manifest["teacher"]["accuracy"] == trained["accuracy"]
    assert manifest["teacher"]["sha256"] == trained["sha256"]


def test_a_network_too_deep_for_the_images_is_told_first(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    error = train(
        "--data", shapes, "--out", tmp_path / "run", "--method", "random",
        "--student", "torchvision:alexnet", "--image-size", "32",
    ).error  # fmt: skip
    assert "--student torchvision:alexnet: cannot take images of 32 px" in error
    assert "larger --image-size" in error


def test_a_coreset_tells_where_each_patch_was_cut(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--method", "rded", *SMALL)
    train("coreset", *options, "--out", tmp_path / "a").result  # noqa: B018
    chosen = coreset.open_coreset(tmp_path / "a" / "coreset")
    origins = chosen.manifest["provenance"]["patches"]
    assert len(origins) == len(chosen.labels_N)
    for origin, patch_HWC, label in zip(
        origins, chosen.patches().numpy(), chosen.labels_N.tolist(), strict=True
    ):
        assert origin["image"].split("/")[-2] == chosen.class_ids[label]
        assert origin["loss"] >= 0
        top, left, height, width = origin["top_left_height_width"]
        with Image.open(shapes / "train" / origin["image"].removeprefix("train/")) as image:
            box = (left, top, left + width, top + height)
            side = chosen.settings["patch_px"]
            cut = image.convert("RGB").crop(box).resize((side, side), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(cut).astype(int) - patch_HWC).max() <= 1


def test_another_process_at_work_in_the_folder(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--out", tmp_path / "run", "--method", "rded", *SMALL)
    with Record() as record, RunFolder(tmp_path / "run", record):
        (tmp_path / "run" / "teacher").mkdir()
        for option in ("--resume", "--overwrite"):
            error = train(*options, option).error
            assert f"another process works in {tmp_path / 'run'}" in error
        assert (tmp_path / "run" / "teacher").is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes more rights than this user has")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(train: Command, shapes: Path, small_disk: Path) -> None:
    options = ("--data", shapes, "--method", "rded", *SMALL, "--teacher", "convnet-d3-w64")
    error = train("--out", small_disk / "run", *options).error
    assert f"no space left for {small_disk / 'run'}" in error
    assert "free some, or choose an --out on another disk" in error


@pytest.mark.parametrize("full", ["teacher", "coreset", "students", "stages"])
def test_a_disk_that_is_full_at_any_moment_and_resumed(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """As the small disk, at every writer and for every user: the kernel's error, then --resume."""
    out = tmp_path / "run"

    def refuse(path: Path, data: bytes) -> None:
        if full in path.parts[len(out.parts) :]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    write = durable.write_durably
    with monkeypatch.context() as patch:
        for module in (durable, coreset):
            patch.setattr(module, "write_durably", refuse)
        options = ("--data", shapes, "--out", out, "--method", "random", "--no-ceiling", *SMALL)
        error = train(*options).error
    assert f"no space left for {out}" in error
    assert set(train(*options, "--resume").result["accuracy"]) == {"random"}


def test_an_interrupted_download(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from patchbloom.export import hub

    def cut(*_: object, local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise ConnectionError("Connection broken: IncompleteRead(1048576 bytes read)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    monkeypatch.setattr(hub, "_listing", lambda *_: [])
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


def test_the_main_job_leaves_numbers_pictures_and_one_page(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    outcome = train("--data", shapes, "--out", out, "--method", "random,rded", *SMALL)
    result = outcome.result
    assert list(result["accuracy"]) == list(result["images_per_s"]) == ["random", "rded"]
    for mean, std in [*result["accuracy"].values(), result["ceiling"]]:
        assert 0 <= mean <= 100
        assert std is None  # of one student
    assert result["bytes"]["rded"]["with_labels"] > result["bytes"]["rded"]["without_labels"] > 0
    stages = ["teacher", "coreset", "student-random", "student-rded", "student-real"]
    assert list(result["seconds"]) == stages
    assert "fresh real images (ceiling)" in outcome.out
    assert len(list(out.glob("coreset/patches/*/*.png"))) == 40
    assert len(list(out.glob("coreset-rded/patches/*/*.png"))) == 40
    assert list(out.glob("tensorboard/events.*"))
    pictures = {path.stem for path in out.glob("pictures/*.png")}
    assert pictures == {
        *("coreset", "curves", "rendered-random", "rendered-rded", "rendered-real"),
    }
    page = (out / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == len(pictures)
    assert "http" not in page.replace(str(tmp_path), "")
    summary = json.loads((out / "summary.json").read_text())
    assert all(float(f"{number:.6g}") == number for number in floats(summary))
    assert not any(str(loss) in page for loss in summary["teacher"]["losses"])
    (out / "report.html").unlink()
    train("report", out).result  # noqa: B018
    assert (out / "report.html").read_text() == page


def test_the_generated_set_is_written_once(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("--data", "shapes", "--shapes-per-class", "5", "--method", "random", *SMALL)
    first = train("coreset", *options, "--out", tmp_path / "a")
    assert "writing the generated set" in first.err
    again = train("coreset", *options, "--out", tmp_path / "b")
    assert "writing the generated set" not in again.err
    names = [o.result["coresets"]["random"]["content_sha256"] for o in (first, again)]
    assert names[0] == names[1]
    (folder,) = (tmp_path / "cache" / "patchbloom").iterdir()
    assert len(list(folder.glob("train/*/*.jpg"))) == 50
    assert len(list(folder.glob("val/*/*.jpg"))) == 10


def test_a_prior_is_made_resumed_and_not_mixed(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    steps = [f"--{name.replace('_', '-')}" for name in PRIOR_CONFIG if name.endswith("_steps")]
    batches = ("--vae-batch", "2", "--unet-batch", "2", "--substeps", "1", "--image-size", "32")
    options = ("--data", shapes, "--out", out, *batches, *(w for s in steps for w in (s, "1")))
    result = train("prior", *options).result
    assert result["images"] == 60
    assert result["card"]["class_names"] == sorted(p.name for p in (shapes / "train").iterdir())
    assert str(tmp_path) not in json.dumps({**result["card"], "made_by": ""})
    assert "is not empty: --resume or --overwrite the model there" in train("prior", *options).error
    again = train("prior", *options, "--resume").result
    assert again["weights_sha256"] == result["weights_sha256"]
    error = train("prior", *options, "--resume", "--seed", "3").error
    assert "was begun with --seed 0, now 3: give the same options to --resume" in error
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    for option in ("--overwrite", "--resume"):
        error = train("prior", *options, option, "--out", tmp_path / "other").error
        assert "is not empty: choose another --out" in error
