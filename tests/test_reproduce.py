"""`train reproduce`: plans, the cells that are chosen, consent, resuming, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tyro
from cli_cases import Command, runner, write_small_model, write_small_set
from patchbloom.train.commands import estimates
from patchbloom.train.commands import train as commands
from patchbloom.train.commands.planning import make_plan
from patchbloom.train.config import RECIPES
from patchbloom.train.options import Train
from patchbloom.train.papers import PLANS
from patchbloom.train.plan import Plan
from patchbloom.train.report.published import compare, statistics_of, table
from patchbloom.train.run.progress import Report

QUICK = (
    *("--", "--epochs", "2", "--seeds", "2", "--teacher-epochs", "1", "--device", "cpu"),
    *("--student", "convnet-d3-w8", "--teacher", "convnet-d3-w8"),
)
CELLS = {
    "imagenette-table1": 6,
    "woof": 6,
    "tiny": 6,
    "cifar10": 12,
    "cifar100": 12,
    "ablation": 5,
    "patch-size": 8,
    "cross-arch": 4,
    "cross-arch-cifar10": 3,
}
PUBLISHED = {
    ("imagenette-table1", "rded-ipc1-resnet18"): {"ImageNette": [35.8, 1.0]},
    ("imagenette-table1", "dace-ipc50-resnet18"): {"ImageNette": [87.6]},
    ("woof", "rded-ipc10-resnet18"): {"ImageWoof": [44.4, 1.8]},
    ("woof", "dace-ipc1-resnet18"): {"ImageWoof": [25.0]},
    ("tiny", "rded-ipc50-resnet18"): {"Tiny-ImageNet": [58.2, 0.1]},
    ("cifar10", "teacher-convnet-d3"): {"CIFAR-10": [82.2]},
    ("cifar10", "rded-ipc1-convnet-d3"): {"CIFAR-10": [23.5]},
    ("cifar10", "rded-ipc10-convnet-d3"): {"CIFAR-10": [50.2]},
    ("cifar10", "rded-ipc50-convnet-d3"): {"CIFAR-10": [68.4]},
    ("cifar10", "G-VBSM-ipc10-convnet-d3"): {"CIFAR-10": [46.5]},
    ("cifar100", "dace-ipc10-resnet18"): {"CIFAR-100": [57.7]},
    ("ablation", "rho0.5-ipc1-resnet18"): {"ImageNette": [39.5], "ImageWoof": [19.5]},
    ("patch-size", "dace-r2-ipc1-resnet18"): {"ImageNette": [51.4], "ImageWoof": [25.0]},
    ("cross-arch", "dace-ipc1-mean"): {"ImageNette": [30.79], "ImageWoof": [19.74]},
    ("cross-arch-cifar10", "dace-ipc1-vit-s"): {"CIFAR-10": [21.9]},
}


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(capsys)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("name", PLANS)
def test_every_cell_of_a_plan_is_a_run_of_train(name: str) -> None:
    plan = PLANS[name]
    cells = plan.cells(coresets=2)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * CELLS[name]
    for cell in cells:
        run = tyro.cli(Train, args=["--data", "d", "--out", "o", *cell.words])
        recipe = RECIPES[run.recipe or "small"]
        size_px = run.image_size or recipe.image_size
        assert recipe.name != "small"
        assert size_px % (run.factor or recipe.factor_for(size_px)) == 0
        assert (len(run.methods), run.seeds, run.ceiling) == (1, 3, False)
        assert cell.row.startswith(f"{cell.row.split('-ipc')[0]}-ipc{run.ipc}-{run.student}")
        assert cell.name == (f"{cell.row}-seed1" if run.seed else cell.row)
        assert run.teacher == cell.teacher


def test_published_numbers_are_frozen() -> None:
    assert list(PLANS) == list(CELLS)
    for (name, row), numbers in PUBLISHED.items():
        assert PLANS[name].published[row] == numbers
    own = {name: {cell.row for cell in plan.cells()} for name, plan in PLANS.items()}
    others = ("teacher-", "G-VBSM-", "DACE-", "MTT+GLaD-", "DC+GLaD-")
    for name, plan in PLANS.items():
        assert all(set(numbers) <= set(plan.sets) for numbers in plan.published.values())
        for row in plan.published.keys() - own[name]:
            assert row.startswith(others) or row.endswith("-mean")
    total = sum(
        sum(n) for p in PLANS.values() for row in p.published.values() for n in row.values()
    )
    assert round(total, 2) == 2823.12


def test_only_names_cells_or_their_beginning(train: Command) -> None:
    def chosen(*only: str) -> list[str]:
        words = ("--list", "--coresets", "2", *(("--only", *only) if only else ()))
        return train("reproduce", "cifar10", *words).result["cells"]

    assert len(chosen()) == 24
    assert chosen("rded-ipc1") == ["rded-ipc1-convnet-d3", "rded-ipc1-convnet-d3-seed1"]
    assert chosen("rded-ipc1-convnet-d3-seed1") == ["rded-ipc1-convnet-d3-seed1"]
    assert len(chosen("herding", "rded-ipc50")) == 8
    error = train("reproduce", "cifar10", "--list", "--only", "rded-ipc").error
    assert "--only rded-ipc: no cell of cifar10 (see --list)" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cifar"], "plan cifar: expected one of imagenette-table1, woof, tiny, cifar10"),
        (["cifar10", "--out", "o"], "expected --data and --out, or --list"),
        (["cifar10", "--list", "--coresets", "0"], "--coresets 0: expected 1 or more"),
        (["cifar10", "--list", "--", "--seed=3"], "--seed=3 after `--`: not an option of cells"),
        (["cifar10", "--list", "--", "--colour", "red"], "unrecognized: --colour red"),
        (["tiny", "--list", "--", "--codec", "pca"], "--labels online stores none, so --codec pca"),
    ],
)
def test_options_that_do_not_fit_are_refused(train: Command, words: list[str], told: str) -> None:
    assert told in train("reproduce", *words).error


def test_a_stopped_table_goes_on_and_tells_both_deviations(
    train: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, began = tmp_path / "table", []
    words = ("reproduce", "cifar10", "--data", data, "--out", out, "--only", "rded-ipc1")
    asked = train(*words, "--coresets", "2", *QUICK)
    assert "no terminal to ask: give --yes to start" in asked.error
    assert "rded-ipc1-convnet-d3-seed1  10                2       about" in asked.out
    assert "teacher-convnet-d3          60                1       about" in asked.out
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert "not started" in train(*words, *QUICK).error
    assert not out.exists()

    def stages(options: Any, line: str) -> dict[str, Any]:
        began.append(options.out.name)
        if len(began) == 3:
            raise KeyboardInterrupt
        return run_stages(options, line)

    run_stages = commands.run_stages
    monkeypatch.setattr(commands, "run_stages", stages)
    assert train(*words, "--coresets", "2", "--yes", *QUICK).code == 130
    first = out / "rded-ipc1-convnet-d3" / "summary.json"
    before = first.stat()
    rows = train(*words, "--coresets", "2", "--yes", *QUICK).result["rows"]
    names = ["teacher-convnet-d3", "rded-ipc1-convnet-d3", "rded-ipc1-convnet-d3-seed1"]
    assert began == [*names, names[0], names[2]]
    assert first.stat() == before

    runs = [json.loads((out / name / "summary.json").read_text()) for name in names[1:]]
    means = [run["accuracy"]["rded"][0] for run in runs]
    assert runs[0]["content_sha256"] != runs[1]["content_sha256"]
    assert runs[0]["teacher"]["sha256"] == runs[1]["teacher"]["sha256"]
    row = next(row for row in rows if row["row"] == names[1])
    assert row["ours"]["mean"] == round(sum(means) / 2, 2)
    assert row["ours"]["coresets"] == 2
    assert row["published"] == {"CIFAR-10": [23.5]}
    results = json.loads((out / "results.json").read_text())
    assert results["rows"] == rows
    assert train(*words, "--yes", *QUICK).result["rows"] == rows  # of one coreset: two are done
    assert [results["cells"][name]["students"] for name in names[1:]] == [2, 2]
    assert "| rded-ipc50-convnet-d3 | – | – | – | 68.4 |" in (out / "table.md").read_text()

    monkeypatch.setattr("builtins.input", lambda _: "y")
    error = train(*words, *QUICK, "--epochs", "3").error
    assert "1 of 1 cells failed; rded-ipc1-convnet-d3: the student-rded stage of" in error
    assert "was run with --epochs = 2, now asked for 3" in error


def test_time_is_the_measured_rates_times_the_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_model(tmp_path)
    model = ("--model", str(tmp_path / "model"), "--backend", "eager")

    def plan_of(method: str) -> Plan:
        words = ("--data", str(data), "--out", "o", "--recipe", "small", "--image-size", "32")
        words += ("--ipc", "2", "--factor", "1", "--method", method, *model, *QUICK[1:])
        return make_plan(tyro.cli(Train, args=words), Report())

    assert 0 < estimates._rendered_s(plan_of("dace")) < 10
    steps, answers = 1.0, 0.01
    monkeypatch.setattr(estimates, "_image_s", lambda *net: steps if "fp32" in net else answers)
    monkeypatch.setattr(estimates, "_rendered_s", lambda _: 0.1)
    assert estimates.teacher_seconds(plan_of("random")) == pytest.approx(60 * steps + 20 * answers)
    shown = 10 * 2 * 2 * (2 * steps + answers)  # 2 epochs, 2 students in one thread
    validated = (1 + 2) * 20 * answers  # teacher and students
    for method, more in (
        ("random", 0.0),
        ("rded", 60 * 5 * answers),
        ("herding", 60 * answers),
        ("dace", 60 * 5 * answers + 40 * 0.1),
    ):
        seconds = estimates.run_seconds(plan_of(method))
        assert seconds == pytest.approx(shown + validated + more)


def test_a_table_from_finished_cells() -> None:
    plan = PLANS["cross-arch-cifar10"]
    assert statistics_of([(10.0, 3.0), (14.0, 4.0)]) == {
        "mean": 12.0,
        "std": 3.54,  # sqrt((9 + 16) / 2)
        "std_over_coresets": 2.83,
        "coresets": 2,
    }
    some: dict[str, Any] = {"dace-ipc1-alexnet": [(30.0, 1.0)], "dace-ipc1-vit-s": [(20.0, 1.0)]}
    lines = {line[0]: line[1:] for line in table(plan, compare(plan, some))}
    assert lines["row"] == ("ours, %", "± coresets", "n", "published on CIFAR-10, %")
    assert lines["dace-ipc1-alexnet"] == ("30.0 ± 1.0", "–", "1", "31.3")
    assert lines["dace-ipc1-mean"] == ("–", "–", "–", "29.7")
    some["dace-ipc1-resnet18"] = [(34.0, 1.0), (36.0, 1.0)]
    lines = {line[0]: line[1:] for line in table(plan, compare(plan, some))}
    assert lines["dace-ipc1-resnet18"] == ("35.0 ± 1.0", "1.4", "2", "36.0")
    assert lines["dace-ipc1-mean"] == ("28.3", "–", "1", "29.7")
