"""Workers compute on one thread each; other threads keep their number of threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from patchbloom.engine.data.threads import single_threaded_workers


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _threads_at_work() -> int:
    torch.ones(64, 64) @ torch.ones(64, 64)  # A thread's first operator reads the number.
    return torch.get_num_threads()


def test_each_worker_computes_alone():
    with single_threaded_workers(3, "test") as pool:
        counts = [future.result() for future in [pool.submit(_threads_at_work) for _ in range(12)]]
    assert counts == [1] * 12


def test_the_caller_and_later_threads_keep_their_number():
    with single_threaded_workers(2, "test"):
        assert _threads_at_work() == 2
        with ThreadPoolExecutor(1) as other:
            assert other.submit(_threads_at_work).result() == 2
    assert _threads_at_work() == 2


def test_an_error_in_a_worker_reaches_the_caller():
    with single_threaded_workers(1, "test") as pool, pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result()
