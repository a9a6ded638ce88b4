"""Accuracy of a network on an image folder, as `train` measures its students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from patchbloom.engine.data.images import with_classes
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.export.config import DeviceName
from patchbloom.train.config import StudentPrecision
from patchbloom.train.coreset_options import DataOptions
from patchbloom.train.data.forms import open_data
from patchbloom.train.networks import build_network
from patchbloom.train.plugins import is_function
from patchbloom.train.run.checkpoint import CheckpointError, read_tensors, restoring
from patchbloom.train.run.progress import Report
from patchbloom.train.students.loop import SCHEMA
from patchbloom.train.teacher.evaluation import evaluate as of_split
from torch import Tensor, nn


def evaluate(
    student: nn.Module | str | Path,
    data: str | Path,
    *,
    size_px: int | None = None,
    val_fraction: float | None = None,
    shapes_per_class: int = 1000,
    device: DeviceName = "auto",
) -> float:
    """Top-1 accuracy in percent, 0 to 100, on the whole validation split of a data set.

    data: any form of `train --data`; val_fraction: as --val-fraction. Shards are taken whole.

    student: a file in RUN/students, or a module from images [B, 3, size_px, size_px], normalised as
    ImageNet's, to logits of the folder's classes in sorted order; it stays where and as it is, and
    needs `size_px`. Images are resized to 8/7 of that and cropped in the centre. shapes_per_class:
    as in `select`. Raises ValueError or OSError, one clear line, for data, classes or a file that
    do not fit.

    >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 10))
    >>> 0 <= patchbloom.evaluate(student, "data", size_px=64) <= 100
    True
    """
    with Report() as report:
        where = DataOptions(val_fraction=val_fraction)
        (images,) = open_data(str(data), ("val",), report, where, shapes_per_class)
    precision: StudentPrecision = "fp32"
    if isinstance(student, nn.Module):
        network = student
        on = next((each.device for each in student.parameters()), torch.device("cpu"))
        if size_px is None:
            raise ValueError(
                "evaluate needs size_px, the side in px of the images that the module takes: a "
                'coreset\'s is core.settings["image_size_px"]'
            )
    else:
        network, class_ids, size_px, precision = _read(Path(student).expanduser())
        on = torch.device(resolve_device(device))
        network.to(on)
        images = with_classes(images, class_ids)
        if images.class_ids != class_ids:
            raise ValueError(
                f"{student}: expected its {len(class_ids)} classes ({class_ids[0]}, …) in {data}, "
                f"got {len(images.class_ids)} ({images.class_ids[0]}, …)"
            )
    logits, learning = _checked(network, len(images.class_ids)), network.training
    network.eval()
    try:
        (score,) = of_split([logits], images, size_px=size_px, device=on, precision=precision)
        return score.accuracy
    finally:
        network.train(learning)


def _checked(network: nn.Module, classes: int) -> Callable[[Tensor], Tensor]:
    """The network, which must answer with logits of this many classes."""

    def logits(images_BCHW: Tensor) -> Tensor:
        answer, expected = network(images_BCHW), (len(images_BCHW), classes)
        if answer.shape != expected:
            raise ValueError(
                f"student: expected logits {list(expected)} for the classes of the data, got "
                f"{list(answer.shape)}"
            )
        return answer

    return logits


def _read(path: Path) -> tuple[nn.Module, tuple[str, ...], int, StudentPrecision]:
    """A student of a run: network, classes, image size and precision."""
    if not path.is_file():
        raise FileNotFoundError(f"student {path}: no such file; give one of RUN/students")
    tensors, metadata = read_tensors(path)
    if metadata.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no student of a run: give a file of RUN/students")
    with restoring(path):
        config, class_ids = metadata["config"], tuple(metadata["class_ids"])
        if is_function(config["network"]):  # a file must not choose code to run
            raise CheckpointError(
                f"{path}: its network is a function, {config['network']}: call it, load the "
                "weights with safetensors.torch.load_model, and give the module"
            )
        network = build_network(config["network"], len(class_ids), config["size_px"])
        network.load_state_dict(tensors)
        return network, class_ids, config["size_px"], config["precision"]
