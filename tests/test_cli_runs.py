"""Output of each command: the main job, and coresets, labels, teacher and prior alone."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from cli_cases import SMALL, Command
from patchbloom.engine.coreset import coreset
from patchbloom.train.commands.planning import make_plan
from patchbloom.train.config import PriorConfig
from patchbloom.train.options import Train
from patchbloom.train.report import summary
from patchbloom.train.report.compute import method_compute
from patchbloom.train.run.progress import Report
from PIL import Image
from safetensors.torch import load_file


def floats(value: Any) -> list[float]:
    """All floats in plain JSON."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return [number for entry in entries for number in floats(entry)]
    return [value] if isinstance(value, float) else []


def test_the_main_job_leaves_numbers_pictures_and_one_page(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    outcome = train("--data", shapes, "--out", out, "--method", "random,rded", *SMALL)
    result = outcome.result
    assert list(result["accuracy"]) == list(result["images_per_s"]) == ["random", "rded"]
    for mean, std in [*result["accuracy"].values(), result["ceiling"]]:
        assert 0 <= mean <= 100
        assert std is None  # one student
    assert result["bytes"]["rded"]["with_labels"] > result["bytes"]["rded"]["without_labels"] > 0
    stages = ["teacher", "coreset", "student-random", "student-rded", "student-real"]
    assert list(result["seconds"]) == stages
    assert "fresh real images (ceiling)" in outcome.out
    assert len(list(out.glob("coreset/patches/*/*.png"))) == 40
    assert len(list(out.glob("coreset-rded/patches/*/*.png"))) == 40
    assert {path.parent.name for path in out.glob("tensorboard/*/events.*")} == {
        *("teacher", "random", "rded", "real"),
    }
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
    views = 4 * 10  # one epoch of four samples of ten classes; five crops of sixty images scored
    assert summary["compute"] == {
        "random": {"student_samples": views, "teacher_queries": views, "generator_tflop": 0},
        "rded": {"student_samples": views, "teacher_queries": views + 300, "generator_tflop": 0},
    }
    by_class = summary["students"]["rded"]["class_accuracies"]
    assert [np.mean(each) for each in by_class] == [
        pytest.approx(accuracy, abs=0.01) for accuracy in summary["students"]["rded"]["accuracies"]
    ]
    rows = page[page.index("<summary>By class") : page.index("</details>")].count("<tr>")
    assert rows == len(summary["data"]["class_names"]) + 1
    best = max(summary["accuracy"].items(), key=lambda item: item[1][0])
    assert f"<p class='headline'>{best[0]} {best[1][0]:.1f} %: " in page
    chart = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    drawn = [float((bar.find("text").text or "").split()[0]) for bar in chart.findall("g")]  # pyright: ignore
    told = [summary["ceiling"], *summary["accuracy"].values()]
    assert drawn == sorted((round(mean, 1) for mean, _ in told), reverse=True)
    assert [len(bar.findall("circle")) for bar in chart.findall("g")] == [1, 1, 1]
    order = [page.index(f"<figcaption>{name}") for name in ("random:", "rded:", "fresh real")]
    assert order == sorted(order)
    sheets = (out / "pictures" / f"rendered-{name}.png" for name in ("random", "rded"))
    always, mosaics = (Image.open(io.BytesIO(path.read_bytes())).height for path in sheets)
    assert mosaics - always == 2 * (64 + 4)  # two epochs more
    (out / "report.html").unlink()
    train("report", out).result  # noqa: B018
    assert (out / "report.html").read_text() == page
    with (out / "log.jsonl").open("a") as log:
        log.write(
            '{"said": "warning: <b> is doubtful"}\n{"said": "warning: <b> is doubtful"}\n[1]\n{'
        )
    train("report", out).result  # noqa: B018
    page = (out / "report.html").read_text()
    assert page.count("<p class='note'>&lt;b&gt; is doubtful</p>") == 1


def test_the_diffusion_models_arithmetic_is_counted_for_every_image(
    shapes: Path, tmp_path: Path
) -> None:
    """sdxl-tiny, 4 evals at 64 px: 2.069 GFLOP an image; dace makes new ones in every epoch."""
    asked = Train(data=str(shapes), out=tmp_path, model="sdxl-tiny", epochs=7, refresh=0.5)
    made = {"evals": 4, "images": 40, "settings": {"method": "dace"}}
    compute = method_compute(make_plan(asked, Report()), "dace", made)
    assert compute["generator_tflop"] == pytest.approx(7 * 40 * 0.5 * 2.069e-3, rel=1e-3)
    assert compute["student_samples"] == compute["teacher_queries"] == 7 * 40


@pytest.mark.parametrize(
    ("accuracy", "ceiling", "told"),
    [(80, (70, None), []), (80, (81, None), ["fresh real images"]), (49, None, ["are wrong"])],
)
def test_a_weak_teacher_is_told(accuracy: float, ceiling: Any, told: list[str]) -> None:
    notes = summary._about_teacher(accuracy, ceiling)
    assert len(notes) == len(told)
    assert all(part in note for note, part in zip(notes, told, strict=True))


@pytest.mark.parametrize(("images", "told"), [((9469, 3925), True), ((9469, 500), False)])
def test_a_split_that_is_not_imagenets_is_named(images: tuple[int, int], told: bool) -> None:
    train, val = map(range, images)
    notes = summary._notes(SimpleNamespace(train=train, val=val, dope=0, model=None), {})
    assert any("fast.ai's of Imagenette, which is not ImageNet's" in note for note in notes) == told


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


def test_a_teacher_that_is_brought_along_is_measured_like_one_that_is_trained(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    options = ("--data", shapes, "--method", "random", *SMALL)
    network = ("--teacher", "convnet-d4-w24to96")  # the recipe's, assumed for a bare state dict
    trained = train("teacher", *options, *network, "--out", tmp_path / "a").result["teacher"]
    torch.save(load_file(tmp_path / "a" / "teacher" / "teacher.safetensors"), tmp_path / "w.pth")
    train("coreset", *options, "--teacher", tmp_path / "w.pth", "--out", tmp_path / "b").result  # noqa: B018
    manifest = json.loads((tmp_path / "b" / "coreset" / "manifest.json").read_text())
    assert manifest["teacher"]["accuracy"] == trained["accuracy"]
    assert manifest["teacher"]["sha256"] == trained["sha256"]


@pytest.mark.parametrize(
    "codec", [("--codec", "dense"), ("--codec", "topk", "--top-k", "3"), ("--codec", "pca")]
)
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
    assert settings["components"] == (9 if codec[1] == "pca" else None)


@pytest.mark.parametrize(
    ("asked", "told"), [((), "dense"), (("--codec", "pca"), "pca --components 9")]
)
def test_labels_of_another_codec_than_asked_for(
    train: Command, shapes: Path, tmp_path: Path, asked: tuple[str, ...], told: str
) -> None:
    given = ("--data", shapes, "--method", "random", *SMALL, "--out", tmp_path / "run")
    train("labels", *given, "--codec", "topk", "--top-k", "3").result  # noqa: B018
    error = train("student", *given, "--no-ceiling", *asked).error
    assert f"holds labels of --codec topk --top-k 3, asked for --codec {told}: give" in error


def test_a_report_without_a_run(train: Command, tmp_path: Path) -> None:
    error = train("report", tmp_path).error
    assert "has no summary.json: give the folder of a finished run" in error


def test_a_prior_is_made_resumed_and_not_mixed(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    phases = [field.name for field in fields(PriorConfig) if field.name.endswith("_steps")]
    steps = [f"--{name.replace('_', '-')}" for name in phases]
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
