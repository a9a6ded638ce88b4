"""A coreset folder alone trains the run's own students; `train verify` finds label drift."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import runner, write_small_model
from label_cases import LabelBlock, label_online
from patchbloom.engine.coreset.coreset import Coreset, attach_labels, open_coreset
from patchbloom.engine.labels.codecs import CodecName
from patchbloom.train import cli
from patchbloom.train.commands import verify as drift
from patchbloom.train.config import StudentConfig
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.labels.views import make_views, pools
from patchbloom.train.methods.source import UpsampledPatches
from patchbloom.train.teacher.given import load_teacher
from patchbloom.train.teacher.teacher import Teacher
from safetensors.torch import load_file
from torch.nn.functional import kl_div

METHODS = ("dace", "rded", "random", "upsample", "t2i")
RUN = (
    *("--method", *METHODS, "--backend", "eager", "--no-ceiling", "--seeds", "2", "--seed", "3"),
    *("--recipe", "rded", "--factor", "2", "--image-size", "32", "--epochs", "3"),  # with CutMix
    *("--batch", "8"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "1", "--student", "convnet-d3-w8"),
    *("--steps", "2", "--rho", "0.5", "--refresh", "0.5", "--student-precision", "bf16"),
    *("--mixup-weight", "beta:0.5"),
)

Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    run = runner(capsys)
    return lambda *arguments: run(*arguments).told


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/ with random weights, and run/, a finished run of METHODS."""
    folder = tmp_path_factory.mktemp("given")
    write_shapes(folder / "data", train_per_class=5, val_per_class=2)
    write_small_model(folder)
    places = ("--data", folder / "data", "--model", folder / "model", "--out", folder / "run")
    assert cli.main([*map(str, places), *RUN]) == 0
    return folder


@pytest.fixture
def elsewhere(given: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a coreset of the run to another folder."""

    def copied(method: str) -> Path:
        name = "coreset" if method == "dace" else f"coreset-{method}"
        return Path(shutil.copytree(given / "run" / name, tmp_path / f"copied-{method}"))

    return copied


def _relabelled(folder: Path, codec: CodecName = "dense", **changed: Any) -> Coreset:
    """Rewrite the labels with changed settings; None removes one."""
    coreset = open_coreset(folder)
    stored = coreset.soft_labels()
    assert stored is not None
    logits = [stored.targets(e, torch.arange(stored.samples)).labels for e in range(stored.epochs)]
    settings = {k: v for k, v in {**stored.settings, **changed}.items() if v is not None}
    block = LabelBlock(
        codec=codec,
        logits=torch.stack(logits).float(),
        temperature=stored.temperature,
        k=3,
        settings=settings,
    )
    return attach_labels(folder, block)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_elsewhere_is_the_runs_own(
    train: Train, given: Path, elsewhere, tmp_path: Path, method: str
) -> None:
    coreset, out = elsewhere(method), tmp_path / "out"
    options = ("--coreset", coreset, "--out", out, "--backend", "eager", "--seeds", "2")
    model = ("--model", given / "model") if method == "dace" else ()
    result = train("student", *options, *model, "--data", given / "data")
    for seed in (3000, 3001):
        name = f"students/{method}-seed{seed}.safetensors"
        then, now = load_file(given / "run" / name), load_file(out / name)
        assert then.keys() == now.keys()
        assert all(torch.equal(then[key], now[key]) for key in then)
    told = json.loads((given / "run" / "summary.json").read_text())["accuracy"][method]
    assert result["accuracy"] == told
    assert result["coreset"] == open_coreset(coreset).content_sha256
    again = train("student", *options, *model, "--data", given / "data")
    assert again == result


def test_students_need_no_images_and_may_be_others(train: Train, elsewhere, tmp_path: Path) -> None:
    options = ("--coreset", elsewhere("upsample"), "--out", tmp_path / "out")
    result = train("student", *options, "--seeds", "1")
    assert result["accuracy"] is None
    assert result["validation_images"] is None
    assert len(result["students"]["losses"][0]) == 3
    told = train("student", *options, "--seeds", "1", "--learning-rate", "0.01")["error"]
    assert "was run with --learning-rate = 0.001, now asked for 0.01" in told
    other = ("--overwrite", "--epochs", "2", "--student", "convnet-d3-w16", "--batch", "4")
    result = train("student", *options, *other, "--seed", "9", "--seeds", "1")
    assert result["students"]["seeds"] == [9000]
    assert len(result["students"]["losses"][0]) == 2


def test_validation_images_that_changed_are_told_at_a_resume(
    train: Train, given: Path, elsewhere, tmp_path: Path
) -> None:
    """Under the same names and sizes; in another folder they are still the same images."""
    data, out = tmp_path / "data", tmp_path / "out"
    options = ("--coreset", elsewhere("upsample"), "--out", out, "--seeds", "1", "--epochs", "1")
    first = train("student", *options, "--data", given / "data")
    shutil.copytree(given / "data", data)
    assert train("student", *options, "--data", data) == first
    dark = data / "val" / "ring" / "00001.jpg"
    dark.write_bytes(bytes(dark.stat().st_size))
    error = train("student", *options, "--data", data)["error"]
    assert f"the images have changed since {out} was begun: 1 have other content (val/ring" in error
    assert "(val/ring/00001.jpg): give the same images, or start again with --over" in error
    assert train("student", *options, "--data", given / "data") == first


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--epochs", "4"], "--epochs 4: expected 3 at most, which have labels"),
        (["--batch", "10"], "--batch 10: expected a divisor of 1024, the samples among which"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--student", "resnet19"], "--student resnet19: network 'resnet19' is unknown"),
        (["--model", "nowhere"], "unknown model 'nowhere': it is neither a folder nor one of"),
        ([], "give the folder that holds them with --model"),
        (
            ["--precision", "fp16", "--backend", "ort", "--device", "cpu"],
            "are made in fp16: the ort",
        ),
        (["--model", "sdxl-tiny"], "model sdxl-tiny: expected the weights that"),
    ],
)
def test_what_cannot_be_trained_is_told(
    train: Train, elsewhere, tmp_path: Path, monkeypatch, options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    coreset = elsewhere("dace")
    error = train("student", "--coreset", coreset, "--out", tmp_path / "out", *options)["error"]
    assert told in error


def test_a_coreset_is_not_overwritten_by_its_students(train: Train, given: Path) -> None:
    run = given / "run"
    error = train("student", "--coreset", run / "coreset", "--out", run, "--overwrite")["error"]
    assert "lies in --out" in error
    assert open_coreset(run / "coreset")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"student": None}, "expected the students' recipe (network, batch, learning rate, …)"),
        ({"views": None}, "expected what its labels are of in labels.settings.source and .views"),
        ({"student": {"batch": 8, "colour": "red"}}, "settings of another version of patchbloom"),
        (
            {"source": {"method": "upsample", "size_px": 64, "upsampling": "bicubic"}},
            "stored labels were made for source with size_px = 64, now it is 32",
        ),
    ],
)
def test_a_manifest_that_says_too_little_is_refused(
    train: Train, elsewhere, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    folder = elsewhere("upsample")
    _relabelled(folder, **changed)
    options = ("--coreset", folder, "--out", tmp_path / "out")
    assert told in train("student", *options)["error"]


def test_labels_that_a_coreset_has_not_are_refused(train: Train, given: Path, elsewhere) -> None:
    folder = elsewhere("rded")
    label_online(folder)
    teacher = given / "run" / "teacher" / "teacher.safetensors"
    error = train("verify", "--coreset", folder, "--teacher", teacher)["error"]
    assert "holds no soft labels" in error
    assert f"train student --coreset {folder} --targets hard" in error


@pytest.mark.parametrize("method", METHODS)
def test_labels_have_not_drifted_where_they_were_made(
    train: Train, given: Path, elsewhere, method: str
) -> None:
    """CutMix views from few rendered images equal those from the whole pool."""
    teacher = given / "run" / "teacher" / "teacher.safetensors"
    options = ("--coreset", elsewhere(method), "--teacher", teacher, "--samples", "20")
    model = ("--model", given / "model", "--backend", "eager") if method == "dace" else ()
    result = train("verify", *options, *model)
    (measured,) = result["drift"]
    assert result["same_teacher"]
    assert measured["backend"] == ("eager" if method == "dace" else None)
    assert (measured["samples"], measured["epochs"]) == (20, 3)
    assert 20 < measured["rendered"] <= 40
    # dace renders in other batches, which may round fp16 logits to a neighbouring value.
    assert measured["kl"]["max"] <= 1e-6 * (method == "dace")
    assert measured["top1_agreement"] >= 0.95
    assert measured["control_kl"]["p50"] > 10 * measured["kl"]["max"]


@pytest.mark.parametrize("codec", ["topk", "pca"])
def test_labels_of_other_codecs_have_not_drifted_either(
    train: Train, given: Path, elsewhere, codec: CodecName
) -> None:
    folder = elsewhere("upsample")
    _relabelled(folder, codec)
    teacher = given / "run" / "teacher" / "teacher.safetensors"
    result = train("verify", "--coreset", folder, "--teacher", teacher)
    assert result["codec"] == codec
    assert result["drift"][0]["kl"]["max"] == 0
    assert result["drift"][0]["control_kl"]["mean"] > 0


@pytest.mark.parametrize("codec", ["dense", "pca"])
def test_a_drift_is_told_and_another_teacher_is_refused(
    train: Train, given: Path, elsewhere, tmp_path: Path, codec: CodecName
) -> None:
    """The other teacher's answers count whole, not projected on the first one's components."""
    folder, path = elsewhere("upsample"), given / "run" / "teacher" / "teacher.safetensors"
    _relabelled(folder, codec)
    other = load_teacher(str(path), open_coreset(folder).class_ids)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save(tmp_path / "other.safetensors")
    options = ("--coreset", folder, "--teacher", tmp_path / "other.safetensors")
    error = train("verify", *options)["error"]
    assert "expected the teacher that made the labels, sha256" in error
    assert "--other-teacher" in error
    drifts = [
        train("verify", *options, "--other-teacher", "--samples", "20", "--seed", seed)["drift"][0]
        for seed in "001"
    ]
    first, again, others = ({k: v for k, v in d.items() if k != "seconds"} for d in drifts)
    assert first == again != others
    result = train("verify", *options, "--other-teacher")
    assert not result["same_teacher"]
    (measured,) = result["drift"]
    assert measured["samples"] == 120  # all of them
    expected_S = _divergences(open_coreset(folder), other)
    assert measured["kl"]["mean"] == pytest.approx(float(expected_S.mean()), rel=1e-3)
    assert measured["kl"]["max"] == pytest.approx(float(expected_S.max()), rel=1e-3)


def _divergences(coreset: Coreset, teacher: Teacher) -> torch.Tensor:
    """KL(stored || now) of every (sample, epoch) of an upsampled coreset, from whole pools."""
    stored = coreset.soft_labels()
    assert stored is not None
    views = stored.settings["views"]
    assert views["views"] == "fp16"
    config = StudentConfig(**{**views, "crop_scale": tuple(views["crop_scale"])})
    source = UpsampledPatches(
        method="upsample",
        patches_NHWC=coreset.patches(),
        labels_N=coreset.labels_N,
        class_ids=coreset.class_ids,
        size_px=config.size_px,
    )
    found = []
    for epoch in range(stored.epochs):
        for samples_P in pools(config, source.labels_N, epoch):
            views_PCHW = make_views(source.render(samples_P, epoch), samples_P, epoch, config)
            now_PK = (teacher.logits(views_PCHW).half().double() / 20).log_softmax(1)
            then_PK = (stored.targets(epoch, samples_P).labels.double() / 20).softmax(1)
            found.append(kl_div(now_PK, then_PK, reduction="none").sum(1))
    return torch.cat(found)


@pytest.mark.parametrize("compiled", ["eager", pytest.param("ort", marks=pytest.mark.slow)])
def test_each_backend_and_precision_asked_for_is_measured(
    train: Train, given: Path, elsewhere, tmp_path: Path, compiled: str
) -> None:
    teacher = given / "run" / "teacher" / "teacher.safetensors"
    options = ("--coreset", elsewhere("dace"), "--teacher", teacher, "--model", given / "model")
    backends = ("--backend", "eager", compiled, "--bundles", tmp_path / "bundles")
    result = train("verify", *options, *backends, "--samples", "30")
    assert [each["backend"] for each in result["drift"]] == ["eager", compiled]
    assert all(each["kl"]["max"] < 1e-6 for each in result["drift"])
    bf16 = train("verify", *options, "--backend", "eager", "--precision", "bf16")
    assert bf16["drift"][0]["precision"] == "bf16"
    assert 0 < bf16["drift"][0]["kl"]["mean"] < bf16["drift"][0]["control_kl"]["mean"]


def test_pairs_are_of_few_epochs_and_never_twice() -> None:
    config, labels_N = StudentConfig(epochs=40, pool=16, batch=1), torch.arange(96) // 2
    chosen = list(drift.chosen_pairs(config, labels_N, 60, seed=0))
    assert len({epoch for _, epoch, _ in chosen}) == len(chosen) == drift.EPOCHS_LOOKED_AT
    assert sum(len(rows_S) for *_, rows_S in chosen) == 60
    for samples_P, epoch, rows_S in chosen:
        assert len(rows_S.unique()) == len(rows_S)
        assert any(torch.equal(samples_P, pool) for pool in pools(config, labels_N, epoch))


def test_the_divergence_is_the_formula() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert float(drift.kl(p, q)) == pytest.approx(0.6931471805, abs=1e-9)
    assert float(drift.kl(q, q)) == 0
