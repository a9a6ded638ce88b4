"""The ring: order, bounds, errors and shutdown, with and without overlap; CUDA events."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

import pytest
import torch
from patchbloom.export.parity import without_tf32
from patchbloom.train.students.ring import Ring

CPU = torch.device("cpu")
both = pytest.mark.parametrize("overlap", [True, False])


def write(slot: list[int], item: int) -> None:
    slot[:] = [item]


def drain(ring: Ring[list[int], int], seen: list[int]) -> None:
    while taken := ring.take():
        seen += [item for item, _ in taken]


def alive() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@both
@pytest.mark.parametrize("slots", [1, 3])
def test_items_come_in_order_each_in_a_slot_that_nobody_else_has(overlap, slots) -> None:
    seen = []
    with Ring([[] for _ in range(slots)], write, range(20), device=CPU, overlap=overlap) as ring:
        while taken := ring.take():
            assert 1 <= len(taken) <= slots
            time.sleep(0.001)  # the producer may run but must not touch these
            assert all(slot == [item] for item, slot in taken)
            seen += [item for item, _ in taken]
    assert seen == list(range(20))
    assert "producer" not in alive()


@both
def test_no_more_is_filled_than_there_are_slots(overlap: bool) -> None:
    filled: list[int] = []
    slots: list[list[int]] = [[], []]
    with Ring(slots, lambda _, item: filled.append(item), range(9), device=CPU, overlap=overlap):
        time.sleep(0.05)
        assert filled == ([0, 1] if overlap else [])


def test_no_thread_switches_tf32_under_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student in fp32 on a card would else take TF32 or not by the producer's timing."""
    cudnn: Any = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    began, looked = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)

    def expand(*_: object) -> None:
        with without_tf32():
            began.wait()
            looked.wait()

    with Ring([0], expand, [0], device=CPU) as ring:
        began.wait()
        during = cudnn.allow_tf32
        looked.wait()
        ring.take()
        assert (during, cudnn.allow_tf32) == (False, False)
    assert cudnn.allow_tf32


def test_a_process_with_the_newer_flags_of_tf32_gets_them_back() -> None:
    cudnn: Any = torch.backends.cudnn
    try:
        cudnn.conv.fp32_precision = "ieee"
        with without_tf32():
            assert not cudnn.allow_tf32
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.allow_tf32 = True


def test_the_producer_works_while_the_consumer_does() -> None:
    met = threading.Barrier(2, timeout=20)
    with Ring([0, 1], lambda _, item: item and met.wait(), range(2), device=CPU) as ring:
        assert [item for item, _ in ring.take()] == [0]
        met.wait()  # passes only while the producer fills item 1
        assert [item for item, _ in ring.take()] == [1]
        assert not ring.take()


@both
@pytest.mark.parametrize("slots", [1, 3])
def test_an_error_comes_after_what_was_filled_before_it_with_its_traceback(
    overlap: bool, slots: int
) -> None:
    def fail_at_two(slot: list[int], item: int) -> None:
        if item == 2:
            raise RuntimeError("no more")
        write(slot, item)

    seen: list[int] = []
    with (
        Ring(
            [[] for _ in range(slots)], fail_at_two, range(9), device=CPU, overlap=overlap
        ) as ring,
        pytest.raises(RuntimeError, match="no more") as caught,
    ):
        drain(ring, seen)
    assert seen == [0, 1]
    assert "fail_at_two" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert "producer" not in alive()


@both
def test_an_error_of_the_items_comes_too(overlap: bool) -> None:
    def items():
        yield 1
        raise OSError("unreadable")

    with (
        Ring([[]], write, items(), device=CPU, overlap=overlap) as ring,
        pytest.raises(OSError, match="unreadable"),
    ):
        drain(ring, [])


@both
def test_a_consumer_that_leaves_early_ends_the_producer(overlap: bool) -> None:
    filled: list[list[int]] = [[], []]
    with Ring(filled, write, range(99), device=CPU, overlap=overlap) as ring:
        ring.take()
    assert max(max(slot, default=0) for slot in filled) < 4
    assert "producer" not in alive()


@both
def test_an_interrupted_consumer_does_not_wait(overlap: bool) -> None:
    asked, release = threading.Event(), threading.Event()

    def slow(slot: int, item: int) -> None:
        if overlap:
            asked.set()
            release.wait(20)

    def interrupted() -> bool:
        if not overlap:
            return True
        if asked.is_set():
            release.set()  # only once the consumer polls: it did not wait for the slot
            return True
        return False

    began = time.monotonic()
    with Ring([0], slow, range(5), device=CPU, overlap=overlap, interrupted=interrupted) as ring:
        assert len(ring.take()) <= 1
    assert time.monotonic() - began < 10


def test_both_sides_compute_with_the_callers_threads() -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        threading.Thread(target=torch.set_num_threads, args=(2,)).start()
        with Ring([0], lambda *_: seen.append(torch.get_num_threads()), [0], device=CPU) as ring:
            ring.take()
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_the_wait_is_that_of_the_consumer() -> None:
    with Ring([0], lambda *_: time.sleep(0.1), range(3), device=CPU) as ring:
        while ring.take():
            pass
        assert 0.25 < ring.waited_s() < 5
    filled: list[int] = []
    with Ring([0] * 4, lambda _, item: filled.append(item), range(3), device=CPU) as ring:
        while len(filled) < 3:
            time.sleep(0.001)
        assert ring.take()
        assert ring.waited_s() < 0.05


def test_a_ring_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more"):
        Ring([], write, [], device=CPU)


@pytest.mark.gpu
@both
def test_streams_wait_for_each_other_on_a_gpu(overlap: bool) -> None:
    """Long kernels on both sides: without events each would read the other's stale numbers."""
    device = torch.device("cuda")
    weights = torch.randn(2048, 2048, device=device)

    def fill(slot: torch.Tensor, item: int) -> None:
        work = weights
        for _ in range(20):
            work = work @ weights / 50
        slot.copy_(work[0, 0] * 0 + item)

    slots = [torch.full((), -1.0, device=device) for _ in range(2)]
    sums = []
    with Ring(slots, fill, range(12), device=device, overlap=overlap) as ring, ring.consuming():
        while taken := ring.take():
            for _, slot in taken:
                work = weights
                for _ in range(20):
                    work = work @ weights / 50
                sums.append(slot + work[0, 0] * 0)
        assert ring.waited_s() >= 0
    assert [float(each) for each in sums] == list(range(12))
