"""Train a teacher on the whole training split, and measure one.

AdamW, linear warm-up and cosine to 0 per step, random resized crops and flips. Order, crops and
flips are pure functions of (seed, image, epoch): a training that is killed and resumed ends with
the same weights as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...engine.data.boxes import RandomResizedCrops
from ...engine.data.crops import stream_crops
from ...engine.data.images import ImageSet, check_same_classes
from ...engine.expand.backends import resolve_device
from ...export.documents import Count, Finite, check_document
from ...kernels.noise import Draw, uniform_numpy
from ..config import TeacherConfig, teacher_start
from ..networks import adamw, autocast, build_network, set_learning_rate
from ..run.checkpoint import (
    CheckpointError,
    read_tensors,
    require_same,
    restore_training,
    restoring,
    training_state,
    write_checkpoint,
)
from ..run.progress import Report
from ..run.world import ALONE, World
from .evaluation import evaluate
from .given import load_teacher
from .normalisation import IMAGENET
from .teacher import Teacher

TEACHER, CHECKPOINT = "teacher.safetensors", "checkpoint.safetensors"


class _Reached(BaseModel):
    config: dict[str, Any]
    epoch: Count
    losses: list[Finite]


def train_teacher(
    train_set: ImageSet,
    val_set: ImageSet,
    config: TeacherConfig,
    folder: Path,
    report: Report,
) -> Teacher:
    """Train a teacher; `folder` gets teacher.safetensors, and a checkpoint until it is done.

    A killed training resumes from its checkpoint with the same result (bitwise on the CPU, with the
    same number of threads); a finished one is loaded. Raises CheckpointError when it began with
    another config.
    """
    check_same_classes(train_set, val_set)
    identity = _identity(config, train_set)
    final = folder / TEACHER
    if final.is_file():
        require_same(final, read_tensors(final)[1].get("config") or {}, identity)
        return load_teacher(str(final), train_set.class_ids, device=config.device)
    training = _TeacherTraining(train_set, config, folder / CHECKPOINT, identity)
    for epoch in range(training.epoch, config.epochs):
        training.losses.append(training.train_epoch(epoch, report))
        report.scalar("teacher/loss", epoch, training.losses[-1])
        if epoch + 1 < config.epochs:
            training.save(epoch + 1)
    teacher = Teacher(
        training.network,
        architecture=config.network,
        class_ids=train_set.class_ids,
        size_px=config.size_px,
        device=training.device,
    )
    teacher.accuracy = measure(teacher, val_set, ALONE, report)
    report.scalar("teacher/accuracy", config.epochs, teacher.accuracy)
    teacher.save(final, config=identity, losses=training.losses)
    training.checkpoint.unlink(missing_ok=True)
    return teacher


def measure(teacher: Teacher, val: ImageSet, world: World, report: Report) -> float:
    """Validation accuracy of `teacher` in percent; the ranks of `world` share the images."""
    own = teacher.normalisation
    (score,) = evaluate(
        [lambda inputs_BCHW: teacher.logits(inputs_BCHW, own)],
        val,
        size_px=teacher.size_px,
        device=teacher.device,
        normalisation=own,
        world=world,
    )
    report.say(f"teacher: {score.accuracy:.1f} % of {len(val)} validation images")
    return score.accuracy


def training_losses(folder: Path) -> list[float]:
    """Mean cross-entropy of every epoch of the teacher in `folder`, in nats."""
    path = folder / TEACHER
    metadata = read_tensors(path)[1]
    check_document(metadata.get("losses"), str(path), CheckpointError, "remove it", list[Finite])
    return metadata["losses"]


def _identity(config: TeacherConfig, train_set: ImageSet) -> dict[str, Any]:
    """Everything that decides the weights, except the pixels."""
    settings = {key: value for key, value in config.settings().items() if key != "device"}
    listing = os.fsencode("\n".join(train_set.paths))
    return {**settings, "images": len(train_set), "files": hashlib.sha256(listing).hexdigest()}


class _TeacherTraining:
    """The network, its optimiser, and the epoch it has reached."""

    def __init__(
        self, images: ImageSet, config: TeacherConfig, checkpoint: Path, identity: dict[str, Any]
    ) -> None:
        self.images, self.config, self.checkpoint = images, config, checkpoint
        self.identity = identity
        self.steps = max(1, len(images) // config.batch)
        self.device = torch.device(resolve_device(config.device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(teacher_start(config.seed))
            network = build_network(config.network, len(images.class_ids), config.size_px)
        self.network = network.to(self.device)
        self.optimizer = adamw(self.network, config.learning_rate, config.weight_decay)
        self.epoch = 0
        self.losses: list[float] = []
        """Mean cross-entropy of each finished epoch."""
        if checkpoint.is_file():
            tensors, metadata = read_tensors(checkpoint)
            check_document(metadata, str(checkpoint), CheckpointError, "remove it", _Reached)
            require_same(checkpoint, metadata["config"], identity)
            with restoring(checkpoint):
                restore_training(self.network, self.optimizer, tensors, "")
            self.epoch, self.losses = metadata["epoch"], metadata["losses"]

    def save(self, epoch: int) -> None:
        state = training_state(self.network, self.optimizer, "")
        reached = {"config": self.identity, "epoch": epoch, "losses": self.losses}
        write_checkpoint(self.checkpoint, state, reached)

    def train_epoch(self, epoch: int, report: Report) -> float:
        """One pass over the images in a new order; returns the mean loss."""
        config, steps = self.config, self.steps
        self.network.train()
        total = torch.zeros((), device=self.device, dtype=torch.float32)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed + epoch)  # for dropout
            for step, (inputs_BCHW, labels_B) in enumerate(self._batches(epoch)):
                rate = _learning_rate(config, epoch + step / steps, 1 / steps)
                set_learning_rate(self.optimizer, rate)
                with autocast(self.device, config.precision):
                    logits_BK = self.network(inputs_BCHW).float()
                loss = cross_entropy(logits_BK, labels_B, label_smoothing=config.label_smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
                done, last = epoch * steps + step + 1, config.epochs * steps
                report.progress("teacher", done * config.batch, last * config.batch, "images")
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise ValueError(
                f"the teacher's loss is {mean} in epoch {epoch}: lower its learning rate "
                f"({config.learning_rate})"
            )
        return mean

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches in a seeded order; the remainder is skipped in this epoch."""
        config, seed = self.config, self.config.seed
        u_N = uniform_numpy(seed, Draw.ORDER, np.arange(len(self.images)), epoch, 1)[:, 0]
        stream = stream_crops(
            self.images,
            np.argsort(u_N, kind="stable")[: self.steps * config.batch],
            RandomResizedCrops(crops=1, seed=seed, draw=Draw.TEACHER_CROP, scale=config.crop_scale),
            crops=1,
            size_px=config.size_px,
            batch=config.batch,
            device=str(self.device),
            epoch=epoch,
        )
        for crops in stream:
            inputs_BCHW = IMAGENET.of_uint8(crops.pixels_BPHWC[:, 0])
            if config.flip:
                u_B1 = uniform_numpy(seed, Draw.FLIP, crops.index_B.numpy(), epoch, 1)
                flips_B111 = torch.from_numpy(u_B1[:, :, None, None] < 0.5).to(self.device)
                inputs_BCHW = torch.where(flips_B111, inputs_BCHW.flip(3), inputs_BCHW)
            layout = torch.channels_last
            yield inputs_BCHW.contiguous(memory_format=layout), crops.labels_B.to(self.device)


def _learning_rate(config: TeacherConfig, epoch: float, least: float) -> float:
    """Linear over `warmup_epochs` (starting at `least` epochs, so never 0), then cosine to 0."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return config.learning_rate * (epoch + least) / (warmup + least)
    done = (epoch - warmup) / (config.epochs - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
