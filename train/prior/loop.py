"""One phase of a prior's training: a loop of pure steps that can be stopped anywhere and goes on.

Every step draws from a CPU generator seeded by (seed, phase, step), so a resumed run takes the same
steps as an uninterrupted one, on any device. A phase ends at the first loss that is not finite.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

CHECKPOINT_EVERY_S = 120.0
REPORT_EVERY = 100  # steps
M = TypeVar("M", bound=nn.Module)
LossOf = Callable[[M, torch.Generator], Tensor]
"""Draws a batch with the generator and returns the module's loss on it, a scalar."""


@dataclass
class Phase(Generic[M]):
    """One training loop: what it optimises, for how long, and the losses it saw."""

    name: str
    module: M
    steps: int
    learning_rate: float
    ema_decay: float = 0.999
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, mean loss since the entry before)."""
    seconds: float = 0.0


class _State(Generic[M]):
    """What a checkpoint keeps of a phase: module, average, optimiser and the steps done."""

    def __init__(self, phase: Phase[M]) -> None:
        self.phase, self.module, self.done = phase, phase.module, 0
        self.average = copy.deepcopy(phase.module)
        self.average.eval()
        self.average.requires_grad_(False)
        self.module.train()
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def read(self, checkpoint: Path) -> None:
        device = next(self.module.parameters()).device
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        self.module.load_state_dict(saved["module"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.done = saved["step"]
        self.phase.losses, self.phase.seconds = saved["losses"], saved["seconds"]

    def write(self, checkpoint: Path) -> None:
        """Replace `checkpoint` whole or not at all."""
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = checkpoint.with_suffix(".part")
        torch.save(
            {
                "module": self.module.state_dict(),
                "average": self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.done,
                "losses": self.phase.losses,
                "seconds": self.phase.seconds,
            },
            temporary,
        )
        temporary.replace(checkpoint)

    def step(self, loss_of: LossOf[M], seed: int) -> Tensor:
        """One step of optimiser and average; its loss, a scalar on the module's device."""
        phase = self.phase
        for group in self.optimiser.param_groups:
            group["lr"] = phase.learning_rate * _learning_rate_scale(self.done, phase.steps)
        loss = loss_of(self.module, step_generator(seed, phase.name, self.done))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        decay = min(phase.ema_decay, (1 + self.done) / (10 + self.done))
        _average_into(self.average, self.module, decay)
        self.done += 1
        return loss


def run_phase(
    phase: Phase[M],
    loss_of: LossOf[M],
    *,
    seed: int,
    checkpoint: Path,
    report: Callable[[str], None],
) -> M:
    """Run `phase` to its end, from `checkpoint` when there is one; return the averaged module.

    The checkpoint is written every two minutes and at the end. ValueError as soon as a loss, or at
    the end a weight, is not finite.
    """
    state = _State(phase)
    if checkpoint.exists():
        state.read(checkpoint)
    first, spent = state.done, phase.seconds
    began = written = time.monotonic()
    losses: list[float] = []
    while state.done < phase.steps:
        losses.append(state.step(loss_of, seed).item())
        if not math.isfinite(losses[-1]):
            raise _diverged(phase, f"loss is {losses[-1]} at step {state.done} of {phase.steps}")
        now, last = time.monotonic(), state.done == phase.steps
        phase.seconds = spent + now - began
        if state.done % REPORT_EVERY == 0 or last:
            phase.losses.append((state.done, sum(losses) / len(losses)))
            report(_progress(phase, state.done, (state.done - first) / (now - began)))
            losses.clear()
        if now - written > CHECKPOINT_EVERY_S or last:
            state.write(checkpoint)
            written = now
    if not all(bool(weight.isfinite().all()) for weight in state.average.parameters()):
        raise _diverged(phase, f"weights are not finite after {phase.steps} steps")
    return state.average


def step_generator(seed: int, phase: str, step: int) -> torch.Generator:
    """The random stream of one step: a function of its name, not of what ran before."""
    words = f"{seed}/{phase}/{step}".encode()
    return torch.Generator().manual_seed(int.from_bytes(words, "big") % (2**63 - 25))


def _learning_rate_scale(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


def _average_into(average: nn.Module, module: nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def _progress(phase: Phase, done: int, steps_per_second: float) -> str:
    left_s = (phase.steps - done) / steps_per_second
    return (
        f"{phase.name} {done}/{phase.steps}  loss {phase.losses[-1][1]:.4f}  "
        f"{steps_per_second:.2f} steps/s  {left_s / 60:.1f} min left"
    )


def _diverged(phase: Phase, what: str) -> ValueError:
    return ValueError(
        f"the prior diverged in phase {phase.name}, its {what}: "
        "begin again with --overwrite and another --seed"
    )
