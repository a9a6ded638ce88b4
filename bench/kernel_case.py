"""One operation at one shape, as bench_kernels.py measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, its reference, and the bytes that it must move."""

    name: str
    """Operation and shape."""
    kernel: Callable[[], Any]
    """Calls the launcher; returns a tensor or a tuple of tensors."""
    reference: Callable[[], Any]
    """Returns the same tensors from the operation's reference in plain torch."""
    moved_bytes: int
    """By the formula in the operation's file, without the few numbers per sample."""
    tolerance: float
    """Largest allowed difference of kernel and reference."""
    normals: int = 0
    """Normals drawn, if the operation does nothing else."""
    latent_sized: bool = False
    """The launch takes longer than the work, so launch time is reported too."""
    share_of_copy: float | None = None
    """Target share of copy bandwidth. None: no target."""
    speedup: float | None = 4.0
    """Target speed-up over eager torch. None: no target, because eager makes few passes."""
    compiled: bool = True
    """Also time torch.compile of the reference; compilation takes seconds."""


def model_dtype(device: str) -> torch.dtype:
    """Dtype that networks read and write: fp32 on the CPU, else fp16."""
    return torch.float32 if device == "cpu" else torch.float16
