"""LRS and ARS of an export for DD-Ranking 0.2.0, trained, validated and computed by DD-Ranking.

    engine coreset export CORESET --to ddranking --dataset CIFAR10 --out EXPORT
    python bench/ddranking_scores.py EXPORT --data DIR --model ConvNet-3 > scores.json

`make setup` puts DD-Ranking into .ddranking. All is its code, but for what it cannot do here:

- Its `get_dataset` would download: the real images are those of --data, numbered as in the export.
- Its `save_results` fails on the lists of LabelRobustScoreHard, of unequal length: it is left out.
- AugmentationRobustScore lacks two attributes with hard labels, which are set.
- It validates every 10 (LRS, hard) or 20 epochs: every --epochs, if that is fewer.
- Soft labels are answers of our teacher to every batch (its mode M).

LabelRobustScoreHard is given images.pt and labels.pt and draws random images as tensors; the others
can draw them only as files, those of CIFAR as JPEG, and are given the folder. Settings are those of
DD-Ranking's sample configurations: SGD and DSA for hard labels, AdamW, CutMix and KL at temperature
1 for soft ones. Schedules are cosines, as AugmentationRobustScore can take no other.

Work: every accuracy is the best of five learning rates: 10 trainings for LRS and 20 for ARS in each
evaluation; a teacher adds 15 and 20. By default that is 150 (325) trainings of 300 epochs, and 5
(10) on all real images unless their accuracy is known or given: it is meant for a GPU, where it has
not run yet. DD-Ranking chooses rate and epoch by the test images, and seeds by the clock: do not
put its accuracies beside ours, and expect no two runs to agree.

A score has DD-Ranking's means and standard deviations over evaluations, and the accuracies behind
them, in percent, per evaluation in this order:

    lrs_hard  coreset, real (if trained), random
    lrs_soft  coreset with hard labels, real (if trained), coreset, random
    ars_*     coreset and random with augmentation, coreset and random without

    HLR = real − coreset (hard labels),  IOR = coreset − random,  LRS = s((IOR − HLR) / 2)
    ARS = s((sum of its two differences) / 2),  s(a) = (exp(a) − exp(−1)) / (exp(1) − exp(−1))

0.2.0 puts percentage points into s and so leaves the [0, 1] that its README promises (arXiv
2505.13300). `of_fractions` is the mean score by the same formula of accuracies in [0, 1].
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import exp
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measure import run_program
from patchbloom.engine.formats.ddranking import mean_and_std
from patchbloom.train.teacher.given import load_teacher
from patchbloom.train.teacher.normalisation import Normalisation
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.append(str(Path(__file__).parents[1] / ".ddranking" / str(sys.implementation.cache_tag)))
CLASSES = {
    "lrs_hard": ("hard_label", "LabelRobustScoreHard"),
    "ars_hard": ("aug_robust", "AugmentationRobustScore"),
    "lrs_soft": ("soft_label", "LabelRobustScoreSoft"),
    "ars_soft": ("aug_robust", "AugmentationRobustScore"),
}
HARD: dict[str, Any] = {
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "lr_scheduler": "cosineannealing",
    "data_aug_func": "dsa",
    "aug_params": {"flip": 0.5, "rotate": 15.0, "saturation": 2.0, "brightness": 1.0}
    | {"contrast": 0.5, "scale": 1.2, "crop": 0.125, "cutout": 0.5},
}
SOFT: dict[str, Any] = {
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "lr_scheduler": "cosine",
    "data_aug_func": "cutmix",
    "aug_params": {"beta": 1.0},
    "soft_label_mode": "M",
    "soft_label_criterion": "kl",
    "loss_fn_kwargs": {"temperature": 1.0},
    "teacher_model_names": [],  # none of its own
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """LRS and ARS of an export, by DD-Ranking 0.2.0."""

    export: tyro.conf.Positional[Path]
    """A folder of `engine coreset export --to ddranking`."""
    data: Path
    """The real images: train/CLASS, and val/CLASS or test/CLASS, with the export's class ids."""
    model: str
    """DD-Ranking's name of the student, such as ConvNet-3 or ResNet-18-BN."""
    teacher: str | None = None
    """A file of `train teacher`, or torchvision:NAME. Default: hard labels only."""
    full_accuracy: float | None = None
    """The student's on all real images, in percent. Default: DD-Ranking's number, else trained."""
    epochs: int = 300
    evaluations: int = 5
    workers: int = 4
    """Processes of each data loader."""
    device: Literal["cpu", "cuda"] = "cuda"


class RealImages(ImageFolder):
    """A split with DD-Ranking's class numbers: places in `order`, not among sorted folders."""

    def __init__(self, root: Path, order: list[str], transform: Any) -> None:
        self.order = order
        super().__init__(str(root), transform)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self.order, {class_id: number for number, class_id in enumerate(self.order)}


class SoftLabels(torch.nn.Module):
    """The teacher's logits [B, K] of DD-Ranking's inputs, in the order of the export's classes."""

    def __init__(self, options: Options, told: dict[str, Any]) -> None:
        super().__init__()
        order = told["class_order"]
        self.teacher = load_teacher(str(options.teacher), sorted(order), device=options.device)
        self.columns = [sorted(order).index(class_id) for class_id in order]
        self.normalisation = Normalisation(*mean_and_std(told["dataset"]))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.teacher.logits(images_BCHW, self.normalisation)[:, self.columns]


def main(options: Options) -> None:
    told = json.loads((options.export / "export.json").read_text())
    if told["format"] != "ddranking":
        raise ValueError(
            f"{options.export}: expected an export --to ddranking, got {told['format']}"
        )
    about = {"coreset": told["coreset"], "dataset": told["dataset"], "ipc": told["ipc"]}
    names = list(CLASSES) if options.teacher else ["lrs_hard", "ars_hard"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        scores = {name: compute(options, told, name, folder) for name in names}
    print(json.dumps(about | {"settings": vars(options)} | scores, indent=1, default=str))


def compute(options: Options, told: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """One score; `folder` is for the random images."""
    file, class_name = CLASSES[name]
    score, labels = name.split("_")
    module: Any = import_module(f"ddranking.metrics.{file}")
    real, lists = real_data(options, told), []
    module.get_dataset = lambda *_: real
    module.save_results = lambda given, _: lists.extend(given.values())
    own = {"label_type": labels} if score == "ars" else full_accuracy(options, told, module)
    metric = getattr(module, class_name)(
        dataset=told["dataset"],
        ipc=told["ipc"],
        im_size=real[1],
        model_name=options.model,
        num_eval=options.evaluations,
        num_epochs=options.epochs,
        num_workers=options.workers,
        device=options.device,
        custom_train_trans=real[5].transform,
        random_data_format="tensor" if name == "lrs_hard" else "image",
        random_data_path=folder,
        save_path=f"{folder}/scores.csv",
        **own,
        **(SOFT if labels == "soft" else HARD),
    )
    metric.test_loader_real = metric.test_loader_syn
    metric.test_interval = min(metric.test_interval, options.epochs)
    metric.teacher_models = [SoftLabels(options, told)] if labels == "soft" else None
    accuracies = record_accuracies(metric)
    means = metric.compute_metrics(**images(options.export, name))
    signs = (-1, 1) if score == "lrs" else (1, 1)  # HLR, IOR
    return means | {"of_fractions": of_fractions(lists, signs), "accuracies": accuracies}


def real_data(options: Options, told: dict[str, Any]) -> tuple[Any, ...]:
    """The answer of DD-Ranking's `get_dataset`, with its steps for subsets of ImageNet."""
    size, (mean, std) = (told["image_size_px"],) * 2, mean_and_std(told["dataset"])
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std), transforms.Resize(size)]
    order, test = told["class_order"], "val" if (options.data / "val").is_dir() else "test"
    train, held_out = (
        RealImages(options.data / split, order, transforms.Compose(steps))
        for split in ("train", test)
    )
    numbers = {number: number for number in range(len(order))}
    return 3, size, mean, std, len(order), train, held_out, held_out, numbers, numbers


def full_accuracy(options: Options, told: dict[str, Any], module: Any) -> dict[str, bool]:
    """Whether to train on all real images, for which DD-Ranking has only some recipes."""
    key = f"{told['dataset']}-{options.model}"
    if options.full_accuracy is not None:
        module.REAL_DATA_ACC_CACHE[key] = options.full_accuracy
    known = key in module.REAL_DATA_ACC_CACHE
    if not known and key not in module.REAL_DATA_TRAINING_CONFIG:
        raise ValueError(f"DD-Ranking cannot train {key} on all images: give --full-accuracy")
    return {"eval_full_data": not known}


def images(export: Path, name: str) -> dict[str, Any]:
    if name != "lrs_hard":
        return {"image_path": str(export / "images")}
    tensors = {"image_tensor": "images.pt", "hard_labels": "labels.pt"}
    return {name: torch.load(export / file) for name, file in tensors.items()}


def of_fractions(lists: list[list[float]], signs: tuple[int, int]) -> float:
    """The mean score of the evaluations' two differences, in percentage points in `lists`."""
    halves = [(signs[0] * a + signs[1] * b) / 200 for a, b in zip(*lists[:2], strict=True)]
    return sum((exp(a) - exp(-1)) / (exp(1) - exp(-1)) for a in halves) / len(halves)


def record_accuracies(metric: Any) -> list[float]:
    """A list that fills with accuracies, which DD-Ranking only prints, rounded."""
    accuracies: list[float] = []

    def recorded(call: Any, **given: Any) -> tuple[float, float]:
        accuracy, rate = call(**given)
        accuracies.append(accuracy)
        return accuracy, rate

    for name in [name for name in dir(metric) if name.endswith("_metrics_helper")]:
        setattr(metric, name, partial(recorded, getattr(metric, name)))
    return accuracies


if __name__ == "__main__":
    run_program(main, Options)
