"""Method herding: whole real images whose mean feature follows the mean of their class.

Welling's herding (ICML 2009), as Rebuffi et al. choose exemplars (iCaRL, CVPR 2017). With the
teacher's features x_i of a class and their mean m, the k-th chosen image is

    argmin_i | k · m - s - x_i |        s: sum of the features chosen before; no image twice

The features are those that --select compares. All of them are held in memory: 0.5 GB for 256
thousand images and a ResNet-18. Legend: M images of a rank's share, C of a class, D features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .method import Made, Making, Method, later


def herd(features_CD: np.ndarray, count: int) -> list[int]:
    """Positions of the chosen images, in order of choice; ties go to the first."""
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
    """Positions of the chosen training images, class after class; ranks share the features."""
    import torch

    from ...engine.peers import share_of
    from ..teacher.evaluation import FORWARD_BATCH
    from .source import stream_whole

    plan, world = making.plan, making.world
    teacher = making.teacher()
    batch = FORWARD_BATCH[teacher.device.type]
    own = share_of(np.arange(len(plan.train)), batch, world)
    features_MD = torch.empty(len(own), teacher.classifier.in_features, dtype=torch.float32)
    done = 0
    for pixels_BHWC, _ in stream_whole(
        plan.train, own, plan.image_size, plan.device, batch=batch, threads=world.threads
    ):
        with torch.inference_mode():
            _, features_BD = teacher.logits_and_features(pixels_BHWC)
        features_MD[done : done + len(features_BD)] = features_BD.cpu()
        done += len(features_BD)
        making.report.progress("herding", done, len(own), "images")
    chosen: list[np.ndarray] = []
    for label in range(len(plan.class_names)):
        here = torch.from_numpy(plan.train.labels[own] == label)
        at_C = world.all_gather_rows(torch.from_numpy(own)[here])
        features_CD = world.all_gather_rows(features_MD[here])
        order_C = at_C.argsort()
        picks = herd(features_CD[order_C].numpy(), plan.ipc)
        chosen.append(at_C[order_C].numpy()[picks])
    return np.concatenate(chosen)


def _make(making: Making, _: Path) -> Made:
    import torch

    from .whole_images import read_whole, whole_settings

    plan, chosen = making.plan, herded(making)
    images_NHWC = torch.empty(0, dtype=torch.float32)
    if making.world.leads:
        images_NHWC = read_whole(plan.train, chosen, plan.image_size, plan.device)
    return Made(
        images_NHWC=images_NHWC,
        settings=whole_settings(plan),
        provenance={"images": [plan.train.paths[index] for index in chosen]},
    )


HERDING = Method(name="herding", takes="images", make=_make, open=later("whole_images.open_stored"))
