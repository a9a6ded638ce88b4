"""One operation at one shape, as bench_kernels.py measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """The operation, its reference, and the bytes that it must move."""

    name: str
    """Operation and shape."""
    kernel: Callable[[], Any]
    """Calls the launcher; returns a tensor or a tuple of tensors."""
    reference: Callable[[], Any]
    """Returns the same tensors, by the operation's reference in plain torch."""
    moved_bytes: int
    """By the formula in the operation's file, without the few numbers per sample."""
    tolerance: float
    """Largest difference of kernel and reference that passes."""
    normals: int = 0
    """Normals that it draws, where drawing them is all that it does."""
    latent_sized: bool = False
    """The launch takes longer than the work: its time is reported."""
    share_of_copy: float | None = None
    """The least share of copy bandwidth that is good enough; None: no target."""
    speedup: float | None = 4.0
    """The least times eager torch that is good enough; None: no target, eager makes few passes."""
    compiled: bool = True
    """Whether torch.compile of the reference is timed too: compilation takes seconds."""


def model_dtype(device: str) -> torch.dtype:
    """What networks read and write: fp32 on the CPU, else half."""
    return torch.float32 if device == "cpu" else torch.float16
