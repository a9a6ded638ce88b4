"""The training loop: overlap, signals, a full disk, too little memory, half precision."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patchbloom.engine.interrupts import Terminated
from patchbloom.train.config import StudentConfig
from patchbloom.train.labels.targets import OnlineLabels
from patchbloom.train.methods.open import Refreshed
from patchbloom.train.methods.source import UpsampledPatches
from patchbloom.train.networks import build_network
from patchbloom.train.run import checkpoint
from patchbloom.train.run.checkpoint import CheckpointError, Checkpoints, read_tensors
from patchbloom.train.students import lockstep
from patchbloom.train.students import student as student_module
from patchbloom.train.students.loop import StudentResult, train_students
from patchbloom.train.students.student import micro_batches
from patchbloom.train.teacher.teacher import Teacher
from student_cases import LABELS_N, PATCHES, same, weights
from torch import Tensor

CONFIG = StudentConfig(
    network="convnet-d3-w8-in",
    size_px=32,
    epochs=3,
    batch=8,
    temperature=4.0,
    pool=20,
    device="cpu",
)
CLASS_IDS = tuple("abcdefghij")


class Told:
    """A Report that keeps lines and scalars, and calls `at_epoch` on progress."""

    def __init__(self, at_epoch: Callable[[int], None] = lambda _: None) -> None:
        self.lines: list[str] = []
        self.scalars: dict[str, list[float]] = {}
        self.at_epoch = at_epoch

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None:
        self.at_epoch(int(done))

    def scalar(self, tag: str, step: int, value: float) -> None:
        self.scalars.setdefault(tag, []).append(value)

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def source() -> UpsampledPatches:
    return UpsampledPatches(
        method="upsample",
        patches_NHWC=PATCHES,
        labels_N=LABELS_N,
        class_ids=CLASS_IDS,
        size_px=32,
    )


@pytest.fixture(scope="module")
def labels() -> OnlineLabels:
    torch.manual_seed(5)
    network = build_network("convnet-d3-w8", 10, 32)
    teacher = Teacher(network, architecture="convnet-d3-w8", class_ids=CLASS_IDS, size_px=32)
    return OnlineLabels(teacher, 4.0)


def train(source, labels, folder: Path, config=CONFIG, report=None) -> list[StudentResult]:
    return train_students(
        source, labels, config, seeds=[0, 1], val_set=None, folder=folder, report=report or Told()
    )


def all_same(one: list[StudentResult], other: list[StudentResult]) -> bool:
    return all(same(a, b) for a, b in zip(one, other, strict=True))


def largest_difference(one: list[StudentResult], other: list[StudentResult]) -> float:
    pairs = [(weights(a), weights(b)) for a, b in zip(one, other, strict=True)]
    return max(float((a[name] - b[name]).abs().max()) for a, b in pairs for name in a)


@pytest.fixture(scope="module")
def whole(source, labels, tmp_path_factory: pytest.TempPathFactory) -> list[StudentResult]:
    """Students trained without interruption, overlapped."""
    return train(source, labels, tmp_path_factory.mktemp("whole"))


def test_overlap_changes_no_bit(whole, source, labels, tmp_path: Path) -> None:
    serial = train(source, labels, tmp_path, replace(CONFIG, overlap=False))
    assert all_same(whole, serial)
    assert [r.losses for r in serial] == [r.losses for r in whole]
    assert [r.accuracy for r in serial] == [None, None]


def test_an_epoch_tells_its_loss_rate_and_wait(source, labels, tmp_path: Path) -> None:
    report = Told()
    train(source, labels, tmp_path, report=report)
    assert sorted(report.scalars) == [
        f"student/{name}" for name in ("images_per_s", "loss", "seconds", "waited_s")
    ]
    assert all(len(values) == CONFIG.epochs for values in report.scalars.values())
    assert min(report.scalars["student/images_per_s"]) > 0


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_stops_within_a_batch_and_loses_none(
    whole, source, labels, tmp_path: Path, monkeypatch, number: int, raised: type
) -> None:
    """The signal arrives in the middle of a pool, in a student's step."""
    steps, learn = [], student_module.Student._learn

    def counted(self, *given):
        steps.append(self.seed)
        if len(steps) == 9:
            os.kill(os.getpid(), number)
        return learn(self, *given)

    monkeypatch.setattr(student_module.Student, "_learn", counted)
    before = signal.getsignal(number)
    with pytest.raises(raised):
        train(source, labels, tmp_path)
    assert signal.getsignal(number) is before
    assert len(steps) < 2 * 6 * CONFIG.epochs - 2
    (path,) = Checkpoints(tmp_path, "student", 2).paths()
    reached = read_tensors(path)[1]["students"].values()
    assert sum(5 * (s["pool"] // 3) + 2 * (s["pool"] % 3) + s["batch"] for s in reached) >= 9
    resumed = train(source, labels, tmp_path)
    assert len(steps) == 2 * 5 * CONFIG.epochs  # 40 samples in pools of 16, 16, 8: no step twice
    assert all_same(whole, resumed)
    assert [r.losses for r in resumed] == [r.losses for r in whole]


def _without_its_end(data: bytes) -> bytes:
    return data[:-100]


def _with_another_weight(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def _at_another_pool(data: bytes) -> bytes:
    number = data.index(b'\\"pool\\": ') + 10
    return data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]


@pytest.mark.parametrize("damaged", [_without_its_end, _with_another_weight, _at_another_pool])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    whole, source, labels, tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    def stop(epoch: int) -> None:
        if epoch == CONFIG.epochs:
            raise KeyboardInterrupt

    config = replace(CONFIG, checkpoint_every=1, overlap=False, pool=8)
    plain = train(source, labels, tmp_path / "plain", config)
    with pytest.raises(KeyboardInterrupt):
        train(source, labels, tmp_path, config, Told(stop))
    older, newest = Checkpoints(tmp_path, "student", 2).paths()
    newest.write_bytes(damaged(newest.read_bytes()))
    report = Told()
    resumed = train(source, labels, tmp_path, config, report)
    assert any("is damaged" in line and "the one before" in line for line in report.lines)
    assert all_same(plain, resumed)
    assert not older.exists()


def test_a_checkpoint_without_a_hash_still_opens(tmp_path: Path) -> None:
    """Earlier versions wrote none."""
    tensors, reached = {"a": torch.ones(3)}, {"epoch": 1}
    checkpoint.write_checkpoint(tmp_path / "new", tensors, reached)
    checkpoint.write_tensors(tmp_path / "old", tensors, reached)
    assert (tmp_path / "new").read_bytes() != (tmp_path / "old").read_bytes()
    for name in ("new", "old"):
        assert read_tensors(tmp_path / name)[1] == reached


def test_checkpoints_of_other_libraries_are_told(tmp_path: Path, monkeypatch) -> None:
    checkpoints, report = Checkpoints(tmp_path, "student", 2), Told()
    for _ in range(3):
        checkpoints.write({"a": torch.zeros(1)}, {})
    assert [path.name for path in checkpoints.paths()] == [
        "student.checkpoint-000001.safetensors",
        "student.checkpoint-000002.safetensors",
    ]
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "99.0"})
    assert checkpoints.newest(report.say) == checkpoints.paths()[-1]
    assert "99.0" in report.lines[0]
    assert "last digits" in report.lines[0]


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(
    source, labels, tmp_path: Path, monkeypatch
) -> None:
    config = replace(CONFIG, checkpoint_every=1, overlap=False, pool=8)
    plain = train(source, labels, tmp_path / "plain", config)
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # each checkpoint syncs its file, then the folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left for .*checkpoint-000001.* it needs up to"):
        train(source, labels, tmp_path, config)
    monkeypatch.setattr(os, "fsync", fsync)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [
        "student.checkpoint-000000.safetensors"
    ]
    assert all_same(plain, train(source, labels, tmp_path, config))


def test_a_split_batch_has_the_gradient_of_the_whole(whole, source, labels, tmp_path) -> None:
    """Up to rounding, without BatchNorm; AdamW turns 1e-7 in a gradient into whole steps."""
    split = train(source, labels, tmp_path, replace(CONFIG, accumulate=3))
    assert 0 < largest_difference(whole, split) < 2e-3
    for one, other in zip(whole, split, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-3)


def test_a_batch_that_does_not_fit_names_one_that_does(
    source, labels, tmp_path: Path, monkeypatch
) -> None:
    loss = student_module.Student._loss

    def small(self, model, slot, rows_B):
        if len(rows_B) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, model, slot, rows_B)

    monkeypatch.setattr(student_module.Student, "_loss", small)
    with pytest.raises(ValueError, match=r"8 images of 32 px do not fit .* 2 do: .*--accumulate 4"):
        train(source, labels, tmp_path)
    assert len(train(source, labels, tmp_path, replace(CONFIG, accumulate=4))) == 2


def test_half_precision_learns_the_same_to_its_digits(whole, source, labels, tmp_path) -> None:
    halved = train(source, labels, tmp_path, replace(CONFIG, precision="bf16"))
    for one, other in zip(whole, halved, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=0.05)
        assert other.losses != one.losses
    assert all(value.dtype == torch.float32 for value in weights(halved[0]).values())


def test_a_compiled_student_learns_the_same(whole, source, labels, tmp_path: Path) -> None:
    compiled = train(source, labels, tmp_path, replace(CONFIG, compile=True))
    assert weights(compiled[0]).keys() == weights(whole[0]).keys()
    for one, other in zip(whole, compiled, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-3)


def test_a_share_is_expanded_anew_and_the_rest_shown_again(source) -> None:
    class Counted:
        samples, labels_N, class_ids = source.samples, LABELS_N, CLASS_IDS

        def __init__(self) -> None:
            self.asked: list[tuple[int, int]] = []

        def render(self, samples_P: Tensor, epoch: int) -> Tensor:
            self.asked += [(epoch, sample) for sample in samples_P.tolist()]
            values_P = (samples_P * 2 + epoch * 9) % 200 / 127.5 - 1
            return values_P[:, None, None, None].expand(-1, 3, 8, 8).contiguous()

        def describe(self):
            return {"method": "dace"}

    fresh = Counted()
    kept = Refreshed(fresh, 0.25, seed=3)
    samples_N = torch.arange(40)
    seen = [kept.render(samples_N[torch.randperm(40)].sort().values, epoch) for epoch in range(9)]
    made = [sum(epoch == each for each, _ in fresh.asked) for epoch in range(9)]
    assert made == [40] + [10] * 8
    assert {sample for epoch, sample in fresh.asked if 1 <= epoch <= 4} == set(range(40))
    expected = fresh.render(samples_N, 0)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
    resumed = Refreshed(Counted(), 0.25, seed=3)
    assert torch.equal(resumed.render(samples_N, 8), seen[8])
    assert torch.equal(resumed.render(torch.tensor([7, 3]), 8), seen[8][[7, 3]])
    assert kept.describe() == {"method": "dace", "refresh": 0.25}


def test_a_loss_of_nan_leaves_the_checkpoint_before(
    source, labels, tmp_path: Path, monkeypatch
) -> None:
    config = replace(CONFIG, checkpoint_every=1, overlap=False, pool=8)
    loss, calls = student_module.Student._loss, []

    def ends_in_nan(self, model, slot, rows_B):
        calls.append(len(rows_B))
        return loss(self, model, slot, rows_B) * (math.nan if len(calls) > 24 else 1.0)

    monkeypatch.setattr(student_module.Student, "_loss", ends_in_nan)
    monkeypatch.setattr(lockstep, "CHECKPOINT_S", 0.0)  # checkpoint at every pool
    with pytest.raises(ValueError, match="loss is nan in epoch 2: give a lower --learning-rate"):
        train(source, labels, tmp_path, config)
    for path in Checkpoints(tmp_path, "student", 2).paths():
        assert all(bool(value.isfinite().all()) for value in read_tensors(path)[0].values())


def test_a_checkpoint_without_a_config_is_refused(source, labels, tmp_path: Path) -> None:
    Checkpoints(tmp_path, "student", 2).write({"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="is not a patchbloom checkpoint"):
        train(source, labels, tmp_path)


@pytest.mark.parametrize(
    ("images", "ranks", "accumulate"), [(3, 2, 2), (10, 8, 2), (60, 8, 8), (5, 8, 2), (100, 1, 3)]
)
def test_ranks_take_equally_many_micro_batches(images: int, ranks: int, accumulate: int) -> None:
    parts = set()
    for own_B in torch.arange(images).tensor_split(ranks):
        split = micro_batches(own_B, accumulate, images // ranks)
        assert torch.equal(torch.cat(split), own_B)
        parts.add(len(split))
    assert len(parts) == 1
