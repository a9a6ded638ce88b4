"""One phase of a prior's training: a loop of pure steps that can be stopped and resumed anywhere.

Each step draws from a CPU generator seeded by (seed, phase, step), so a resumed run takes the same
steps as an uninterrupted one, on any device. A phase ends at the first loss that is not finite.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ...export.documents import Count, Finite, check_document
from ..networks import set_learning_rate
from ..run.checkpoint import (
    CheckpointError,
    read_tensors,
    restore_training,
    restoring,
    training_state,
    write_checkpoint,
)
from ..run.progress import duration, pace

CHECKPOINT_EVERY_S = 120.0
REPORT_EVERY, WARMUP = 100, 200  # steps
AVERAGE = "average."
M = TypeVar("M", bound=nn.Module)
LossOf = Callable[[M, torch.Generator], Tensor]
"""Draws a batch with the generator and returns the module's loss on it, a scalar."""


class _Reached(BaseModel):
    step: Count
    seconds: Finite
    losses: list[list[Finite]]


class Phase(Generic[M]):
    """One training loop: module, average, optimiser, steps done and losses."""

    def __init__(
        self, name: str, module: M, steps: int, learning_rate: float, checkpoint: Path
    ) -> None:
        """Resumes from `checkpoint` when there is one."""
        self.name, self.module, self.steps = name, module, steps
        self.learning_rate, self.checkpoint = learning_rate, checkpoint
        self.done, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float]] = []
        """(steps done, mean loss since the previous entry)."""
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        module.train()
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        if checkpoint.is_file():
            self._read()

    def _read(self) -> None:
        tensors, reached = read_tensors(self.checkpoint)
        check_document(reached, str(self.checkpoint), CheckpointError, "remove it", _Reached)
        with restoring(self.checkpoint):
            restore_training(self.module, self.optimiser, tensors, "")
            self.average.load_state_dict(
                {k.removeprefix(AVERAGE): v for k, v in tensors.items() if k.startswith(AVERAGE)}
            )
        self.done, self.seconds = reached["step"], reached["seconds"]
        self.losses = reached["losses"]

    def _write(self) -> None:
        tensors = training_state(self.module, self.optimiser, "")
        tensors |= {f"{AVERAGE}{name}": each for name, each in self.average.state_dict().items()}
        reached = {"step": self.done, "losses": self.losses, "seconds": self.seconds}
        write_checkpoint(self.checkpoint, tensors, reached)

    def run(self, loss_of: LossOf[M], *, seed: int, report: Callable[[str], None]) -> M:
        """Train to the end; return the averaged module.

        The checkpoint is written every two minutes and at the end. ValueError as soon as a loss, or
        at the end a weight, is not finite.
        """
        first, spent = self.done, self.seconds
        began = written = time.monotonic()
        losses: list[float] = []
        while self.done < self.steps:
            losses.append(self._step(loss_of, seed).item())
            if not math.isfinite(losses[-1]):
                raise self._diverged(f"loss is {losses[-1]} at step {self.done} of {self.steps}")
            now, last = time.monotonic(), self.done == self.steps
            self.seconds = spent + now - began
            if self.done % REPORT_EVERY == 0 or last:
                self.losses.append((self.done, sum(losses) / len(losses)))
                report(self._progress((self.done - first) / (now - began)))
                losses.clear()
            if now - written > CHECKPOINT_EVERY_S or last:
                self._write()
                written = now
        if not all(bool(weight.isfinite().all()) for weight in self.average.parameters()):
            raise self._diverged(f"weights are not finite after {self.steps} steps")
        return self.average

    def _step(self, loss_of: LossOf[M], seed: int) -> Tensor:
        """One step of optimiser and average; its loss, a scalar on the module's device."""
        scale = _learning_rate_scale(self.done, self.steps)
        set_learning_rate(self.optimiser, self.learning_rate * scale)
        loss = loss_of(self.module, step_generator(seed, self.name, self.done))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        decay = min(0.999, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            averaged, trained = self.average.parameters(), self.module.parameters()
            torch._foreach_lerp_(list(averaged), list(trained), 1 - decay)
        self.done += 1
        return loss

    def _progress(self, steps_per_second: float) -> str:
        left_s = (self.steps - self.done) / steps_per_second
        return (
            f"{self.name} {self.done}/{self.steps}  loss {self.losses[-1][1]:.4f}  "
            f"{pace(steps_per_second, 'steps')}  {duration(left_s)} left"
        )

    def _diverged(self, reason: str) -> ValueError:
        return ValueError(
            f"the prior diverged in phase {self.name}, its {reason}: "
            "begin again with --overwrite and another --seed"
        )


def step_generator(seed: int, phase: str, step: int) -> torch.Generator:
    """The random stream of one step; independent of earlier steps."""
    words = f"{seed}/{phase}/{step}".encode()
    return torch.Generator().manual_seed(int.from_bytes(words, "big") % (2**63 - 25))


def _learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))
