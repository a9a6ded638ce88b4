"""Threads that compute in parallel on a CPU without competing for its cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch


@contextmanager
def single_threaded_workers(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` threads, each of which runs torch's CPU operators single-threaded.

    Otherwise every worker has an OpenMP team as large as the machine, and the teams spend most of
    the time waiting for each other. torch keeps a thread count per thread, but a new thread gets
    the count that was set last: so all workers start here, and the caller's count is restored
    before the pool is yielded.
    """
    threads = torch.get_num_threads()
    started = Barrier(count + 1)
    with ThreadPoolExecutor(count, name, initializer=_compute_alone) as pool:
        for _ in range(count):
            pool.submit(started.wait)
        started.wait()
        torch.set_num_threads(threads)
        yield pool


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # Settles the count: a thread's first query takes the one set last.
