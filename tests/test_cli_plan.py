"""Choices, messages and refusals of `train` before training: model, networks, machine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from cli_cases import SMALL, Command, Outcome, write_small_model, write_small_set
from patchbloom.engine import cli as engine_cli
from patchbloom.engine.builds import needs
from patchbloom.train.commands import pipeline, planning
from patchbloom.train.commands import train as run
from patchbloom.train.options import RunOptions
from patchbloom.train.prior.model import new_parts, save_parts
from patchbloom.train.run.folder import RunFolder
from patchbloom.train.run.progress import Report


@pytest.fixture
def engine(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `engine ...` in this process."""

    def run_engine(*arguments: str | Path) -> Outcome:
        code = engine_cli.main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return Outcome(code, told.out, told.err)

    return run_engine


def test_generated_images_have_one_recipe_with_and_without_a_model(
    tmp_path: Path,
) -> None:
    """Methods are compared across commands: random alone trains as beside dace, also on a GPU."""
    options = RunOptions(data="shapes", out=tmp_path, method=("random",))
    for device in ("cpu", "cuda"):
        with Report() as record:
            assert planning._choose_recipe(options, device, None, record).name == "small"
    photographs = dataclasses.replace(options, data="photographs")
    with Report() as record:
        assert planning._choose_recipe(photographs, "cuda", None, record).name == "dace"


def test_engines_are_built_where_bundles_says(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a full cache suggests --bundles."""
    monkeypatch.setattr(run, "_run", lambda job, *_: {"bundles": str(job.plan.expand.bundles)})
    options = ("--model", "sdxl-tiny", "--bundles", tmp_path / "engines")
    result = train("--data", shapes, "--out", tmp_path / "run", *options).result
    assert result["bundles"] == str(tmp_path / "engines")


def test_a_run_has_its_engines_first(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed build costs no teacher, --build-only builds the very engines of a run, and a resumed
    run with other options builds none."""
    write_small_model(tmp_path)
    data, out = write_small_set(tmp_path), tmp_path / "run"
    options = ("--data", data, "--model", tmp_path / "model", *SMALL, "--no-ceiling")
    given = (*options, "--bundles", tmp_path / "engines")
    built = train(*given, "--out", out, "--build-only").result["engines"]
    assert built.keys() == {"dace"}
    assert not out.exists()
    encoder = tmp_path / "engines" / built["dace"]["engine"] / "encoder.onnx"
    encoder.rename(tmp_path / "encoder.onnx")
    error = train(*given, "--out", out).error
    assert f"{built['dace']['engine']}/encoder.onnx is missing" in error
    assert not (out / "stages" / "teacher.json").exists()
    (tmp_path / "encoder.onnx").rename(encoder)
    run = train(*given, "--out", out, "--overwrite")
    assert run.result["accuracy"].keys() == {"dace"}
    assert "building it" not in run.err
    assert sorted(path.name for path in (tmp_path / "engines").glob("[!.]*")) == sorted(
        engine["engine"] for engine in built.values()
    )
    monkeypatch.setattr(pipeline, "find_or_build_engines", lambda *_: pytest.fail("built"))
    resumed = train(*given, "--out", out, "--seed", "1", "--resume")
    assert "--seed = 0, now asked for 1" in resumed.error


def test_cards_to_build_for_need_tensorrt(train: Command, shapes: Path, tmp_path: Path) -> None:
    given = ("--data", shapes, "--out", tmp_path / "run", "--build-only")
    assert "--build-only a6000: cards are for --backend trt" in train(*given, "a6000").error
    assert "this command opens no engine" in train(*given, "--backend", "eager").error
    assert "this command opens no engine" in train("teacher", *given).error
    error = train(*given, "h100", "--backend", "trt").error
    assert "--build-only h100: TensorRT for RTX does not build for sm90" in error


def test_an_engine_for_a_card_elsewhere_is_of_the_model_that_runs_there(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card the default model is sdxl-turbo, whatever this machine has."""
    monkeypatch.setattr(planning, "find_model", lambda name: pytest.fail(f"took {name}"))
    given = ("--data", shapes, "--out", tmp_path / "run", "--backend", "trt")
    with pytest.raises(pytest.fail.Exception, match="took sdxl-turbo"):
        train(*given, "--build-only", "a6000")


@pytest.mark.parametrize("factor", [3, 65, 128])
def test_a_factor_that_does_not_fit_the_image(
    train: Command, shapes: Path, tmp_path: Path, factor: int
) -> None:
    options = ("--method", "rded", "--factor", str(factor), "--recipe", "small")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert f"--factor {factor}: expected a divisor of the image size, 64 px" in error


def test_an_image_size_that_the_model_cannot_make(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    save_parts(new_parts(32, tmp_path / "tokenizer"), tmp_path / "model")
    options = ("--model", tmp_path / "model", "--image-size", "34")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "--image-size 34: expected a multiple of 4, by which the VAE of model makes" in error


def _refused_early(train: Command, data: Path, out: Path, *options: str | Path) -> str:
    error = train("--data", data, "--out", out, *SMALL, "--device", "cpu", *options).error
    assert not out.exists()
    return error


@pytest.mark.parametrize(
    "changes",
    [{"prediction_type": "v_prediction"}, {"_class_name": "DDIMScheduler"}, {"beta_end": "high"}],
)
def test_a_model_for_another_scheduler_is_refused_before_anything_is_trained(
    train: Command, engine: Command, shapes: Path, tmp_path: Path, changes: dict
) -> None:
    write_small_model(tmp_path)
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    error = _refused_early(train, shapes, tmp_path / "run", "--model", tmp_path / "model")
    assert str(config) in error
    assert "edit" not in error
    built = engine("build", "--model", tmp_path / "model", "--device", "cpu", "--backend", "ort")
    assert (built.code, str(config) in built.err) == (2, True)


def test_a_long_prompt_or_a_damaged_tokenizer_is_told_before_anything_is_trained(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    write_small_model(tmp_path)
    options = ("--model", tmp_path / "model", "--prompt")
    error = _refused_early(train, shapes, tmp_path / "run", *options, "a very long {name} " * 9)
    assert "expected at most 77 tokens" in error
    tokenizer = tmp_path / "model" / "tokenizer_2"
    (tokenizer / "tokenizer.json").write_text("{}")
    error = _refused_early(train, shapes, tmp_path / "run", *options, "a {name}")
    assert f"{tokenizer} is damaged" in error
    shutil.rmtree(tokenizer)
    error = _refused_early(train, shapes, tmp_path / "run", *options, "a {name}")
    assert f"{tokenizer / 'tokenizer_config.json'} is missing" in error


def test_a_folder_that_cannot_hold_engines_is_told_before_anything_is_trained(
    train: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_model(tmp_path)
    (tmp_path / "file").touch()
    options = ("--model", tmp_path / "model", "--backend", "ort", "--bundles")
    error = _refused_early(train, shapes, tmp_path / "run", *options, tmp_path / "file" / "engines")
    assert f"({tmp_path / 'file'} is not a folder that you may write to)" in error
    monkeypatch.setattr(needs, "free_disk_bytes", lambda _: 1000)
    error = _refused_early(train, shapes, tmp_path / "run", *options, tmp_path / "engines")
    assert "this engine needs at least" in error
    assert "choose another folder with --bundles" in error


def test_an_unknown_model(train: Command, shapes: Path, tmp_path: Path) -> None:
    error = train("--data", shapes, "--out", tmp_path / "run", "--model", "sdxl-huge").error
    assert "unknown model 'sdxl-huge': it is neither a folder nor one of sdxl-turbo" in error


def test_a_folder_that_is_no_model(train: Command, shapes: Path, tmp_path: Path) -> None:
    error = train("--data", shapes, "--out", tmp_path / "run", "--model", shapes).error
    assert "is not a model in diffusers' SDXL layout" in error


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
    assert "run the same command again to resume where it stopped" in error


@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_an_unknown_network(train: Command, shapes: Path, tmp_path: Path, option: str) -> None:
    options = ("--method", "rded", option, "resnet19")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert f"{option} resnet19" in error
    assert not (tmp_path / "run").exists()


def test_a_network_too_deep_for_the_images_is_told_first(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    error = train(
        "--data", shapes, "--out", tmp_path / "run", "--method", "random",
        "--student", "torchvision:alexnet", "--image-size", "32",
    ).error  # fmt: skip
    assert "--student torchvision:alexnet: cannot take images of 32 px" in error
    assert "larger --image-size" in error


def test_a_teacher_that_cannot_be_had_is_told_before_a_run_is_replaced(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with Report() as record, RunFolder(out, record):
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
    assert "coreset; --codec pca keeps less, --labels online keeps none" in err
    pca = ("--codec", "pca", "--epochs", "5000000", "--overwrite")
    err = train(*options, *SMALL, *pca).err
    assert "labels: pca, 1.7 GiB for each method" in err  # nine components, ten classes
    assert "coreset; --labels online keeps none" in err
    topk = ("--codec", "topk", "--top-k", "2", "--epochs", "5000000", "--overwrite")
    assert "labels: topk, 1.5 GiB for each method" in train(*options, *SMALL, *topk).err


def test_labels_that_would_be_no_smaller(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = ("--method", "rded", "--codec", "topk")
    error = train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert "--codec topk --top-k 10 keeps 10 of 10 probabilities, no less than dense" in error
    error = train("--data", shapes, "--out", tmp_path / "run", *options, "--top-k", "5").error
    assert "keeps 5 of 10 probabilities" in error


def test_components_that_answers_do_not_have(train: Command, shapes: Path, tmp_path: Path) -> None:
    given = ("--data", shapes, "--out", tmp_path / "run", "--method", "rded", "--codec", "pca")
    told = "--codec pca --components 10: answers about 10 classes have 9 components: give fewer"
    assert told in train(*given, "--components", "10").error
    assert "--components 0: expected 1 or more" in train(*given, "--components", "0").error
    assert "--components 257: expected 256 at most" in train(*given, "--components", "257").error
    error = train(*given, "--codec", "topk", "--components", "3").error
    assert "--components has no use with --codec topk: leave it out" in error


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cuda"], "torch finds no CUDA GPU here: run on a machine with an NVIDIA GPU"),
        (["--backend", "trt"], "the trt backend needs an NVIDIA GPU (torch finds none"),
        (["--backend", "inductor", "--precision", "fp16"], "fp32 or bf16 on the CPU, not fp16"),
        (
            ["--backend", "ort", "--precision", "bf16"],
            "the ort backend runs fp32 and int8 on the CPU",
        ),
    ],
)
def test_what_this_machine_lacks_is_told_before_anything_is_trained(
    train: Command, shapes: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    assert told in train("--data", shapes, "--out", tmp_path / "run", *options).error
    assert not (tmp_path / "run").exists()
