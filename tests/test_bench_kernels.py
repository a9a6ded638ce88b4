"""bench_kernels.py without a GPU: what it counts, what it calls missed, and a run on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patchbloom.kernels.softlabel import softlabel_reference, target_reference
from torch.autograd import grad
from torch.nn.functional import kl_div, log_softmax

BENCH = Path(__file__).parents[1] / "bench"
OPERATIONS = {
    "noise", "start_state", "euler_ancestral_step", "euler_ancestral_table_step",
    "4-eval schedule", "upsample_patches", "student_input", "student_input, CutMix", "mosaic",
    "shuffle_patches", "softlabel, dense", "softlabel, top-10", "softlabel, dense, mixed",
    "softlabel, top-10, mixed",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("bench_kernels")


FLOATS_8 = torch.zeros(8)
TWO_ROWS, MANY_ROWS = torch.tensor([1, 2]), torch.arange(100) % 8
BY_HAND: dict[str, tuple[Callable[[], Any], int]] = {
    "two read, one written": (lambda: FLOATS_8 + FLOATS_8.view(2, 4).view(8), 3 * 32),
    "a view": (lambda: FLOATS_8.view(2, 4).t()[1:].expand(3, 2), 0),
    "an expanded axis counts once": (lambda: FLOATS_8.expand(5, 8) + 1.0, 32 + 5 * 32),
    "in place reads and writes": (lambda: FLOATS_8.clone().add_(FLOATS_8), 64 + 3 * 32),
    "a copy only writes": (lambda: torch.empty(8).copy_(FLOATS_8), 2 * 32),
    "a fill only writes": (lambda: torch.empty(8).fill_(1.0), 32),
    "a part of a tensor": (lambda: FLOATS_8.clone()[:2].zero_(), 64 + 8),
    "out= only writes": (lambda: torch.add(FLOATS_8, 1.0, out=torch.empty(8)), 2 * 32),
    "a cast": (lambda: FLOATS_8.half(), 32 + 16),
    "a gather reads what it writes": (lambda: FLOATS_8[TWO_ROWS], 16 + 8 + 8),
    "and its source no more than once": (lambda: FLOATS_8[MANY_ROWS], 800 + 32 + 400),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_eager_bytes_by_hand(name: str, bench: ModuleType) -> None:
    call, expected = BY_HAND[name]
    assert bench.count_moved(call).total_bytes == expected


def test_eager_softlabel_moves_what_its_file_says(bench: ModuleType) -> None:
    """Per class of a picture: 110 and 71 bytes in the reference, 78 and 36 by kl_div."""
    student = torch.randn(4, 2000, requires_grad=True)
    labels = torch.randn(4, 2000).half()

    def ours() -> torch.Tensor:
        target = target_reference(labels, None, None, None, classes=2000, temperature=4.0)
        return softlabel_reference(student, target, 4.0)

    def torchs() -> torch.Tensor:
        scores = log_softmax(student / 4.0, 1)
        return kl_div(scores, (labels.float() / 4.0).softmax(1), reduction="none").sum(1)

    for loss, forward, backward in ((ours, 110, 71), (torchs, 78, 36)):
        result = loss()
        gradient = bench.count_moved(lambda result=result: grad(result.sum(), student))
        assert round(bench.count_moved(loss).total_bytes / 8000) == forward
        assert round(gradient.total_bytes / 8000) == backward


def test_passes_leave_out_what_is_small(bench: ModuleType) -> None:
    moved = bench.count_moved(lambda: (FLOATS_8 + 1.0) * torch.ones(1))
    assert [operation.name for operation in moved.operations] == [
        "aten::add", "aten::ones", "aten::mul"
    ]  # fmt: skip
    assert [moved.passes(least) for least in (4, 5, 65, 69)] == [3, 2, 1, 0]


def test_every_operation_has_a_case_and_eager_moves_more(bench: ModuleType) -> None:
    rows = {case.name: bench.bytes_row(case) for case in bench.make_cases("meta")}
    assert {name.rsplit(" to ")[0].split(" x ")[0].rsplit(" ", 1)[0] for name in rows} == OPERATIONS
    ratios = {name: row["bytes_ratio"] for name, row in rows.items()}
    assert min(ratios.values()) == ratios["mosaic 64 x 512"] == 2.0
    assert ratios["shuffle_patches 64 x 512"] == 3.0
    assert 4 * ratios["noise 64 x 4 x 64 x 64"] == pytest.approx(529, abs=1)
    assert 14 * ratios["start_state 64 x 4 x 64 x 64"] == pytest.approx(601, abs=1)
    assert 12 * ratios["euler_ancestral_step 64 x 4 x 64 x 64"] == pytest.approx(583, abs=1)
    assert 2.25 * ratios["upsample_patches 64 x 256 to 512"] == pytest.approx(44, abs=0.5)
    assert rows["upsample_patches 64 x 256 to 512"]["eager_passes"] == 7
    assert rows["student_input 64 x 512 to 224"]["eager_passes"] == 8


def test_half_passes_the_gate(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's dtypes on the CPU: the tolerances leave room for them, and for little else."""
    latents, pictures = sys.modules["latent_cases"], sys.modules["picture_cases"]
    for module in (latents, pictures):
        monkeypatch.setattr(module, "model_dtype", lambda _: torch.float16)
    cases = latents.latent_cases("cpu", 64, 64, compiled=False)[1:]
    cases += [latents.schedule_case("cpu", 64, 64, 224)]
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
        ({"speedup": {"eager": 2.0}, "eager_passes": 3}, []),
    ],
)
def test_a_row_names_the_targets_that_it_missed(
    found: dict[str, Any], expected: list[str], bench: ModuleType
) -> None:
    case = bench.Case(
        name="pictures", kernel=list, reference=list, moved_bytes=1, tolerance=0, share_of_copy=0.85
    )
    row = {"share_of_copy": 0.85, "speedup": {"eager": 4.0}, "eager_passes": 4, **found}
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
