"""The images of method dsco: noise optimisation, class after class.

The algorithm is in engine/dsco/optimiser.py.

The model makes them at its own size; they are then resized (bicubic, antialiased) and kept as 8-bit
pixels. Real images are seen once, as validation sees them, class by class: the memory is that of
one class's pivots, however many images there are. Groups of classes are dealt to the ranks of a
world, and what is done of them is kept in the run folder, so that a stopped run goes on:

    RUN/dsco.partial/GROUP.safetensors      images and losses of a group of classes

Legend: K classes, N = K · ipc images, M images of a group, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.data.images import STANDARD_RESIZE_RATIO, center_boxes, stream_crops
from ...engine.dsco.optimiser import NoiseOptimiser, RealImages
from ..plan import Plan
from ..run.checkpoint import read_tensors, write_tensors
from ..run.folder import settings_by_option
from ..run.progress import Report
from ..run.world import World
from .method import Made, Making
from .source import open_expander
from .stored import as_stored, whole_settings

DECODED_TOGETHER = 64  # real images


def optimise_images(making: Making, folder: Path) -> Made:
    """Make ipc images of each class; all ranks call it, and get all of them.

    `folder` keeps what is done. ValueError: networks that overflow, a batch that does not fit.
    """
    plan, world = making.plan, making.world
    config = dsco_settings(plan)
    with _optimiser(plan, world) as optimiser:
        groups = optimiser.groups()
        dealt = [groups[rank :: world.size] for rank in range(world.size)]
        own = [
            _made_or_kept(plan, optimiser, group, folder, config, making.report)
            for group in dealt[world.rank]
        ]
    world.barrier()  # the groups may take hours, and tensors do not wait for so long
    images_NSSC = world.all_gather_rows(_together([part["images"] for part in own]))
    losses_KS2 = world.all_gather_rows(_together([part["losses"] for part in own]))
    classes_K = torch.tensor([index for of_rank in dealt for group in of_rank for index in group])
    order_K = classes_K.argsort()
    of_class = images_NSSC.view(len(order_K), plan.ipc, *images_NSSC.shape[1:])
    return Made(
        images_NHWC=of_class[order_K].flatten(0, 1),
        settings={**whole_settings(plan, "dsco"), "ipc": plan.ipc, "dsco": asdict(plan.dsco)},
        provenance={"losses": losses_KS2[order_K].double().mean(0).tolist()},
    )


def _together(parts: list[Tensor]) -> Tensor:
    """One tensor; of a rank that had no group, an empty one."""
    return torch.cat(parts) if parts else torch.empty(0)


@contextmanager
def _optimiser(plan: Plan, world: World) -> Iterator[NoiseOptimiser]:
    """Frees the model at the end."""
    classes, ipc = len(plan.class_names), plan.ipc
    with open_expander(
        plan.model,
        plan.use["dsco"],
        world,
        labels_N=torch.arange(classes).repeat_interleave(ipc),
        prompts_K=plan.prompts,
    ) as expander:
        yield NoiseOptimiser(expander, plan.dsco, classes=classes, ipc=ipc)


def _made_or_kept(
    plan: Plan,
    optimiser: NoiseOptimiser,
    group: range,
    folder: Path,
    config: dict[str, Any],
    report: Report,
) -> dict[str, Tensor]:
    """A group's images, uint8 [M, S, S, 3], and losses; of an earlier session, if it made them."""
    path, config = folder / f"{group.start:06d}.safetensors", {**config, "classes": list(group)}
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if metadata.get("config") == config:
            return tensors
    classes = optimiser.classes
    made = optimiser.make(
        group,
        None if plan.dsco.data_free else _real_images(plan),
        lambda done: report.progress("dsco", round(group.start + done, 1), classes, "classes"),
    )
    tensors = {
        "images": as_stored(made.images_MCHW, plan.image_size),
        "losses": torch.tensor(made.losses),
    }
    write_tensors(path, tensors, {"config": config})
    report.progress("dsco", group.stop, classes, "classes", _falls(tensors["losses"]))
    return tensors


def _falls(losses_KS2: Tensor) -> str:
    before, after = losses_KS2.flatten(0, 1).mean(0).tolist()
    return f"loss {before:.3g} to {after:.3g}"


def _real_images(plan: Plan) -> RealImages:
    """All training images of a class at the model's size, in order."""
    size_px = plan.use["dsco"].size_px

    def of_class(index: int) -> Iterator[tuple[Tensor, Tensor]]:
        stream = stream_crops(
            plan.train,
            np.flatnonzero(plan.train.labels == index),
            center_boxes(STANDARD_RESIZE_RATIO, size_px),
            crops=1,
            size_px=size_px,
            batch=DECODED_TOGETHER,
            device=plan.device,
        )
        for crops in stream:
            yield crops.pixels_BPHWC[:, 0], crops.index_B

    return of_class


def dsco_settings(plan: Plan) -> dict[str, Any]:
    """All that decides the images, for a stage's config: plain JSON, by option."""
    options = {
        f"--dsco.{name.replace('_', '-')}": value for name, value in asdict(plan.dsco).items()
    }
    shared = {"--ipc": plan.ipc, "--seed": plan.seed, "--data": plan.data_sha256}
    return {
        **options,
        **shared,
        **settings_by_option("dsco", plan.describe_generator("dsco")),
    }
