"""Rates, stored rows, and bench_score.py and bench_labels.py on a few images."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import measure
import numpy as np
import pytest
from cli_cases import write_small_model
from PIL import Image

BENCH = Path(__file__).parents[1] / "bench"


def test_rates_count_what_is_timed():
    calls = []

    def one_pass(name: str, seconds: float) -> int:
        calls.append(name)
        time.sleep(seconds)
        return 10

    peers = {"slow": lambda: one_pass("slow", 0.04), "fast": lambda: one_pass("fast", 0.01)}
    rates = measure.measure_rates(peers, rounds=3, warmup=1)
    assert calls == ["slow", "fast"] * 4
    assert all(len(rate.rounds) == 3 for rate in rates.values())
    assert 25 < rates["slow"].p50 <= 250
    assert measure.ratios(rates["fast"], rates["slow"]).p50 > 1.5
    assert measure.Rate((1.0, 2.0, 3.0)).row() == {"p20": 1.4, "p50": 2.0, "p80": 2.6, "n": 3}


def test_rows_are_appended(tmp_path: Path):
    row = measure.environment()
    assert {"time", "device", "cores", "versions", "commit"} <= row.keys()
    for n in range(2):
        path = measure.append_row("trial", row | {"n": n}, tmp_path)
    assert path.parent.parent == tmp_path
    assert path.parent.name.replace("-", "").isalnum()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1]


def run_bench_score(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "bench_score.py"), "--no-record", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_rows_of_before_do_not_make_a_commit_dirty(tmp_path: Path, monkeypatch):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    code, rows = tmp_path / "bench" / "code.py", results / "rows.jsonl"
    for file in (code, rows):
        file.write_text("1\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(measure, "RESULTS", results)
    rows.write_text("1\n2\n")
    assert measure.environment()["dirty"] is False
    code.write_text("2\n")
    assert measure.environment()["dirty"] is True


def test_bench_score(tmp_path: Path):
    rng = np.random.default_rng(0)
    for n in range(12):
        folder = tmp_path / "train" / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (60, 40 + n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.jpg")
    options = ["--images", "10", "--rounds", "1", "--size", "32", "--batch", "4"]
    options += ["--teacher", "convnet-d3-w8", "--teacher-images", "6"]
    done = run_bench_score("--data", str(tmp_path), "--peers", "torchvision", *options)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert set(row["images_per_s"]) == {"dali", "torchvision"}
    assert all(rate > 0 for rate in row["images_per_s"].values())
    assert row["images"] == 10
    difference = row["difference_from_pillow"]
    assert difference["max"] <= 2
    assert difference["mirrored_mean"] > 10  # noise images
    alone = {half: row["teacher_spread"][half]["p50"] for half in ("loader", "teacher")}
    assert row["teacher_images"] == 6
    assert row["bottleneck"] == min(alone, key=alone.__getitem__)
    assert f"the {row['bottleneck']} bounds" in done.stdout
    both = row["teacher_spread"]["both"]["p50"]
    assert row["both_over_bottleneck"] == pytest.approx(both / min(alone.values()), rel=1e-2)


def test_bench_score_tells_when_its_gate_is_blind(tmp_path: Path):
    for n in range(2):
        folder = tmp_path / "train" / "ab"[n]
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (90, 90, 90)).save(folder / f"{n}.jpg")
    done = run_bench_score("--data", str(tmp_path), "--size", "32", "--rounds", "1")
    assert done.returncode != 0
    assert "cannot tell crops from mirrored ones" in done.stderr


def test_bench_score_without_data(tmp_path: Path):
    done = run_bench_score("--data", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.startswith("error: data folder")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_bench_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_small_model(tmp_path)
    command = [sys.executable, str(BENCH / "bench_labels.py"), "--no-record", "--json"]
    options = ["--epochs", "1", "--rounds", "1", "--threads", "1", "--shapes-per-class", "5"]
    done = subprocess.run(
        [*command, *options, "--model", str(tmp_path / "model"), "--backend", "eager"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert set(row["ratio"]) == set(row["targets"]) == {"record_over_online", "record_over_stored"}
    assert min(row["seconds"].values()) > 0
    assert 40 * 10 * 2 < row["label_bytes"] < 40 * 10 * 2 + 200
