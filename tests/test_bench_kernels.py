"""bench_kernels.py without a GPU: its cases, missed targets, and a run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_kernels as bench
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
OPERATIONS = {
    "noise", "start_state", "euler_ancestral_step", "euler_ancestral_table_step",
    "upsample_patches", "student_input", "student_input, CutMix", "mosaic",
    "softlabel, dense", "softlabel, top-10", "softlabel, dense, mixed",
    "softlabel, top-10, mixed", "group_norm", "group_norm, SiLU", "geglu",
}  # fmt: skip


def test_every_operation_has_a_case() -> None:
    names = [case.name for case in bench.make_cases("meta")]
    assert {
        name.rsplit(" to ")[0].split(" x ")[0].rsplit(" ", 1)[0] for name in names
    } == OPERATIONS


def test_half_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's dtype on the CPU, errors are within the tolerances, but not within 1/12."""
    latents, pictures = sys.modules["latent_cases"], sys.modules["picture_cases"]
    for module in (latents, pictures):
        monkeypatch.setattr(module, "model_dtype", lambda _: torch.float16)
    cases = latents.latent_cases("cpu", 64, 64, compiled=False)[1:]
    for case in cases:
        assert 0 < bench.check(case) < case.tolerance
        narrow = replace(case, tolerance=case.tolerance / 12)
        with pytest.raises(RuntimeError, match=r"of the reference, got .* no time is reported"):
            bench.check(narrow)
    for case in pictures.label_cases("cpu", 8, 21841, 10, compiled=False):
        assert bench.check(case) < case.tolerance


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, []),
        ({"share_of_copy": 0.84}, ["share_of_copy 0.84, not 0.85"]),
        ({"speedup": {"eager": 3.99}}, ["3.99 x eager, not 4.0"]),
    ],
)
def test_a_row_names_the_targets_that_it_missed(found: dict[str, Any], expected: list[str]) -> None:
    case = bench.Case(
        name="pictures", kernel=list, reference=list, moved_bytes=1, tolerance=0, share_of_copy=0.85
    )
    row = {"share_of_copy": 0.85, "speedup": {"eager": 4.0}, **found}
    assert bench.missed_targets(case, row) == expected


def test_it_runs_on_the_cpu() -> None:
    command = [sys.executable, str(BENCH / "bench_kernels.py"), "--device", "cpu", "--json"]
    options = ["--no-record", "--no-compiled", "--only", "noise"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["cases"].values()
    assert row["max_difference"] == 0
    assert row["kernel_us"]["p20"] <= row["kernel_us"]["p50"] <= row["kernel_us"]["p80"]
    assert row["kernel_us"]["n"] == 10
    assert row["speedup"].keys() == {"eager"}
    assert row["gnormal_per_s"] > 0
    assert "missed" not in row, "nothing is a kernel here"
