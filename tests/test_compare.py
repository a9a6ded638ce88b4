"""`train compare`: differing settings, both kinds of ±, paired differences, one page."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from cli_cases import Command
from patchbloom.train.report.paired import MOST_EXACT, flip_signs
from safetensors.numpy import save_file

SETTINGS = {"recipe": "small", "ipc": 1, "image_size": 64, "targets": "soft", "codec": None}
SUMMARY: dict[str, Any] = {
    "students": {
        "random": {"accuracies": [20, 21.5, 22.0], "seeds": [0, 1, 2]},
        "dace": {"accuracies": [30.0, 33.0, 36.0], "seeds": [0, 1, 2]},
    },
    "teacher": {"architecture": "convnet-d3", "sha256": "a" * 64, "accuracy": 90, "losses": [1]},
    "data": {"name": "shapes", "sha256": "d" * 64, "classes": 10},
    "settings": {**SETTINGS, "seed": 0, "seeds": 3},
    "content_sha256": {"random": "r0", "dace": "d0"},
    "provenance": {"device": "cpu"},
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a finished run: SUMMARY, with `settings`, other `accuracies`, and other fields."""

    def written(
        name: str,
        *,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        accuracies: dict[str, list[float]] | None = None,
        **fields: Any,
    ) -> Path:
        summary = {**copy.deepcopy(SUMMARY), **fields}
        summary["settings"] |= {"seed": seed, **(settings or {})}
        for method, values in (accuracies or {}).items():
            summary["students"][method]["accuracies"] = values
        for students in summary["students"].values():
            students["seeds"] = [1000 * seed + k for k in range(len(students["accuracies"]))]
        summary["content_sha256"] = {m: f"{m} {name}" for m in summary["content_sha256"]}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return written


def stage(run: Path, name: str, **record: Any) -> None:
    (run / "stages").mkdir(parents=True, exist_ok=True)
    (run / "stages" / f"{name}.json").write_text(json.dumps(record))


def test_only_what_differs_comes_first(train: Command, make: Make) -> None:
    first, second = make("a"), make("b", settings={"ipc": 10, "codec": "pca"})
    for run, rate in ((first, 0.001), (second, 0.01)):
        config = {"--learning-rate": rate, "--epochs": 5, "patches": run.name, "--ipc": 99}
        stage(run, "student-dace", config={**config, "student.temperature": 4})
        stage(run, "report", config={"students": run.name})
    outcome = train("compare", first, second)
    assert outcome.result["differences"] == {
        "ipc": [1, 10],
        "codec": [None, "pca"],
        "learning_rate": [0.001, 0.01],
    }
    head, *rows = outcome.out.splitlines()[:5]
    assert head.split() == ["setting", "a", "b"]
    assert rows[1].split() == ["codec", "-", "pca"]
    assert rows[3] == ""
    only = train("compare", first)
    assert only.out.startswith("no setting differs\n")
    assert only.result["runs"] == {"a": str(first)}


def test_a_setting_that_one_run_does_not_record_is_no_difference(
    train: Command, make: Make
) -> None:
    first, second = make("a"), make("b")
    stage(first, "student-dace", config={"--refresh": 1.0})
    assert train("compare", first, second).result["differences"] == {}


def test_both_kinds_of_deviation(train: Command, make: Make) -> None:
    """Students within coresets, pooled; and coresets, where runs differ in --seed alone."""
    other = {"dace": [31.0, 32.0], "random": [20.0, 21.0]}
    teacher = {**SUMMARY["teacher"], "sha256": "b" * 64, "accuracy": 91.0}
    runs = (make("a"), make("b", seed=1, accuracies=other, teacher=teacher))
    outcome = train("compare", *runs)
    random, dace = outcome.result["accuracy"]
    pooled = math.sqrt((9 * 2 + 0.5 * 1) / 3)  # variances 9 of three students, 0.5 of two
    expected = {"mean": 32.25, "students": 5, "coresets": 2, "targets": "soft", "method": "dace"}
    assert {key: dace[key] for key in expected} == expected
    assert dace["std_students"] == pytest.approx(pooled)
    assert dace["std_coresets"] == pytest.approx(statistics.stdev([33.0, 31.5]))
    assert dace["runs"] == ["a", "b"]
    assert random["method"] == "random"
    assert set(outcome.result["differences"]) == {
        *("seed", "student_seeds", "teacher_sha256", "teacher_accuracy"),
    }
    row = next(line for line in outcome.out.splitlines() if line.startswith("dace"))
    assert row.split("  ")[-1].strip() == "2"
    assert "a and 1 more" in row
    (alone,) = (r for r in train("compare", runs[0]).result["accuracy"] if r["method"] == "dace")
    assert alone["std_students"] == 3.0
    assert alone["std_coresets"] is None


@pytest.mark.parametrize(
    "second",
    [
        {"seed": 0},  # the same students again
        {"seed": 1, "settings": {"epochs": 5}},
        {"seed": 1, "teacher": {**SUMMARY["teacher"], "sha256": "b" * 64, "losses": []}},
    ],
)
def test_other_runs_are_no_coresets_of_the_first(
    train: Command, make: Make, second: dict[str, Any]
) -> None:
    rows = train("compare", make("a"), make("b", **second)).result["accuracy"]
    assert [row["runs"] for row in rows] == [["a"], ["a"], ["b"], ["b"]]
    assert all(row["coresets"] == 1 for row in rows)


def test_paired_differences(train: Command, make: Make) -> None:
    first, second = make("a"), make("b", settings={"targets": "hard"})
    outcome = train("compare", first, second)
    dace, other_random, _ = outcome.result["paired"]
    assert outcome.result["reference"] == {
        **{"method": "random", "run": "a", "targets": "soft", "runs": ["a"]},
    }
    assert dace == {
        **{"method": "dace", "run": "a", "targets": "soft", "pairs": "3 students", "runs": ["a"]},
        **{"difference": pytest.approx(35.5 / 3), "low": 10.0, "high": 14.0, "coverage": 0.75},
        **{"p": 0.25, "least_p": 0.25},
    }
    assert (other_random["targets"], other_random["difference"]) == ("hard", 0.0)
    assert other_random["p"] == 1.0
    told = [line.split() for line in outcome.out.splitlines() if "3 students" in line]
    assert told[0][-6:] == ["+10.0", "+14.0", "75", "%", "0.25", "0.25"]
    swapped = train("compare", first, second, "--reference", "dace").result
    assert swapped["paired"][0]["difference"] == pytest.approx(-35.5 / 3)


def test_pairs_of_several_coresets_count_once_each(train: Command, make: Make) -> None:
    """And students of other seeds make no pairs."""
    second = make("b", seed=1, accuracies={"random": [10.0, 12.0], "dace": [11.0, 15.0]})
    third = make("c", seed=7, settings={"ipc": 10})
    (dace, *others) = train("compare", make("a"), second, third).result["paired"]
    assert dace["pairs"] == "2 coresets"
    assert dace["difference"] == pytest.approx((35.5 / 3 + 2.0) / 2)
    assert dace["coverage"] == 0.5
    assert {row["pairs"] for row in others} == {"no common seeds"}
    assert all("p" not in row for row in others)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"data": {**SUMMARY["data"], "sha256": "e" * 64}},
            f"other data sha256 ({'e' * 12}, not {'d' * 12})",
        ),
        ({"data": {**SUMMARY["data"], "classes": 100}}, "other classes (100, not 10)"),
        ({"settings": {"image_size": 32}}, "other image size (32, not 64)"),
    ],
)
def test_runs_that_cannot_be_compared(
    train: Command, make: Make, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    page = tmp_path / "page.html"
    runs = make("a"), make("b", **changed), make("c", seed=1, **changed)
    outcome = train("compare", *runs, "--out", page)
    assert outcome.result["not_comparable"] == {"b": [told], "c": [told]}
    assert f"not comparable with the reference: b, c: {told}\n" in outcome.out
    assert [row["run"] for row in outcome.result["paired"]] == ["a"]
    assert f"<b>Not comparable with the reference:</b> b, c: {told}." in page.read_text()
    assert page.read_text().count("class='soft unlike'") == 2


@pytest.fixture
def students(make: Make, tmp_path: Path) -> Path:
    """A run of `train student --coreset`; the run `a` has a record of its images."""
    run = make("a")
    sizes = {b"train/x/0.png": 5, b"val/x/1.png": 7, b"val/y/2.png": 11}
    names = np.frombuffer(b"\0".join(sizes), np.uint8)
    stats = np.array([(size, 0, 0) for size in sizes.values()], np.int64)
    save_file({"names": names, "stats": stats}, run / "images.safetensors")
    elsewhere = tmp_path / "runs" / "elsewhere"
    stage(
        elsewhere,
        "student",
        state="done",
        config={
            **{"--coreset": "dace a", "--image-size": 64, "--targets": "hard", "--seeds": [0, 2]},
            "validation images": sha256(b"val/x/1.png 7\nval/y/2.png 11\n").hexdigest(),
        },
        result={
            **{"accuracies": [40.0, 42.0], "seeds": [0, 2], "provenance": {"device": "cpu"}},
            "render": {"method": "dace", "evals": 4},
        },
    )
    return elsewhere


def test_students_elsewhere_are_compared_with_the_run(
    train: Command, students: Path, make: Make
) -> None:
    result = train("compare", students.parent / "a", students, "--reference", "dace").result
    assert result["not_comparable"] == {}
    assert result["differences"] == {
        "targets": ["soft", "hard"],
        "student_seeds": [[0, 1, 2], [0, 2]],
    }
    (row,) = (row for row in result["paired"] if row["run"] == "elsewhere")
    assert (row["targets"], row["difference"]) == ("hard", 8.0)
    told = train("compare", make("b"), students).result["not_comparable"]
    assert told == {"elsewhere": ["no record says whether the images are the same"]}
    (students.parent / "a" / "images.safetensors").write_bytes(b"mine")
    assert "images.safetensors is damaged: " in train("compare", students.parent / "a").error


def test_what_is_no_finished_run(
    train: Command, make: Make, students: Path, tmp_path: Path
) -> None:
    run, summary = make("b"), copy.deepcopy(SUMMARY)
    assert f"{tmp_path} is no run folder" in train("compare", run, tmp_path).error
    (tmp_path / "run.json").touch()
    assert f"{tmp_path} has no summary.json, it is not fin" in train("compare", tmp_path).error
    assert f"{run} is given twice" in train("compare", run, run).error
    told = train("compare", run, "--reference", "rded").error
    assert "--reference rded: expected one of random, dace" in told
    assert "--out: expected a name that ends in .html" in train("compare", run, "--out", run).error
    assert "RUNS" in train("compare").error
    stage(run, "coreset", config=None)
    assert f"{run}/stages/coreset.json: config: expected" in train("compare", run).error
    summary["students"]["dace"]["seeds"] = [0, 0, 1]
    for text in ('{"a": ', json.dumps(summary), json.dumps({**summary, "students": {}})):
        (run / "summary.json").write_text(text)
        assert f"{run}/summary.json" in train("compare", run).error
    path = students / "stages" / "student.json"
    record = json.loads(path.read_text())
    unmeasured = {**record["result"], "accuracies": None}
    for changed in ({"result": unmeasured}, {"state": "begun"}):
        path.write_text(json.dumps({**record, **changed}))
        assert ": run its command again, with --data" in train("compare", students).error


def test_the_page(train: Command, make: Make, tmp_path: Path) -> None:
    """Self-contained, escaped, and its chart holds what the tables say."""
    accuracies = {"dace": [90.0, 93.0], "random": [0.0, 0.0]}
    runs = (make("<a>"), make("b", seed=1, accuracies=accuracies), make("c", settings={"ipc": 5}))
    page = tmp_path / "deep" / "page.HTML"
    outcome = train("compare", *runs, "--json", "--out", page)
    assert len(outcome.out.splitlines()) == 1
    assert outcome.result["page"] == str(page)
    text = page.read_text()
    assert "http" not in text
    assert "<a>" not in text
    assert "<meta name='viewport'" in text
    chart = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert chart.get("aria-labelledby") == f"{chart[0].get('id')} {chart[1].get('id')}"
    assert "62.2 ± 41.4 dace, soft, <a> and 1 more; " in (chart[1].text or "")
    bars = chart.findall("g")
    assert [len(bar.findall("circle")) for bar in bars] == [5, 5, 3, 3]
    assert [len(bar.findall("line")) for bar in bars] == [3, 3, 3, 3]
    for place in (part.get(key, "0%") for part in chart.iter() for key in ("x1", "x2", "cx")):
        assert 0 <= float(place.rstrip("%")) <= 100
    rows = outcome.result["accuracy"]
    widths = [float(bar.find("rect").get("width").rstrip("%")) for bar in bars]  # pyright: ignore
    means = [row["mean"] for row in rows]
    assert widths == pytest.approx([mean * 97 / 110 for mean in means], abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8])
def test_sign_flips_against_their_definition(n: int) -> None:
    """p counts signs one by one; inside the interval the test keeps a shift, outside not."""
    d = np.random.default_rng(n).normal(1, 2, n).round(2)

    def p_value(shift: float) -> float:
        means = [
            abs(np.mean(np.multiply(signs, d - shift))) for signs in product((1, -1), repeat=n)
        ]
        return float(np.mean([mean >= abs(np.mean(d - shift)) - 1e-9 for mean in means]))

    told = flip_signs(d.tolist())
    assert told["p"] == p_value(0)
    assert told["least_p"] == 2 / 2**n
    assert told["difference"] == pytest.approx(d.mean())
    assert told["coverage"] >= 0.95 or told["coverage"] == 1 - 2 / 2**n
    left_out = 1 - told["coverage"]
    for inside, outside in ((1e-6, -1e-6), (-1e-6, 1e-6)):
        end = told["low"] if inside > 0 else told["high"]
        assert p_value(end + inside) > left_out or n == 1
        assert p_value(end + outside) <= left_out


def test_sign_flips_of_many_are_drawn() -> None:
    d = np.random.default_rng(0).normal(0.5, 1, 100)
    told = flip_signs(d.tolist())
    half = 1.984 * d.std(ddof=1) / 10  # Student's t, 99 degrees of freedom
    assert told == flip_signs(d.tolist())
    assert (told["low"], told["high"]) == pytest.approx(
        (d.mean() - half, d.mean() + half), abs=0.03
    )
    assert told["p"] == told["least_p"] == 2**-MOST_EXACT
