"""One student: a network, its optimiser, its own order, and one step.

Legend: P samples per pool, B per batch, K classes, H W image size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from ...engine.expand.batches import upload
from ...kernels.softlabel import softlabel
from ..config import StudentConfig
from ..networks import adamw, autocast, build_network, draws_in_training, set_learning_rate
from ..plugins import is_function
from ..run.checkpoint import Tensors, restore_training, training_state
from ..run.world import ALONE, World
from .slots import Pool, PoolSlot

RANK_STRIDE = 2654435761  # 2^32 over the golden ratio: far from the seeds of other students


def micro_batches(own_B: Tensor, accumulate: int, least: int) -> tuple[Tensor, ...]:
    """A rank's rows in `accumulate` parts, or in `least`, the rows of the smallest share, if fewer.

    Ranks take equally many parts: SyncBatchNorm waits for all ranks in each.
    """
    return own_B.tensor_split(max(1, min(accumulate, least)))


class Student:
    """A student's whole state. Its seed decides initialisation, order within a pool, and dropout.

    Each rank of a world takes a part of every batch, and all sum their gradients: they have the
    same weights, which differ between world sizes by the order of that sum. BatchNorm sees the
    whole batch on GPUs (SyncBatchNorm, which the CPU lacks) and a rank's part on CPUs.
    """

    def __init__(
        self,
        seed: int,
        config: StudentConfig,
        classes: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.seed, self.config, self.device, self._world = seed, config, device, world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(config.network, classes, config.size_px)
        self.network = network.to(device)
        if world.size > 1 and device.type == "cuda":
            self.network = SyncBatchNorm.convert_sync_batchnorm(self.network, world.tensors)
        if config.compile:
            # A CUDA graph writes every backward pass to the same place: gradients that accumulate
            # there would be overwritten.
            graphs = device.type == "cuda" and config.accumulate == 1
            self.network.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
        self._model = self.network
        if world.size > 1:
            self._model = DistributedDataParallel(self.network, process_group=world.tensors)
        self.optimizer = adamw(self.network, config.learning_rate, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.pool = 0
        """Number of pools learned, which is the index of the current one."""
        self.batch = 0
        """Number of batches learned in the current pool."""
        self.losses: list[float] = []
        """Mean KL divergence of each finished epoch."""
        self.curve: list[list[float]] = []
        """Epochs learned and accuracy in percent, where it was measured."""
        self.draws = is_function(config.network) or draws_in_training(self.network)
        self._epoch_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._order = torch.Generator().manual_seed(seed)
        # A CPU's generator takes 32 bits of its seed.
        own_seed = (seed + world.rank * RANK_STRIDE) % 2**32
        self._dropout = torch.Generator(device).manual_seed(own_seed).get_state()

    def train_pool(
        self,
        pool: Pool,
        slot: PoolSlot,
        rate: float,
        samples: int,
        interrupted: Callable[[], bool],
        previous: Future[None] | None = None,
    ) -> None:
        """Learn from a pool in batches of near-equal size, at most `config.batch`.

        Continues after the last batch learned. Skips a pool that is done, or whose predecessor an
        interrupt left unfinished. `samples` is the number per epoch; `previous` is this student's
        call for the previous pool, which must end first.
        """
        if previous is not None:
            previous.result()
        if self.pool != pool.index:
            return
        self.network.train()
        set_learning_rate(self.optimizer, rate)
        before = self._order.get_state()
        order_P = torch.randperm(len(slot.views_PCHW), generator=self._order)
        order_P = upload(order_P, self.device)
        batches = order_P.tensor_split(math.ceil(len(order_P) / self.config.batch))
        if self.draws:
            _default_generator(self.device).set_state(self._dropout)
        while self.batch < len(batches) and not interrupted():
            self._epoch_loss += self._step(slot, batches[self.batch])
            self.batch += 1
        if self.draws:
            self._dropout = _default_generator(self.device).get_state()
        if self.batch < len(batches):
            self._order.set_state(before)
            return
        self.pool, self.batch = pool.index + 1, 0
        if pool.ends_epoch:
            self.losses.append(sum(self._world.all_gather(float(self._epoch_loss))) / samples)
            self._epoch_loss.zero_()

    def _step(self, slot: PoolSlot, rows_B: Tensor) -> Tensor:
        """One step of the optimiser; returns the loss, summed over the batch.

        Raises ValueError, with the size that fits, when the batch does not fit into memory.
        """
        try:
            return self._learn(slot, rows_B)
        except torch.OutOfMemoryError:
            pass  # its frames, which hold the activations, are gone after this block
        own_B = rows_B.tensor_split(self._world.size)[self._world.rank]
        raise ValueError(self._which_fits(slot, own_B))

    def _learn(self, slot: PoolSlot, rows_B: Tensor) -> Tensor:
        """The step; returns this rank's part of the loss.

        DistributedDataParallel averages gradients that should be summed, hence the factor. A rank
        that gets no image of a small batch takes one with weight 0.
        """
        own_B = rows_B.tensor_split(self._world.size)[self._world.rank]
        weight = self._world.size / len(rows_B) if len(own_B) else 0.0
        own_B = own_B if len(own_B) else rows_B[:1]
        parts = micro_batches(own_B, self.config.accumulate, len(rows_B) // self._world.size)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float32)
        for number, rows_b in enumerate(parts):
            with self._gradients_exchanged(number + 1 == len(parts)):
                loss = self._loss(self._model, slot, rows_b)
                self.scaler.scale(loss * weight).backward()
            total += loss.detach() * (weight > 0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _gradients_exchanged(self, now: bool) -> AbstractContextManager[None]:
        """Sync gradients only on the last micro-batch."""
        if now or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def _loss(self, model: nn.Module, slot: PoolSlot, rows_B: Tensor) -> Tensor:
        """KL(labels || model), summed over some views."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()
        inputs_BCHW, targets_B = slot.rows(rows_B)
        if self.config.precision == "fp32":
            inputs_BCHW = inputs_BCHW.float()
        with autocast(self.device, self.config.precision):
            scores_BK = model(inputs_BCHW)
        labels, classes = targets_B.labels, targets_B.classes
        return softlabel(scores_BK, labels, classes, temperature=self.config.temperature).sum()

    def _which_fits(self, slot: PoolSlot, rows_B: Tensor) -> str:
        """One line about a batch that does not fit, after trying halves of it.

        With several ranks nothing is tried: a BatchNorm would wait for the others.
        """
        batch, size_px = len(rows_B), self.config.size_px
        fitting = math.ceil(batch / self.config.accumulate)
        fail = f"{fitting} images of {size_px} px do not fit into the memory of {self.device} while"
        if self._world.size > 1:
            parts = 2 * self.config.accumulate
            return f"{fail} {self.config.network} learns: give --accumulate {parts}"
        while (fitting := fitting // 2) > 0:
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._loss(self.network, slot, rows_B[:fitting]).backward()
            except torch.OutOfMemoryError:
                continue
            parts = math.ceil(batch / fitting)
            return (
                f"{fail} {self.config.network} learns; {fitting} do: give --accumulate {parts}, "
                f"which is the same gradient, or --batch {fitting}, which is another recipe"
            )
        return f"{fail} {self.config.network} learns, nor does one: use a smaller --student"

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Everything that a checkpoint must hold: tensors, named after this student, and JSON.

        All ranks call it, between batches.
        """
        prefix = f"{self.seed}."
        tensors = training_state(self.network, self.optimizer, prefix)
        tensors[f"{prefix}order"] = self._order.get_state()
        dropout = self._world.all_gather(self._dropout.tolist())
        tensors[f"{prefix}dropout"] = torch.tensor(dropout, dtype=torch.uint8)
        losses = self._world.all_gather(float(self._epoch_loss))
        tensors[f"{prefix}loss"] = torch.tensor(sum(losses), dtype=torch.float64)
        reached = {"pool": self.pool, "batch": self.batch, "losses": self.losses}
        return tensors, {**reached, "curve": self.curve, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: Tensors, reached: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        prefix = f"{self.seed}."
        restore_training(self.network, self.optimizer, tensors, prefix)
        self._order.set_state(tensors[f"{prefix}order"])
        dropout = tensors[f"{prefix}dropout"]
        if len(dropout) == self._world.size:  # another world size draws other numbers anyway
            self._dropout = dropout[self._world.rank].clone()
        if self._world.leads:
            self._epoch_loss.copy_(tensors[f"{prefix}loss"])
        self.pool, self.batch, self.losses = reached["pool"], reached["batch"], reached["losses"]
        self.curve = reached.get("curve", [])  # older checkpoints have none
        self.scaler.load_state_dict(reached["scaler"])


def _default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device()]
