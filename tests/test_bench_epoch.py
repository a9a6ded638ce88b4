"""bench/bench_epoch.py: no time without a gate that sees a wrong image."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patchbloom.train.config import StudentConfig
from torch import Tensor

CONFIG = StudentConfig(
    network="convnet-d3-w8", size_px=16, epochs=2, batch=8, temperature=4.0, device="cpu"
)


@pytest.fixture(scope="module")
def bench_epoch() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
        yield importlib.import_module("bench_epoch")


class Noise:
    """Images drawn by sample and epoch; after `whole` calls, those of the sample before."""

    samples, class_ids = 40, tuple("abcdefghij")
    labels_N = torch.arange(10).repeat_interleave(4)

    def __init__(self, whole: int | None = None, changes: bool = True) -> None:
        self.calls, self.whole, self.changes = 0, whole, changes

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        self.calls += 1
        late = self.whole is not None and self.calls > self.whole
        samples_P = samples_P - 1 if late else samples_P
        return torch.stack([self._image(int(n), epoch) for n in samples_P])

    def _image(self, sample: int, epoch: int) -> Tensor:
        seed = 1000 * epoch * self.changes + sample % self.samples
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def describe(self) -> dict[str, Any]:
        return {"method": "noise"}


def test_the_gate_holds_for_what_is_rendered_as_it_should_be(bench_epoch: ModuleType) -> None:
    source = Noise()
    found = bench_epoch.check_overlap(source, bench_epoch.Given(40), CONFIG, "cpu")
    assert found["overlapped"] == 0
    assert found["other_images"] > 1e-3
    assert source.calls == 5 + 5 + 1  # pools of 8, twice; the control's images at once
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gate_sees_late_images(bench_epoch: ModuleType, device: str) -> None:
    """By the rule of either device: from the last pool of the second student on."""
    with pytest.raises(RuntimeError, match=r"overlap changed the student: .* no time is reported"):
        bench_epoch.check_overlap(Noise(whole=7), bench_epoch.Given(40), CONFIG, device)


def test_a_blind_gate_is_told(bench_epoch: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="the gate is blind"):
        bench_epoch.check_overlap(Noise(changes=False), bench_epoch.Given(40), CONFIG, "cpu")
