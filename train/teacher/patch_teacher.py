"""A teacher that scores patches: at which size, and with the features behind its logits.

The features are the inputs of the classifier, the last linear layer: 512 numbers in a ResNet-18.

Legend: N images, K classes, D features, H W image size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...engine.select.diversity import Diversity
from ...engine.select.scores import TeacherFn
from ..config import Choice, Scoring
from .teacher import Teacher


def patch_teacher(
    teacher: Teacher, choice: Choice, scoring: Scoring, patch_px: int, candidates: int
) -> tuple[TeacherFn, Diversity | None]:
    """Teacher function and diversity for engine.select.patches.select_patches.

    The diversity is None for lowest loss. Raises ValueError, one line, for a network that cannot
    take patches of `patch_px` unchanged, or has no features.
    """
    native = scoring == "native"
    if native:
        require_size(teacher, patch_px)
    if choice == "lowest-loss":
        return partial(teacher.logits_from_uint8, native=native), None
    scorer = PatchTeacher(teacher, native=native)
    return scorer, Diversity(choice=choice, features=scorer.width, candidates=candidates)


class PatchTeacher:
    """Teacher function for engine.select.patches: logits and features of uint8 images.

    `native`: images are not resized to the teacher's size. Raises ValueError, one line, for a
    network without a linear layer.
    """

    def __init__(self, teacher: Teacher, *, native: bool) -> None:
        self.teacher, self.native = teacher, native
        self._classifier = _last_linear(teacher)

    @property
    def width(self) -> int:
        """D."""
        return self._classifier.in_features

    def __call__(self, images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 logits [N, K] and features [N, D]."""
        kept: list[Tensor] = []
        hook = self._classifier.register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0].float().flatten(1))
        )
        try:
            logits_NK = self.teacher.logits_from_uint8(images_NHWC, native=self.native)
        finally:
            hook.remove()
        return logits_NK, torch.cat(kept)


def require_size(teacher: Teacher, size_px: int) -> None:
    """Raises ValueError unless the network takes images of `size_px` unchanged."""
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


def _last_linear(teacher: Teacher) -> nn.Linear:
    """The layer that turns features into logits."""
    layers = [layer for layer in teacher.network.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(
            f"--select: {teacher.architecture} has no linear layer whose inputs are its features: "
            "give --select lowest-loss, or another teacher"
        )
    return layers[-1]
