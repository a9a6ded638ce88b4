"""bench/bench_epoch.py reports no time unless its gate can see a wrong image."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import bench_epoch
import pytest
import torch
from patchbloom.train.config import StudentConfig
from torch import Tensor

CONFIG = StudentConfig(
    network="convnet-d3-w8", size_px=16, epochs=2, batch=8, temperature=4.0, device="cpu"
)


class Noise:
    """Random images per (sample, epoch); after `whole` calls, those of the previous sample."""

    samples, class_ids = 40, tuple("abcdefghij")
    labels_N = torch.arange(10).repeat_interleave(4)

    def __init__(self, whole: int | None = None, changes: bool = True) -> None:
        self.calls, self.whole, self.changes = 0, whole, changes
        self.settings: set[tuple[bool, bool]] = set()

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        self.calls += 1
        strict = torch.are_deterministic_algorithms_enabled()
        self.settings.add((strict, torch.backends.cudnn.deterministic))
        late = self.whole is not None and self.calls > self.whole
        samples_P = samples_P - 1 if late else samples_P
        return torch.stack([self._image(int(n), epoch) for n in samples_P])

    def _image(self, sample: int, epoch: int) -> Tensor:
        seed = 1000 * epoch * self.changes + sample % self.samples
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def describe(self) -> dict[str, Any]:
        return {"method": "noise"}


def test_the_gate_holds_for_what_is_rendered_as_it_should_be() -> None:
    source = Noise()
    found = bench_epoch.check_overlap(source, CONFIG, "cpu", batch=8)
    assert found["overlapped"] == 0
    assert found["other_images"] > 1e-3
    assert source.calls == 10 + 10 + 1  # 5 pools × 2 epochs each; the control renders once
    assert source.settings == {(False, True)}  # the first would have blocks compiled anew
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize(("device", "pools"), [("cpu", 10), ("cuda", 4)])
def test_the_gate_sees_late_images(device: str, pools: int) -> None:
    """Only the last pool of the overlapped student is late; each device's rule sees it."""
    source = Noise(whole=2 * pools - 1)
    with pytest.raises(RuntimeError, match=r"overlap changed the student: .* no time is reported"):
        bench_epoch.check_overlap(source, CONFIG, device, batch=8)
    assert source.calls == 2 * pools + 1


class Slow(Noise):
    """The first call is slow (2 s), as with compilation; later ones take 0.1 s."""

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        time.sleep(0.1 if self.calls else 2.0)
        return super().render(samples_P, epoch)


def test_what_comes_first_is_not_in_the_times() -> None:
    """Each run and round gives one time, the average of its epochs; no warm-up in it."""
    source = Slow()
    runs = bench_epoch.make_runs(("serial", "overlapped", "generate"), source)
    taken = bench_epoch.time_runs(runs, replace(CONFIG, epochs=3), rounds=2)
    assert source.calls == 3 + 2 * 3 * 3
    for name, times in taken.items():
        assert len(times) == 2, name
        assert all(0.1 <= each.seconds < 0.6 for each in times), (name, times)
    assert all(0 < each.waited_s <= each.seconds for each in taken["overlapped"])


def test_a_blind_gate_is_told() -> None:
    with pytest.raises(RuntimeError, match="the gate is blind"):
        bench_epoch.check_overlap(Noise(changes=False), CONFIG, "cpu", batch=8)
