"""Coreset of method dsco: images whose noise is optimised, class after class.

engine/dsco/optimiser.py has the algorithm. The model makes images at its own size; they are resized
(bicubic, antialiased) and kept as 8-bit pixels. Real images are read once, as validation sees them,
class by class, so memory holds one class's pivots, however many images there are. Ranks share
groups of classes. A stopped run keeps its finished groups:

    RUN/dsco.partial/GROUP.safetensors      images and losses of a group of classes

Legend: K classes, M images of a group, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...engine.dsco.optimiser import NoiseOptimiser
from ..run.checkpoint import read_tensors, restoring, write_checkpoint
from .dsco import dsco_settings
from .method import Made, Making
from .source import open_expander, stream_whole
from .whole_images import as_stored, whole_settings


def optimise_images(making: Making, folder: Path) -> Made:
    """Make the images of every class; all ranks call it and get all of them.

    `folder` keeps finished groups. Raises ValueError for networks that overflow or a batch that
    does not fit.
    """
    plan, world = making.plan, making.world
    classes = len(plan.class_names)
    with open_expander(
        plan.model,
        plan.use["dsco"],
        world,
        labels_N=torch.arange(classes).repeat_interleave(plan.ipc),
        prompts_K=plan.prompts,
    ) as expander:
        optimiser = NoiseOptimiser(expander, plan.dsco, classes=classes, ipc=plan.ipc)
        groups = optimiser.groups()
        dealt = [groups[rank :: world.size] for rank in range(world.size)]
        own = [_made_or_kept(making, optimiser, group, folder) for group in dealt[world.rank]]
    world.barrier()  # groups may take hours; a gather of tensors times out before
    images_NSSC = world.all_gather_rows(_together([part["images"] for part in own]))
    losses_KS2 = world.all_gather_rows(_together([part["losses"] for part in own]))
    order_K = torch.tensor(
        [k for groups in dealt for group in groups for k in group], dtype=torch.int64
    ).argsort()
    by_class = images_NSSC.unflatten(0, (classes, -1))
    return Made(
        images_NHWC=by_class[order_K].flatten(0, 1),
        settings={
            **whole_settings(plan),
            "generator": plan.describe_generator("dsco"),
            "dsco": asdict(plan.dsco),
        },
        provenance={"losses": losses_KS2[order_K].double().mean(0).tolist()},
    )


def _together(parts: list[Tensor]) -> Tensor:
    """One tensor; empty on a rank without a group."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)


def _made_or_kept(
    making: Making, optimiser: NoiseOptimiser, group: range, folder: Path
) -> dict[str, Tensor]:
    """A group's images, uint8 [M, S, S, 3], and losses; read where an earlier session made them."""
    plan, report, classes = making.plan, making.report, optimiser.classes
    path = folder / f"{group.start:06d}.safetensors"
    config = {**dsco_settings(plan), "classes": list(group)}
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if metadata.get("config") == config:
            with restoring(path):
                return {name: tensors[name] for name in ("images", "losses")}

    def real_images(label: int) -> Iterator[tuple[Tensor, Tensor]]:
        of_class = np.flatnonzero(plan.train.labels == label)
        return stream_whole(plan.train, of_class, plan.use["dsco"].size_px, plan.device)

    made = optimiser.make(
        group,
        None if plan.dsco.data_free else real_images,
        lambda done: report.progress("dsco", round(group.start + done, 1), classes, "classes"),
    )
    losses_KS2 = torch.tensor(made.losses, dtype=torch.float32)
    tensors = {"images": as_stored(made.images_MCHW, plan.image_size), "losses": losses_KS2}
    write_checkpoint(path, tensors, {"config": config})
    before, after = losses_KS2.flatten(0, 1).mean(0).tolist()
    fall = f"loss {before:.3g} to {after:.3g}"
    report.progress("dsco", group.stop, classes, "classes", fall)
    return tensors
