"""The teacher: a frozen classifier of the real images, trained here or provided.

Legend: B, N images, K classes, D features, H W image size; inputs are normalised floats.

On disk it is one safetensors file: the state dict, with metadata: architecture (a name in
networks.py), class ids in order, image size, normalisation, accuracy. teacher/training.py writes
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...engine.select.diversity import Diversity, Rule
from ...engine.select.scores import TeacherFn
from ..config import Choice, Scoring
from ..run.checkpoint import (
    weights_sha256,
    write_tensors,
)
from .evaluation import FORWARD_BATCH
from .normalisation import IMAGENET, Normalisation

SCHEMA = "patchbloom.teacher/1"


class Teacher:
    """A frozen classifier with its own normalisation and image size."""

    def __init__(
        self,
        network: nn.Module,
        *,
        architecture: str,
        class_ids: Sequence[str],
        size_px: int,
        normalisation: Normalisation = IMAGENET,
        accuracy: float | None = None,
        columns: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`columns`: indices of the K classes among the network's outputs; None: all of them."""
        self.architecture, self.class_ids = architecture, tuple(class_ids)
        self.size_px, self.normalisation, self.accuracy = size_px, normalisation, accuracy
        self.device = torch.device(device)
        self.sha256 = weights_sha256(network.state_dict())
        self.columns = (
            None
            if columns is None
            else torch.tensor(columns, device=self.device, dtype=torch.int64)
        )
        network = network.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def logits(
        self, inputs_BCHW: Tensor, normalisation: Normalisation = IMAGENET, *, native: bool = False
    ) -> Tensor:
        """fp32 [B, K] for images normalised with the caller's `normalisation`.

        Images of another size than the teacher's are resized (bilinear, antialiased), or passed
        unchanged with `native`, if the network can take them.
        """
        outputs = []
        for part_BCHW in inputs_BCHW.split(FORWARD_BATCH[self.device.type]):
            images = self.normalisation.from_other(part_BCHW.to(self.device).float(), normalisation)
            if not native and images.shape[-2:] != (self.size_px, self.size_px):
                size = (self.size_px, self.size_px)
                images = interpolate(images, size, mode="bilinear", antialias=True)
            outputs.append(self.network(images).float())
        logits_BK = torch.cat(outputs)
        return logits_BK if self.columns is None else logits_BK[:, self.columns]

    def logits_from_uint8(self, images_NHWC: Tensor, *, native: bool = False) -> Tensor:
        """fp32 [N, K] for uint8 images [N, H, W, 3]; `native` as in `logits`."""
        parts = images_NHWC.split(FORWARD_BATCH[self.device.type])
        own = self.normalisation
        return torch.cat([self.logits(own.of_uint8(part), own, native=native) for part in parts])

    @cached_property
    def classifier(self) -> nn.Linear:
        """The last linear layer, whose inputs are the features: 512 numbers in a ResNet-18.

        Raises ValueError for a network without one.
        """
        layers = [layer for layer in self.network.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise ValueError(
                f"--select: {self.architecture} has no linear layer whose inputs are its "
                "features: give --select lowest-loss, or another teacher"
            )
        return layers[-1]

    def logits_and_features(
        self, images_NHWC: Tensor, *, native: bool = False
    ) -> tuple[Tensor, Tensor]:
        """fp32 [N, K] and [N, D] for uint8 images [N, H, W, 3]; `native` as in `logits`."""
        features: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0].float().flatten(1))
        )
        try:
            logits_NK = self.logits_from_uint8(images_NHWC, native=native)
        finally:
            hook.remove()
        return logits_NK, torch.cat(features)

    def describe(self) -> dict[str, Any]:
        """Its description in a manifest."""
        return {
            "architecture": self.architecture,
            "sha256": self.sha256,
            "accuracy": self.accuracy,
            "size_px": self.size_px,
            "normalisation": asdict(self.normalisation),
            "classes": len(self.class_ids),
            "outputs": "all" if self.columns is None else "chosen by class id",
        }

    def save(self, path: Path, **more: Any) -> None:
        """Write the file that `load_teacher` reads; `more` is added to its metadata."""
        metadata = {
            "schema": SCHEMA,
            "architecture": self.architecture,
            "class_ids": self.class_ids,
            "size_px": self.size_px,
            "normalisation": asdict(self.normalisation),
            "accuracy": self.accuracy,
            **more,
        }
        write_tensors(path, self.network.state_dict(), metadata)


def patch_teacher(
    teacher: Teacher, choice: Choice | Rule, scoring: Scoring, patch_px: int, candidates: int
) -> tuple[TeacherFn, Diversity | None]:
    """Teacher function and diversity for engine.select.patches.select_patches.

    The diversity is None for lowest loss. Raises ValueError for a network that cannot take patches
    of `patch_px` unchanged, or has no features.
    """
    native = scoring == "native"
    if native:
        _require_size(teacher, patch_px)
    if choice == "lowest-loss":
        return partial(teacher.logits_from_uint8, native=native), None
    features = teacher.classifier.in_features
    diversity = Diversity(choice=choice, features=features, candidates=candidates)
    return partial(teacher.logits_and_features, native=native), diversity


def _require_size(teacher: Teacher, size_px: int) -> None:
    black_NHWC = torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8)
    try:
        teacher.logits_from_uint8(black_NHWC, native=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["it is made for one size"])[0]
        raise ValueError(
            f"--scoring native: {teacher.architecture} cannot take patches of {size_px} px as they "
            f"are ({reason}): give --scoring pad or resize, or a teacher that pools globally"
        ) from None
