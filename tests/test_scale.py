"""Growth of cost: scoring keeps no image in memory; bench_scale's arithmetic and rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_scale
import numpy as np
import pytest
from PIL import Image

BENCH = Path(__file__).parents[1] / "bench"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def write_photos(folder: Path, count: int, side_px: int) -> Path:
    """Write smooth noise: a file is some 5 KB, and its pixels forty times as much."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Scores a number of images in a new process."""
    data = write_photos(tmp_path_factory.mktemp("photos"), 300, 256)
    asked = {
        "data": str(data),
        "size_px": 128,
        "crops": 5,
        "batch": 16,
        "teacher": "convnet-d3-w8",
        "device": "cpu",
        "threads": 2,
        "rounds": 1,
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
    """2100 more are 413 MB of pixels and 129 MB of crops; peaks of equal runs differ by < 50 MB."""
    few, many = scored(300), scored(2400)
    assert (few["listings"], many["listings"]) == (1, 8)
    assert abs(many["peak_bytes"] - few["peak_bytes"]) < 80e6


def rows_of(printed: str) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {row["benchmark"]: row for row in rows}


def test_bench_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two parts, in child processes."""
    options = bench_scale.Options(
        parts=("coreset", "scoring"),
        data=write_photos(tmp_path / "photos", 12, 40),
        device="cpu",
        classes=(40,),
        cached_prompts=16,
        expanded=16,
        size=32,
        images=(10, 20),
        threads=1,
        rounds=1,
        record=False,
        json=True,
    )
    assert bench_scale.main(options) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    (coreset,) = rows["scale-coreset"]["points"]
    assert coreset["prompts_kept"] == 16
    assert coreset["kept_bytes"] < coreset["all_keys_values_bytes"]
    assert min(coreset["text_bytes"], coreset["projector_bytes"]) > 0
    scoring = rows["scale-scoring"]
    assert [point["listings"] for point in scoring["points"]] == [1, 2]
    assert scoring["memory"].keys() == {"peak_bytes"}
    assert [point["items"] for point in scoring["points"]] == [10, 20]
    assert (scoring["data"], scoring["generated"], scoring["teacher"]) == (
        "photos",
        False,
        "convnet-d3-w8",
    )
    assert not {"backend", "model"} & scoring.keys()
    coreset = rows["scale-coreset"]
    assert (coreset["backend"], coreset["cached_prompts"]) == ("eager-fp32", 16)
    assert (coreset["data"], coreset["generated"]) == ("generated", True)
    assert "teacher" not in coreset


def scored_points(*peaks: float) -> list[dict[str, float]]:
    return [
        {
            "images": 1000 * n,
            "items": 1000 * n,
            "rounds_s": [9.0 + 200.0 * n] * 3,  # 9 of them to start
            "peak_bytes": peak,
            "peak_gpu_bytes": 0,
        }
        for n, peak in enumerate(peaks, 1)
    ]


def test_a_rate_has_no_start_in_it():
    points = scored_points(1e9, 1e9, 1e9)
    found = bench_scale.rates_of("scoring", points)
    assert found["rates"] == {"score_images_per_s": 5.0}
    assert found["rates_spread"]["score_images_per_s"]["n"] == 3
    assert bench_scale.rates_of("labels", points)["rates"] == {"labels_per_s": 5.0}
    points[-1]["rounds_s"] = points[-2]["rounds_s"]
    assert bench_scale.rates_of("scoring", points) == {"rates": {}}
    assert bench_scale.rates_of("scoring", points[:1]) == {"rates": {}}


def test_ranks_are_asked_for_what_their_row_says(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def train(launch: list[str], stage: str, out: Path, words: list[str]) -> None:
        out.mkdir(exist_ok=True)
        asked.append(words)

    monkeypatch.setattr(bench_scale, "_train", train)
    same = SimpleNamespace(content_sha256="x")
    monkeypatch.setattr(bench_scale, "open_coreset", lambda _: same)
    options = bench_scale.Options(teacher="convnet-d3-w16", size=32, backend="ort-fp32")
    assert len(list(bench_scale.run_ranks(options))) == 2
    told = bench_scale.settings_of(options, "ranks")
    for words in asked:
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given["--teacher"] == told["teacher"] == "convnet-d3-w16"
        assert given["--image-size"] == str(told["size_px"]) == "32"
        assert given["--backend"] == told["backend"] == "eager"
        assert given["--epochs"] == str(told["epochs"])
        assert given["--shapes-per-class"] == str(told["shapes_per_class"])
    assert (told["threads"], told["data"], told["generated"]) == (1, "generated", True)


def test_a_failed_part_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Keeps the parts before and after it, and the points before its failure."""
    expanded = {"batch": 1, "images_per_s": {"p50": 5.0}, "evals": 4, "peak_bytes": 1}

    def points(_: Any, part: str, __: str) -> Iterator[dict[str, Any]]:
        if part == "expansion":
            yield expanded
            raise RuntimeError("batch 8: the child ended with -9")
        if part == "labels":
            raise OSError("no room left")
        yield from scored_points(1e9, 1.01e9)

    monkeypatch.setattr(bench_scale, "run_points", points)
    asked = bench_scale.Options(device="cpu", record=False, json=True)
    parts = ("expansion", "labels", "scoring")
    assert bench_scale.main(replace(asked, parts=parts)) == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "failed: expansion: batch 8: the child ended with -9",
        "failed: labels: no room left",
    ]
    rows = rows_of(told.out)
    assert rows.keys() == {"scale-expansion", "scale-scoring"}
    assert rows["scale-expansion"]["points"] == [expanded]
    assert rows["scale-expansion"]["failed"] == "expansion: batch 8: the child ended with -9"
    assert rows["scale-scoring"]["rates"] == {"score_images_per_s": 5.0}
    assert bench_scale.main(replace(asked, parts=("scoring",))) == 0
    assert bench_scale.main(replace(asked, parts=("labels",))) == 1


def test_a_child_that_fails_is_named(tmp_path: Path):
    options = bench_scale.Options(data=tmp_path / "nowhere", device="cpu", backend="eager-fp32")
    with pytest.raises(RuntimeError, match="images 1000: the child ended with 1"):
        next(bench_scale.run_points(options, "scoring", "cpu"))


@pytest.mark.parametrize(
    ("peaks", "verdict", "status"),
    [
        ((1e9, 1.01e9, 1.04e9), "flat", 0),
        ((1e9, 1.11e9, 1e9), "NOT flat", 1),
        ((1e9,), "one point", 0),
    ],
)
def test_memory_that_grows_ends_with_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    peaks: tuple[float, ...],
    verdict: str,
    status: int,
):
    monkeypatch.setattr(bench_scale, "run_points", lambda *_: iter(scored_points(*peaks)))
    options = bench_scale.Options(parts=("scoring",), device="cpu", record=False, json=True)
    assert bench_scale.main(options) == status
    told = capsys.readouterr().out
    assert f"peak memory: {verdict}" in told
    rows = rows_of(told)
    assert rows.keys() == {"scale-scoring"}
    memory = rows["scale-scoring"]["memory"]["peak_bytes"]
    assert memory["verdict"] == verdict
    if verdict == "flat":
        assert (memory["growth"], memory["bytes_per_image"]) == (0.04, 20_000)
