"""Train on an export with DD-Ranking's own code: python ddranking_probe.py EXPORT.

DD-Ranking must be on PYTHONPATH. Runs its hard-label evaluation on each of its inputs, a tensor and
a folder, with the export's own images in place of the validation set that it would download. The
last line is JSON: its subsets of ImageNet, and the accuracy of each input, in percent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from ddranking.metrics.hard_label import LabelRobustScoreHard
from ddranking.utils import TensorDataset, build_model, set_seed
from ddranking.utils.data import imagenet_subsets
from torch.utils.data import DataLoader
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS = 30


def main(export: Path) -> None:
    images_N3HW = torch.load(export / "images.pt", map_location="cpu")
    labels_N = torch.load(export / "labels.pt", map_location="cpu")
    steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    metric = object.__new__(LabelRobustScoreHard)  # __init__ downloads data
    vars(metric).update(
        use_dist=False,
        rank=0,
        device="cpu",
        num_workers=0,
        syn_batch_size=10,
        num_epochs=EPOCHS,
        test_interval=EPOCHS,
        optimizer="sgd",
        lr_scheduler="cosineannealing",
        step_size=None,
        weight_decay=0.0,
        momentum=0.9,
        aug_func=None,
        class_map=None,
        custom_train_trans=transforms.Compose(steps),
        test_loader_syn=DataLoader(TensorDataset(images_N3HW, labels_N), batch_size=100),
    )
    accuracies = []
    for given in ((images_N3HW, None), (None, str(export / "images"))):
        set_seed(0)
        size, classes = tuple(images_N3HW.shape[2:]), int(labels_N.max()) + 1
        model = build_model("ConvNet-3", num_classes=classes, im_size=size, device="cpu")
        accuracies.append(
            metric._compute_hard_label_metrics(model, *given, 0.01, labels_N, mode="syn")
        )
    print(json.dumps({"subsets": imagenet_subsets.dict, "accuracies": accuracies}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
