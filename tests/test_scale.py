"""How cost grows: scoring holds no image, and bench_scale's arithmetic and rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCH = Path(__file__).parents[1] / "bench"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
RATES = {
    "score_images_per_s": 500.0,
    "labels_per_s": 250.0,
    "write_patches_per_s": 1000.0,
    "bytes_per_patch": 20_000,
    "bytes_per_prompt": 25_600_000,
}


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("projection")


@pytest.fixture
def bench_scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("bench_scale")


def write_photos(folder: Path, count: int, side_px: int) -> Path:
    """Smooth noise, so that a file is some 5 KB and its pixels forty times as much."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Scoring of so many images, in a process of its own."""
    data = write_photos(tmp_path_factory.mktemp("photos"), 300, 256)
    asked = {
        "data": str(data),
        "size_px": 128,
        "crops": 5,
        "batch": 16,
        "teacher": "convnet-d3-w8",
        "device": "cpu",
        "threads": 2,
    }

    def score(images: int) -> dict[str, Any]:
        settings = json.dumps(asked | {"images": images})
        words = [sys.executable, str(BENCH / "scale_points.py"), "scoring", "1", settings]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=300, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return score


@pytest.mark.slow
def test_scoring_holds_no_image(scored):
    """2100 more are 413 MB of pixels and 129 MB of crops; peaks of equal runs lie within 50 MB."""
    few, many = scored(300), scored(2400)
    assert (few["listings"], many["listings"]) == (1, 8)
    assert abs(many["peak_bytes"] - few["peak_bytes"]) < 80e6


def test_a_projection_is_the_arithmetic_it_says(projection):
    rows = {(row["dataset"], row["ipc"]): row for row in projection.project(RATES)}
    assert len(rows) == 6
    assert all(row["projection"] for row in rows.values())
    row = rows["ImageNet-1k", 10]
    samples = 40_000
    assert row["scoring_h"] == pytest.approx(300_000 / 500 / 3600)
    assert row["labels_h"] == pytest.approx(samples * 300 / 250 / 3600)
    assert row["dense_label_bytes"] / 2**30 == pytest.approx(22.4, abs=0.1)  # facts of the field
    assert row["dense_label_bytes"] == 50 * row["top_10_label_bytes"]
    assert row["keys_values_bytes"] == 25.6e9
    assert rows["ImageNet-21k", 1]["patch_bytes"] == 21_841 * 4 * 20_000
    assert projection.table(list(rows.values()), "a test").startswith("PROJECTION, not measured")


def test_rates_come_from_a_results_file(projection, tmp_path: Path):
    path = tmp_path / "scale.jsonl"
    path.write_text(json.dumps({"rates": {}}) + "\n" + json.dumps({"rates": RATES}) + "\n")
    assert projection.read_rates(path) == RATES
    for wrong in ("", "[1]", json.dumps({"rates": RATES | {"labels_per_s": 0}})):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"--rates .*: expected .*labels_per_s.*, positive"):
            projection.read_rates(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        projection.read_rates(tmp_path / "nowhere")


def test_bench_scale(bench_scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two parts in children, and a projection from given rates."""
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(RATES))
    options = bench_scale.Options(
        parts=("coreset", "scoring", "projection"),
        data=write_photos(tmp_path / "photos", 12, 40),
        rates=rates,
        device="cpu",
        classes=(40,),
        cached_prompts=16,
        expanded=16,
        coreset_size=16,
        images=(10, 20),
        score_size=32,
        threads=1,
        rounds=1,
        record=False,
        json=True,
    )
    bench_scale.main(options)
    printed = capsys.readouterr().out
    row = json.loads(printed.splitlines()[-1])
    (coreset,) = row["points"]["coreset"]
    assert coreset["prompts_kept"] == 16
    assert coreset["kept_bytes"] < coreset["all_keys_values_bytes"]
    assert min(coreset["text_bytes"], coreset["projector_bytes"]) > 0
    assert [point["listings"] for point in row["points"]["scoring"]] == [1, 2]
    assert row["scoring_memory"].keys() == {"peak_bytes"}
    assert row["rates"]["score_images_per_s"] == row["points"]["scoring"][-1]["images_per_s"]
    assert row["projection_rates"] == RATES
    assert "PROJECTION, not measured" in printed


def test_bench_scale_reports_what_is_missing(bench_scale: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="projection: expected score_images_per_s, labels_per_s"):
        bench_scale.report_projection({}, "this run")
    options = bench_scale.Options(data=tmp_path / "nowhere", device="cpu")
    asked = bench_scale.points_of(options, "scoring", "cpu")[0]
    with pytest.raises(RuntimeError, match="scoring, images 1000: the child ended with 1"):
        bench_scale.run_point("scoring", asked, 1)


def test_memory_that_grows_is_not_flat(bench_scale: ModuleType):
    def points(*peaks: float) -> list[dict[str, float]]:
        return [
            {"images": 1000 * (n + 1), "peak_bytes": peak, "peak_gpu_bytes": 0}
            for n, peak in enumerate(peaks)
        ]

    flat = {"growth": 0.04, "bytes_per_image": 20_000, "flat": True}
    assert bench_scale.growth(points(1e9, 1.01e9, 1.04e9)) == {"peak_bytes": flat}
    assert not bench_scale.growth(points(1e9, 1.06e9, 1e9))["peak_bytes"]["flat"]
