"""Method herding: real images, kept whole, whose mean follows their class's in the teacher's eyes.

After Welling's herding (ICML 2009), as Rebuffi et al. choose exemplars (iCaRL, CVPR 2017): of the
teacher's features x_i, whose mean over the class is m, the k-th image chosen is

    argmin_i | k · m - s - x_i |        s the sum of the features before it; no image twice

Features are those that --select looks at, and all of them are held: 0.5 GB for 256 thousand images
and a ResNet-18. Legend: M images of a rank's share, C of a class, D features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .method import Made, Making, Method, later


def herd(features_CD: np.ndarray, count: int) -> list[int]:
    """Positions of the images chosen, in that order; of equal ones the first."""
    features_CD = features_CD.astype(np.float64)
    mean_D, missing_D = features_CD.mean(0), 0.0
    chosen: list[int] = []
    for _ in range(count):
        missing_D = missing_D + mean_D
        distances_C = ((missing_D - features_CD) ** 2).sum(1)
        distances_C[chosen] = np.inf
        chosen.append(int(distances_C.argmin()))
        missing_D = missing_D - features_CD[chosen[-1]]
    return chosen


def herded(making: Making) -> np.ndarray:
    """Positions of the chosen training images, class after class; the ranks share the features."""
    import torch

    from ...engine.data.images import STANDARD_RESIZE_RATIO, center_boxes, stream_crops
    from ...engine.peers import share_of
    from ..teacher.evaluation import FORWARD_BATCH

    plan, world = making.plan, making.world
    teacher = making.teacher()
    batch = FORWARD_BATCH[teacher.device.type]
    own = share_of(np.arange(len(plan.train)), batch, world)
    stream = stream_crops(
        plan.train,
        own,
        center_boxes(STANDARD_RESIZE_RATIO, plan.image_size),
        crops=1,
        size_px=plan.image_size,
        batch=batch,
        device=plan.device,
        threads=world.threads,
    )
    features_MD = torch.empty(len(own), teacher.classifier.in_features)
    done = 0
    for crops in stream:
        with torch.inference_mode():
            _, features_BD = teacher.logits_and_features(crops.pixels_BPHWC[:, 0])
        features_MD[done : done + len(features_BD)] = features_BD.cpu()
        done += len(features_BD)
        making.report.progress("herding", done, len(own), "images")
    chosen: list[np.ndarray] = []
    for label in range(len(plan.class_names)):
        here = torch.from_numpy(plan.train.labels[own] == label)
        at_C = world.all_gather_rows(torch.from_numpy(own)[here])
        features_CD = world.all_gather_rows(features_MD[here])
        order = at_C.argsort()
        at_C, features_CD = at_C[order].numpy(), features_CD[order].numpy()
        chosen.append(at_C[herd(features_CD, plan.ipc)])
    return np.concatenate(chosen)


def _make(making: Making, _: Path) -> Made:
    import torch

    from .stored import read_whole

    plan, chosen = making.plan, herded(making)
    whole_NHWC = torch.empty(0)
    if making.world.leads:
        whole_NHWC = read_whole(plan.train, chosen, plan.image_size, plan.device)
    return Made(
        images_NHWC=whole_NHWC,
        settings={
            "factor": 1,
            "patch_px": plan.image_size,
            "ipc": plan.ipc,
            "samples_per_class": plan.samples_per_class,
        },
        provenance={"images": [plan.train.paths[index] for index in chosen]},
    )


def _takes(ipc: int, _: int) -> tuple[int, str]:
    return ipc, f"--ipc = {ipc} whole images are wanted: give a smaller one"


HERDING = Method(name="herding", takes=_takes, make=_make, open=later("stored.open_stored"))
