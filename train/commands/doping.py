"""Doping: add to a coreset the real images that a network trained on it is least sure of.

    margin = p(the teacher's class) - the largest other p,     p: the network's; it and the teacher
                                                               see the image as in validation
    the N images of lowest margin per class are stored whole beside the patches; ties by position

A student that already knows an image learns little from it; where the margin is low or negative,
the coreset lacks information. After DsCo (arXiv 2603.27987), where 500 real images join 100
generated ones per class. It applies to the coreset of every method.

Legend: M training images, B per batch, K classes, S image size in pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.coreset.coreset import Coreset, write_coreset
from ...engine.data.images import STANDARD_RESIZE_RATIO, ImageSet, center_boxes, stream_crops
from ...engine.peers import share_of
from ..config import StudentConfig, doping_seed
from ..labels.targets import OnlineLabels
from ..methods.open import open_source
from ..methods.stored import read_whole
from ..networks import build_network
from ..plan import Plan
from ..run.checkpoint import read_tensors
from ..run.folder import RunFolder
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
) -> Coreset | None:
    """Train a network on `coreset`, and write it to `folder` with --dope real images per class.

    All ranks of the run's world call it, and share the margins. Rank 0 trains alone, because the
    network's bits name the coreset; it writes the coreset and returns it, other ranks return None.
    Raises the errors of train_students.
    """
    world, config = run.world, _doping_student(plan)
    path = world.once(
        lambda: _trained(plan, config, run.folder / "students", report, teacher, coreset)
    )
    network = build_network(config.network, len(coreset.class_ids), config.size_px)
    network.load_state_dict(read_tensors(Path(path))[0])
    network.to(teacher.device).eval()
    margins_M = all_margins(
        network, teacher, plan.train, size_px=plan.image_size, report=report, world=world
    )
    if not world.leads:
        return None
    return write_doped(
        coreset,
        folder,
        plan.train,
        margins_M,
        per_class=plan.dope,
        views=plan.factor**2,
        made_with={
            "student": config.recipe(),
            "epochs": config.epochs,
            "seed": doping_seed(plan.seed),
        },
        device=plan.device,
        provenance=provenance,
    )


def _doping_student(plan: Plan) -> StudentConfig:
    """The run's student with soft labels, so that both --targets dope with the same images."""
    return replace(plan.student, targets="soft", temperature=plan.recipe.student.temperature)


def _trained(
    plan: Plan,
    config: StudentConfig,
    folder: Path,
    report: Report,
    teacher: Teacher,
    coreset: Coreset,
) -> str:
    """Train one extra student; returns its weights file."""
    with open_source(plan, coreset) as source:
        (result,) = train_students(
            source,
            OnlineLabels(teacher, config.temperature),
            config,
            seeds=[doping_seed(plan.seed)],
            val_set=None,
            folder=folder,
            report=report,
            name=f"{coreset.settings['method']}-doping",
        )
    return str(result.path)


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
    """The margin of every image, fp32 [M]; `network` is in eval mode, on the teacher's device.

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
    for of_rank in world.all_gather(scored):
        for index, margin in of_rank:
            margins_M[index] = margin
    return margins_M


def lowest_margins(margins_M: np.ndarray, labels_M: np.ndarray, per_class: int) -> np.ndarray:
    """Positions of the `per_class` lowest margins of each class, class after class, lowest first.

    Among equal margins the first counts as lower. Every class has at least `per_class` images.
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

    An epoch shows each of them `views` times. `made_with` describes how the network was trained.
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
