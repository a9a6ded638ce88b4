"""bench/check.py finds slower rows, and mistakes neither noise nor another machine for one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import check
import numpy as np
import pytest

CHECK = Path(__file__).parents[1] / "bench" / "check.py"
RATES = (98.0, 100.0, 102.0)


def quantiles(values: tuple[float, float, float], rounds: int | None = 5) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(("p20", "p50", "p80"), values, strict=True))
    return row if rounds is None else row | {"n": rounds}


def expand_row(
    rates: tuple[float, float, float] = RATES, rounds: int = 5, **more: Any
) -> dict[str, Any]:
    row = {"benchmark": "expand", "device": "card", "load_1min": 1.0, "batch": 32}
    measured = {
        "spread": {"ort": quantiles(rates, rounds), "diffusers": quantiles(RATES, rounds)},
        "speedup_spread": {"ort": quantiles(rates, rounds)},
        "speedup_over": {"diffusers": {"ort": quantiles(rates, rounds)}},
    }
    return row | measured | more


def epoch_row(seconds: tuple[float, float, float]) -> dict[str, Any]:
    factors = {"r2": {"seconds": {"serial": quantiles(seconds)}, "waited_s": quantiles(seconds)}}
    return {"benchmark": "epoch", "device": "card", "factors": factors}


def kernel_row(us: tuple[float, float, float]) -> dict[str, Any]:
    case = {"kernel_us": quantiles(us, None), "eager_us": quantiles(us, None)}
    return {"benchmark": "kernels", "device": "card", "cases": {"noise 1 x 4": case}}


def scale_row(seconds: tuple[float, float, float]) -> dict[str, Any]:
    rates = quantiles((1 / seconds[2], 1 / seconds[1], 1 / seconds[0]))
    points = [{"batch": batch, "images_per_s": rates, "open_s": 9.0} for batch in (1, 8)]
    return {"benchmark": "scale", "device": "card", "points": {"expansion": points[::-1]}}


def run(
    tmp_path: Path, old: list[Any], new: list[Any], *more: str
) -> subprocess.CompletedProcess[str]:
    for name, rows in (("old", old), ("new", new)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = (str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl"))
    command = [sys.executable, str(CHECK), *files, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def verdicts(printed: str) -> dict[str, tuple[str, str]]:
    """(ratio, verdict) per figure."""
    found = {}
    for line in printed.splitlines():
        name, _, rest = line.strip().partition(" ")
        if "/" in name:
            ratio, _, verdict = rest.partition(" x  ")
            found[name] = (ratio.strip(), verdict.partition("  ")[0].strip())
    return found


@pytest.mark.parametrize(
    ("rates", "rounds", "verdict", "code"),
    [
        ((84.0, 86.0, 88.0), 5, ("0.86", "slower"), 1),
        ((114.0, 116.0, 118.0), 5, ("1.16", "faster"), 0),
        ((70.0, 86.0, 99.0), 5, ("0.86", "same"), 0),  # the intervals overlap
        ((88.0, 91.0, 94.0), 5, ("0.91", "same"), 0),  # the widened ones overlap
        ((95.9, 96.0, 96.1), 5, ("0.96", "same"), 0),  # beyond noise, within the floor
    ],
)
def test_the_rule(
    rates: tuple[float, float, float],
    rounds: int,
    verdict: tuple[str, str],
    code: int,
    tmp_path: Path,
) -> None:
    done = run(tmp_path, [expand_row()], [expand_row(rates, rounds)])
    assert done.returncode == code, done.stderr
    assert verdicts(done.stdout) == {
        "speedup_spread/ort": verdict,
        "spread/ort": (verdict[0], "shown"),
        "spread/diffusers": ("1.00", "peer"),
    }


def test_equal_rounds_are_hardly_ever_called_slower() -> None:
    """5 rounds per side, equal speed, 10 % noise and dips to 0.8: the noise that misleads most."""
    rng = np.random.default_rng(0)
    rounds = (1 + 0.1 * rng.standard_normal((2, 20_000, 5))) * np.where(
        rng.random((2, 20_000, 5)) < 0.25, 0.8, 1.0
    )
    old, new = np.percentile(rounds, (20, 50, 80), axis=-1).transpose(1, 2, 0).tolist()
    figures = [check.Figure("ours", tuple(a), tuple(b), 5) for a, b in zip(old, new, strict=True)]
    share = sum(figure.verdict == "slower" for figure in figures) / len(figures)
    assert share < 0.01
    halves = [check.Figure("ours", f.old, tuple(v / 2 for v in f.new), 5) for f in figures[:1000]]
    assert sum(figure.verdict == "slower" for figure in halves) > 950


def test_the_ratio_to_a_peer_is_judged_not_what_the_machine_did(tmp_path: Path) -> None:
    new = expand_row()
    for name in ("ort", "diffusers"):
        new["spread"][name] = quantiles((48.0, 50.0, 52.0))
    done = run(tmp_path, [expand_row()], [new])
    assert done.returncode == 0
    assert verdicts(done.stdout)["spread/ort"] == ("0.50", "shown")
    score = {
        "benchmark": "score",
        "device": "card",
        "spread": {"dali": quantiles(RATES), "torchvision": quantiles(RATES)},
    }
    old, new = (
        score | {"speedup_spread": {"torchvision": quantiles((r, r, r))}} for r in (2.0, 1.0)
    )
    done = run(tmp_path, [old], [new])
    assert done.returncode == 1
    assert verdicts(done.stdout) == {
        "speedup_spread/torchvision": ("0.50", "slower"),
        "spread/dali": ("1.00", "shown"),
        "spread/torchvision": ("1.00", "peer"),
    }


@pytest.mark.parametrize("name", ["diffusers", "diffusers-upcast", "diffusers-compiled-bf16"])
def test_a_peer_is_never_ours(tmp_path: Path, name: str) -> None:
    old, new = expand_row(), expand_row()
    for row, rates in ((old, RATES), (new, (48.0, 50.0, 52.0))):
        row["spread"][name] = row["speedup_spread"][name] = quantiles(rates)
    done = run(tmp_path, [old], [new])
    assert done.returncode == 0
    assert verdicts(done.stdout)[f"spread/{name}"] == ("0.50", "peer")
    assert verdicts(done.stdout)[f"speedup_spread/{name}"] == ("0.50", "peer")


def test_one_number_is_one_round(tmp_path: Path) -> None:
    row = {"benchmark": "scale-scoring", "device": "card"}
    points = [{"images": 10, "seconds": 2.0, "images_per_s": 5.0}]
    done = run(tmp_path, [row | {"points": points}], [row | {"points": points}])
    assert done.returncode == 2
    assert "found only too few; measure with more --rounds" in done.stderr
    other = run(tmp_path, [row | {"expanded": 8}], [row | {"expanded": 16}])
    assert "no row of NEW has the configuration" in other.stderr


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (epoch_row, "factors/r2/seconds/serial"),
        (kernel_row, "cases/noise 1 x 4/kernel_us"),
        (scale_row, "points/expansion/batch 8/images_per_s"),
    ],
)
def test_more_time_is_slower(make: Any, name: str, tmp_path: Path) -> None:
    short, long = make((0.9, 1.0, 1.1)), make((1.8, 2.0, 2.2))
    done = run(tmp_path, [short], [long])
    assert done.returncode == 1
    assert " slower\n" in done.stdout
    assert name in done.stdout
    assert " 0.50 x  slower" in done.stdout
    assert "waited_s" not in done.stdout
    assert run(tmp_path, [long], [short]).returncode == 0


def test_few_rounds_are_no_verdict(tmp_path: Path) -> None:
    few = run(tmp_path, [expand_row()], [expand_row((84.0, 86.0, 88.0), 2)])
    assert few.returncode == 2
    assert "found only peer and shown and too few; measure with more --rounds" in few.stderr
    fine = expand_row(batch=64)
    beside = run(tmp_path, [expand_row(), fine], [expand_row((84.0, 86.0, 88.0), 2), fine])
    assert beside.returncode == 0
    assert verdicts(beside.stdout)["speedup_spread/ort"] == ("1.00", "same")
    assert beside.stdout.endswith("\n1 too few\n")


def test_what_is_missing_is_an_error_unless_it_is_meant(tmp_path: Path) -> None:
    old = [expand_row(), expand_row(batch=64)]
    old[0]["spread"]["trt"] = quantiles(RATES)
    del (new := expand_row())["spread"]["diffusers"]
    done = run(tmp_path, old, [new])
    assert done.returncode == 1
    assert "spread/trt                  missing" in done.stdout
    assert "diffusers" not in done.stdout
    assert "benchmark expand, batch 64\n  missing" in done.stdout
    assert done.stdout.endswith("\n2 missing\n")
    assert run(tmp_path, old, [new], "--partial").returncode == 0


def test_the_last_row_of_the_same_configuration(tmp_path: Path) -> None:
    slow = (49.0, 50.0, 51.0)
    other = expand_row(slow, batch=64)
    assert run(tmp_path, [expand_row(slow), expand_row()], [expand_row(), other]).returncode == 0
    assert run(tmp_path, [expand_row()], [expand_row(), other, expand_row(slow)]).returncode == 1


def test_what_else_changed_is_said(tmp_path: Path) -> None:
    old, new = (expand_row(versions={"torch": torch}, driver="580") for torch in ("2.11", "2.15"))
    printed = run(tmp_path, [old], [new]).stdout
    assert "version of torch 2.11 → 2.15; load 1.0 → 1.0" in printed
    assert "driver" not in printed


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([expand_row(device="other")], [expand_row()], "found 'other' and 'card'"),
        ([expand_row(batch=64)], [expand_row()], "no row of NEW has the configuration"),
        ([epoch_row((1.0, 1.0, 1.0))], [expand_row()], "no row of NEW has the configuration"),
        (
            [expand_row(device="x"), expand_row()],
            [expand_row()],
            "rows of one device, found ['card'",
        ),
        ([], [expand_row()], "rows of one device, found []"),
        (["text"], [expand_row()], "expected rows of bench/results as JSON lines"),
    ],
)
def test_files_that_cannot_be_compared(
    old: list[Any], new: list[Any], said: str, tmp_path: Path
) -> None:
    done = run(tmp_path, old, new)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
