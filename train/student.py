"""One student: a network, its optimiser, its own order, and one step.

Legend: P samples of a pool, B of a batch, K classes, H W image size.
"""

from __future__ import annotations

import math
from concurrent.futures import Future

import torch
from torch import Tensor

from ..engine.soft_labels import SoftTargets
from ..kernels.softlabel import softlabel
from .checkpoint import Tensors, restore_training, training_state
from .config import StudentConfig
from .networks import build_network, draws_in_training
from .optimisation import adamw, set_learning_rate


class Student:
    """A student's whole state. Seeds decide initialisation, order within a pool, and dropout."""

    def __init__(
        self, seed: int, config: StudentConfig, classes: int, device: torch.device
    ) -> None:
        self.seed, self.config, self.device = seed, config, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(config.network, classes, config.size_px)
        self.network = network.to(device)
        self.optimizer = adamw(self.network, config.learning_rate, config.weight_decay)
        self.losses: list[float] = []
        """Mean KL divergence of each finished epoch."""
        self.draws = draws_in_training(self.network)
        self._order = torch.Generator().manual_seed(seed)
        self._dropout = torch.Generator(device).manual_seed(seed).get_state()

    def train_pool(
        self,
        views_PCHW: Tensor,
        targets_P: SoftTargets,
        rate: float,
        previous: Future[float] | None,
    ) -> float:
        """Learn from a pool in batches of near-equal size, at most `config.batch`; the summed loss.

        `previous` is this student's call for the pool before, which has to end first.
        """
        if previous is not None:
            previous.result()
        self.network.train()
        set_learning_rate(self.optimizer, rate)
        views_PHWC = views_PCHW.permute(0, 2, 3, 1).contiguous()
        order_P = torch.randperm(len(views_PHWC), generator=self._order).to(self.device)
        batches = math.ceil(len(order_P) / self.config.batch)
        total = torch.zeros((), device=self.device)
        if self.draws:
            _set_default_rng(self.device, self._dropout)
        for rows_B in order_P.tensor_split(batches):
            inputs_BCHW = views_PHWC[rows_B].permute(0, 3, 1, 2)
            total += self._step(inputs_BCHW, targets_P.rows(rows_B)) * len(rows_B)
        if self.draws:
            self._dropout = _default_rng(self.device)
        return float(total)

    def _step(self, inputs_BCHW: Tensor, targets_B: SoftTargets) -> Tensor:
        scores_BK = self.network(inputs_BCHW)
        temperature = self.config.temperature
        loss = softlabel(
            scores_BK, targets_B.labels, targets_B.classes, temperature=temperature
        ).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> Tensors:
        """Everything that a checkpoint must hold, under names of this student's."""
        tensors = training_state(self.network, self.optimizer, f"{self.seed}.")
        tensors[f"{self.seed}.order"] = self._order.get_state()
        tensors[f"{self.seed}.dropout"] = self._dropout
        return tensors

    def restore(self, tensors: Tensors) -> None:
        """Put back what `state` took."""
        restore_training(self.network, self.optimizer, tensors, f"{self.seed}.")
        self._order.set_state(tensors[f"{self.seed}.order"])
        self._dropout = tensors[f"{self.seed}.dropout"]


def _default_rng(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_default_rng(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
