"""For tests of students and labels: small sets, sources, teachers, a Report."""

from __future__ import annotations

from pathlib import Path

import torch
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.train.config import StudentConfig
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.labels.targets import Labels
from patchbloom.train.methods.source import ImageSource, Mosaics, UpsampledPatches
from patchbloom.train.networks import build_network
from patchbloom.train.run.checkpoint import read_tensors
from patchbloom.train.students.loop import StudentResult, train_students
from patchbloom.train.teacher.teacher import Teacher

CONFIG = StudentConfig(
    network="convnet-d3-w8",
    size_px=32,
    epochs=4,
    batch=8,
    temperature=4.0,
    checkpoint_every=2,
    pool=20,
    device="cpu",
)
LABELS_N = torch.arange(10).repeat_interleave(4)
PATCHES = torch.randint(
    0, 256, (40, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
Sets = tuple[ImageSet, ImageSet]


class Silent:
    """A Report that interrupts training after `stop_after` epochs of a student."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.said: list[str] = []
        self.stop_after = stop_after

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None:
        if done == self.stop_after:
            raise KeyboardInterrupt

    def scalar(self, tag: str, step: int, value: float) -> None:
        self.losses.append(value)

    def say(self, line: str) -> None:
        self.said.append(line)


def new_sets(root: Path) -> Sets:
    """Write four training and two validation images per class; ten classes."""
    write_shapes(root, train_per_class=4, val_per_class=2)
    return open_image_set(root, "train"), open_image_set(root, "val")


def upsampled(sets: Sets) -> UpsampledPatches:
    return UpsampledPatches(
        method="upsample",
        patches_NHWC=PATCHES,
        labels_N=LABELS_N,
        class_ids=sets[0].class_ids,
        size_px=32,
    )


def mosaics(**changed) -> Mosaics:
    ids = tuple("abcdefghij")
    options = {"patches_NHWC": PATCHES, "labels_N": LABELS_N, "class_ids": ids}
    return Mosaics(**{**options, "factor": 2, "seed": 0, **changed})


def untrained_teacher(sets: Sets, sharpness: float = 1.0) -> Teacher:
    """A teacher whose logits are about 0.05, times `sharpness`."""
    torch.manual_seed(5)
    network = build_network("convnet-d3-w8", 10, 32)
    *_, weight, _ = network.parameters()
    weight.data.mul_(sharpness)
    return Teacher(network, architecture="convnet-d3-w8", class_ids=sets[0].class_ids, size_px=32)


def train(
    source: ImageSource,
    labels: Labels,
    sets: Sets,
    folder: Path,
    config: StudentConfig = CONFIG,
    **options,
) -> list[StudentResult]:
    options = {"seeds": [0, 1], "report": Silent(), **options}
    return train_students(source, labels, config, val_set=sets[1], folder=folder, **options)


def weights(result: StudentResult) -> dict[str, torch.Tensor]:
    return read_tensors(result.path)[0]


def same(one: StudentResult, other: StudentResult) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
