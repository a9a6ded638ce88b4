"""All evaluations of a batch and its decoding, recorded once as a CUDA graph and replayed.

A UNet call is 1,630 launches, which take longer than the GPU's work on a small batch, and hold
Python's lock against the student's thread. A replay is one launch. Inputs lie in buffers of fixed
addresses; the epoch is one of them. The start state's kernel runs before the graph: its epoch is a
number of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...export.terminal import say


class ScheduleGraph:
    """`work`, a function of tensors of fixed shapes, recorded at its second call.

    The first call runs as it is: libraries choose kernels and allocate then. Where recording fails,
    it says why, and every call runs as it is. A call overwrites the last one's result.
    """

    def __init__(self, work: Callable[..., Tensor], what: str) -> None:
        self._work, self._what = work, what
        self._warm = self._refused = False
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(0, dtype=torch.float32)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._warm and self._graph is None and not self._refused:
            self._record(inputs)
        self._warm = True
        if self._graph is None:
            return self._work(*inputs)
        for kept, value in zip(self._inputs, inputs, strict=True):
            kept.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._result

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [value.clone(memory_format=torch.preserve_format) for value in inputs]
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        try:
            # Other threads (a student's, a data loader's) may allocate meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._work(*self._inputs)
        except RuntimeError as error:
            self._refused, self._inputs = True, []
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{self._what} cannot be recorded as a CUDA graph ({reason}): launched one by one")
            return
        self._graph = graph
        pool_gb = (torch.cuda.memory_reserved() - before) / 1e9
        say(f"{self._what} recorded as a CUDA graph, which holds {pool_gb:.2f} GB")
