"""Doping: add to a coreset the real images that a network trained on it is least sure of.

    margin = p(the teacher's class) - the largest other p

p are the network's probabilities; it and the teacher see the image as in validation. The images of
lowest margin in each class are stored whole beside the patches; ties are broken by position.

A student that already knows an image learns little from it; where the margin is low or negative,
the coreset lacks information. After DsCo (arXiv 2603.27987), where 500 real images join 100
generated ones per class. Doping works for the coreset of every method.

Legend: M training images, B per batch, K classes, S image size in pixels.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.coreset.coreset import Coreset, write_coreset
from ...engine.coreset.manifest import DOPED
from ...engine.data.crops import STANDARD_RESIZE_RATIO, center_boxes, stream_crops
from ...engine.data.images import ImageSet
from ...engine.peers import share_of
from ...export.durable import json_sha256
from ..config import doping_seed
from ..labels.targets import OnlineLabels
from ..methods.open import open_source
from ..methods.whole_images import read_whole
from ..networks import build_network
from ..plan import Plan
from ..run.checkpoint import read_tensors
from ..run.folder import RunFolder, StageResult
from ..run.progress import Report
from ..run.world import ALONE, World
from ..students.loop import train_students
from ..teacher.evaluation import FORWARD_BATCH
from ..teacher.normalisation import IMAGENET
from ..teacher.teacher import Teacher


def dope(
    plan: Plan,
    run: RunFolder,
    report: Report,
    teacher: Teacher,
    *,
    coreset: Coreset,
    folder: Path,
    provenance: dict[str, Any],
) -> StageResult:
    """Train a network on `coreset`, and write it to `folder` with --dope real images per class.

    All ranks of the run's world call it, and share the margins. Rank 0 trains alone, because the
    network's bits name the coreset, and writes; the other ranks' result is empty. Raises the errors
    of train_students.
    """
    # With soft labels, so that both --targets dope with the same images.
    temperature = plan.recipe.student.temperature
    config = replace(plan.student, targets="soft", temperature=temperature)
    seed = doping_seed(plan.seed)

    def train() -> str:
        with open_source(plan, coreset) as source:
            (trained,) = train_students(
                source,
                OnlineLabels(teacher, config.temperature),
                config,
                seeds=[seed],
                val_set=None,
                folder=run.folder / "students",
                report=report,
                name=f"{coreset.settings['method']}-doping",
            )
        return str(trained.path)

    weights = read_tensors(Path(run.world.once(train)))[0]
    network = build_network(config.network, len(coreset.class_ids), config.size_px)
    network.load_state_dict(weights)
    network.to(teacher.device).eval()
    margins_M = all_margins(
        network, teacher, plan.train, size_px=plan.image_size, report=report, world=run.world
    )
    if not run.world.leads:
        return StageResult({})
    doped = write_doped(
        coreset,
        folder,
        plan.train,
        margins_M,
        per_class=plan.dope,
        views=plan.factor**2,
        made_with={"student": config.recipe(), "epochs": config.epochs, "seed": seed},
        device=plan.device,
        provenance=provenance,
    )
    images = {k: v for k, v in doped.manifest["files"].items() if k.startswith(f"{DOPED}/")}
    return StageResult(
        {"doped_sha256": json_sha256(images)}, [doped.folder / name for name in images]
    )


def margins_of(probabilities_BK: Tensor, classes_B: Tensor) -> Tensor:
    """p(class) - the largest other p: [B] in [-1, 1]."""
    own_B1 = probabilities_BK.gather(1, classes_B[:, None])
    others_BK = probabilities_BK.scatter(1, classes_B[:, None], -1.0)
    return (own_B1 - others_BK.amax(1, keepdim=True))[:, 0]


@torch.inference_mode()
def all_margins(
    network: nn.Module,
    teacher: Teacher,
    images: ImageSet,
    *,
    size_px: int,
    report: Report,
    world: World = ALONE,
) -> np.ndarray:
    """The margin of every image, fp32 [M]; `network` must be in eval mode on the teacher's device.

    The ranks of `world` share the images.
    """
    batch = FORWARD_BATCH[teacher.device.type]
    own = share_of(np.arange(len(images)), batch, world)
    scored: list[tuple[int, float]] = []
    stream = stream_crops(
        images,
        own,
        center_boxes(STANDARD_RESIZE_RATIO, size_px),
        crops=1,
        size_px=size_px,
        batch=batch,
        device=str(teacher.device),
        threads=world.threads,
    )
    for crops in stream:
        inputs_BCHW = IMAGENET.of_uint8(crops.pixels_BPHWC[:, 0])
        classes_B = teacher.logits(inputs_BCHW).argmax(1)
        margins_B = margins_of(network(inputs_BCHW).float().softmax(1), classes_B)
        scored += zip(crops.index_B.tolist(), margins_B.tolist(), strict=True)
        report.progress("doping", len(scored), len(own), "images")
    margins_M = np.empty(len(images), np.float32)
    for index, margin in chain.from_iterable(world.all_gather(scored)):
        margins_M[index] = margin
    return margins_M


def lowest_margins(margins_M: np.ndarray, labels_M: np.ndarray, per_class: int) -> np.ndarray:
    """Positions of the `per_class` lowest margins of each class, class after class, lowest first.

    Among equal margins the first counts as lower. Every class must have `per_class` images.
    """
    order_M = np.lexsort((margins_M, labels_M))
    firsts_K = np.searchsorted(labels_M[order_M], np.unique(labels_M))
    return np.concatenate([order_M[first : first + per_class] for first in firsts_K])


def write_doped(
    coreset: Coreset,
    folder: Path,
    images: ImageSet,
    margins_M: np.ndarray,
    *,
    per_class: int,
    views: int,
    made_with: dict[str, Any],
    device: str,
    provenance: dict[str, Any],
) -> Coreset:
    """Write `coreset` again, with the real images of lowest margin and without labels.

    An epoch shows each real image `views` times. `made_with` describes the network's training.
    """
    chosen = lowest_margins(margins_M, images.labels, per_class)
    doping = {"images_per_class": per_class, "samples_per_class": per_class * views, **made_with}
    added = [
        {"image": images.paths[index], "margin": round(float(margins_M[index]), 6)}
        for index in chosen.tolist()
    ]
    manifest = coreset.manifest
    return write_coreset(
        folder,
        patches_NHWC=coreset.patches(),
        class_ids=coreset.class_ids,
        class_names=coreset.class_names,
        settings={**coreset.settings, "doping": doping},
        model=manifest["model"],
        teacher=manifest["teacher"],
        doped_DHWC=read_whole(images, chosen, coreset.settings["image_size_px"], device),
        provenance={**manifest["provenance"], **provenance, "doped": added},
        overwrite=True,  # replaces what a killed run left
    )
