"""Coresets of whole images that a model made once: what methods t2i and dsco write alike.

Their patches are images (factor 1), and no student of them needs the model: it is told as the
`generator` in the settings, and counts no bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset, write_coreset
from ...engine.expand import naming
from ..plan import Plan
from .source import as_uint8


def describe_generator(plan: Plan, expand: ExpandConfig) -> dict[str, Any]:
    """What of the model, used as `expand` says, names the images; plain JSON without paths."""
    if plan.model is None:
        return {"generate_size": expand.size_px}
    return naming.describe_generator(plan.model, expand, plan.prompt, plan.own_prompts)


def as_stored(images_BCHW: Tensor, size_px: int) -> Tensor:
    """Made images, fp32 in [-1, 1], of any size → uint8 [B, S, S, 3] on the CPU; bicubic."""
    if images_BCHW.shape[-1] != size_px:
        images_BCHW = interpolate(
            images_BCHW, (size_px, size_px), mode="bicubic", antialias=True, align_corners=False
        )
    return torch.from_numpy(np.ascontiguousarray(as_uint8(images_BCHW)))


def write_whole_images(
    plan: Plan,
    folder: Path,
    images_NHWC: Tensor,
    *,
    expand: ExpandConfig,
    settings: dict[str, Any],
    teacher: dict[str, Any],
    provenance: dict[str, Any],
) -> Coreset:
    """Write a coreset in place of what a killed run left.

    images_NHWC: uint8, of the plan's image size, class after class, equally many of each.
    `settings` are the method's own, `method` and `ipc` among them.
    """
    classes = len(plan.class_names)
    return write_coreset(
        folder,
        patches_NHWC=images_NHWC,
        labels_N=torch.arange(classes).repeat_interleave(len(images_NHWC) // classes),
        class_ids=plan.train.class_ids,
        class_names=plan.class_names,
        settings={
            "seed": plan.seed,
            "image_size_px": plan.image_size,
            "factor": 1,
            "patch_px": plan.image_size,
            "samples_per_class": plan.samples_per_class,
            "data_sha256": plan.data_sha256,
            "generator": describe_generator(plan, expand),
            **settings,
        },
        teacher=teacher,
        provenance=provenance,
        overwrite=True,
    )
