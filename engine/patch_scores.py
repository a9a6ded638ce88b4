"""What a teacher thinks of patches: cross-entropy of each, shown to it in the full image size.

"pad": on the centre of a canvas of the mean colour, which is RDED's zero padding after
normalisation (``synthesize/utils.py`` of its code). The teacher sees the patch at the scale that it
has in a mosaic, and so prefers crops in which the object is twice as large as in an image.
"resize": enlarged to the image size, which is how a student sees it without diffusion.

Shapes: B images, P patches of one image, N = B · P, K classes, H = W = image_size_px, C = 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn.functional import softplus

from ..kernels.pixels import upsample_patches
from .images import InputError

IMAGENET_MEAN_RGB = (124, 116, 104)
"""(0.485, 0.456, 0.406) · 255, rounded."""
Scoring = Literal["pad", "resize"]
TeacherFn = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [B, H, W, 3] of the full image size → logits [B, K]."""


def cross_entropy(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> np.ndarray:
    """-log softmax(logits)[label] in nats, float64 [B], as log(1 + Σ_{j≠y} exp(z_j - z_y)).

    In this form the losses of confident answers (1e-6 and below, where fp32 log-softmax has a few
    steps left) keep their order.
    """
    logits_BK = logits_BK.detach().to("cpu", torch.float64)
    labels_B1 = labels_B[:, None]
    margins_BK = logits_BK - logits_BK.gather(1, labels_B1)
    margins_BK.scatter_(1, labels_B1, -math.inf)
    return softplus(margins_BK.logsumexp(1)).numpy()


class PatchScorer:
    """Teacher losses of crops, each on a canvas of the image size; it is allocated once."""

    def __init__(
        self,
        teacher: TeacherFn | None,
        classes: int,
        image_size_px: int,
        canvases: int,
        canvas_rgb: Sequence[int],
        scoring: Scoring = "pad",
    ) -> None:
        if scoring not in get_args(Scoring):
            raise ValueError(f"scoring {scoring!r}: expected one of {', '.join(get_args(Scoring))}")
        self.teacher, self.classes, self.scoring = teacher, classes, scoring
        self.rgb = torch.tensor(canvas_rgb, dtype=torch.uint8)
        self.shape = (canvases, image_size_px, image_size_px, 3)
        self.canvas_NHWC: torch.Tensor | None = None

    def __call__(self, pixels_BPHWC: torch.Tensor, labels_B: torch.Tensor) -> np.ndarray:
        """float64 [B, P], in nats; NaN without a teacher."""
        images, crops, patch_px = pixels_BPHWC.shape[:3]
        if self.teacher is None:
            return np.full((images, crops), np.nan)
        if self.canvas_NHWC is None:
            self.canvas_NHWC = self.rgb.to(pixels_BPHWC.device).expand(self.shape).contiguous()
        used = images * crops
        if self.scoring == "resize":
            self.canvas_NHWC[:used] = self._enlarged(pixels_BPHWC.flatten(0, 1))
        else:
            first = (self.shape[1] - patch_px) // 2
            inner = slice(first, first + patch_px)
            self.canvas_NHWC[:used, inner, inner] = pixels_BPHWC.flatten(0, 1)
        with torch.inference_mode():
            logits = self.teacher(self.canvas_NHWC)
        if logits.shape != (len(self.canvas_NHWC), self.classes):
            raise InputError(
                f"teacher: expected logits of {self.classes} classes, got shape "
                f"{tuple(logits.shape)}; use a teacher trained on these classes"
            )
        losses = cross_entropy(logits[:used], labels_B.repeat_interleave(crops))
        if not np.isfinite(losses).all():
            raise InputError("teacher: expected finite losses, got NaN or infinity; retrain it")
        return losses.reshape(images, crops)

    def _enlarged(self, patches_NHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] of the image size, bicubic, as method upsample shows them."""
        images_NCHW = upsample_patches(patches_NHWC, self.shape[1], mode="bicubic")
        return images_NCHW.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
