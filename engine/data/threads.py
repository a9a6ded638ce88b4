"""Threads that compute side by side on a CPU without fighting for its cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch


@contextmanager
def single_threaded_workers(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` threads, each of which runs torch's CPU operators in itself alone.

    Otherwise every worker brings an OpenMP team as large as the machine, and most of the time goes
    into teams that wait for each other. torch keeps the number of threads per thread, but gives the
    number set last to threads that start later: so all workers are started here, and the caller's
    number is set again before the pool is handed out.
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
    torch.get_num_threads()  # Settles it: a thread's first question takes the number set last.
