"""Teacher scores of patches: the cross-entropy of each, and the features behind the logits.

The teacher can see a patch in three ways:
"pad": in the centre of a canvas of the mean colour, which is RDED's zero padding after
normalisation (``synthesize/utils.py`` of its code). The patch has its scale in a mosaic, so the
teacher prefers crops in which the object is twice as large as in an image.
"resize": enlarged to the image size, as a student sees it without diffusion.
"native": in its own size, for a teacher whose network takes any size.

Shapes: B images, P patches of one image, N = B · P, K classes, D features, C = 3; H = W is
image_size_px, or the patches' own side if native.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import softplus

from ...kernels.pixels import upsample_patches
from ..data.crops import to_pixels
from ..data.images import InputError

IMAGENET_MEAN_RGB = (124, 116, 104)
"""(0.485, 0.456, 0.406) · 255, rounded."""
Scoring = Literal["pad", "resize", "native"]
Answer = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
TeacherFn = Callable[[torch.Tensor], Answer]
"""uint8 [B, H, W, 3] in the scoring's size → logits [B, K], or (logits, fp32 features [B, D])."""


def cross_entropy(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> np.ndarray:
    """-log softmax(logits)[label] in nats, float64 [B], as log(1 + Σ_{j≠y} exp(z_j - z_y)).

    In this form the losses of confident predictions (1e-6 and below, where fp32 log-softmax has few
    steps left) keep their order.
    """
    logits_BK = logits_BK.detach().to("cpu", torch.float64)
    labels_B1 = labels_B[:, None]
    margins_BK = logits_BK - logits_BK.gather(1, labels_B1)
    margins_BK.scatter_(1, labels_B1, -math.inf)
    return softplus(margins_BK.logsumexp(1)).numpy()


class PatchScorer:
    """Scores crops, each on a canvas of the size that the teacher sees, allocated once."""

    def __init__(
        self,
        teacher: TeacherFn | None,
        classes: int,
        image_size_px: int,
        canvases: int,
        canvas_rgb: Sequence[int],
        scoring: Scoring = "pad",
    ) -> None:
        self.teacher, self.classes, self.scoring = teacher, classes, scoring
        self.rgb = torch.tensor(canvas_rgb, dtype=torch.uint8)
        self.canvases, self.image_size_px = canvases, image_size_px
        self.canvas_NHWC: torch.Tensor | None = None

    def __call__(
        self, pixels_BPHWC: torch.Tensor, labels_B: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor | None]:
        """Losses, float64 [B, P] in nats, and fp32 features [B, P, D] if the teacher returns them.

        The losses are NaN without a teacher. Raises InputError when the teacher has other classes
        or a loss is not finite.
        """
        images, crops, patch_px = pixels_BPHWC.shape[:3]
        if self.teacher is None:
            return np.full((images, crops), np.nan), None
        side_px = patch_px if self.scoring == "native" else self.image_size_px
        if self.canvas_NHWC is None:
            shape = (self.canvases, side_px, side_px, 3)
            self.canvas_NHWC = self.rgb.to(pixels_BPHWC.device).expand(shape).contiguous()
        used = images * crops
        if self.scoring == "resize":
            self.canvas_NHWC[:used] = self._enlarged(pixels_BPHWC.flatten(0, 1))
        else:
            first = (side_px - patch_px) // 2
            inner = slice(first, first + patch_px)
            self.canvas_NHWC[:used, inner, inner] = pixels_BPHWC.flatten(0, 1)
        with torch.inference_mode():
            answer = self.teacher(self.canvas_NHWC)
        logits, features = answer if isinstance(answer, tuple) else (answer, None)
        if logits.shape != (len(self.canvas_NHWC), self.classes):
            raise InputError(
                f"teacher: expected logits of {self.classes} classes, got shape "
                f"{tuple(logits.shape)}; use a teacher trained on these classes"
            )
        losses = cross_entropy(logits[:used], labels_B.repeat_interleave(crops))
        if not np.isfinite(losses).all():
            raise InputError("teacher: expected finite losses, got NaN or infinity; retrain it")
        if features is not None:
            features = features[:used].reshape(images, crops, -1)
        return losses.reshape(images, crops), features

    def _enlarged(self, patches_NHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] of the image size, bicubic, as method upsample shows them."""
        return to_pixels(upsample_patches(patches_NHWC, self.image_size_px))
