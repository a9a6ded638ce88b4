"""A coreset as DD-Ranking (0.2) takes it: `compute_metrics(image_tensor=…)` or `(image_path=…)`.

    images.pt                fp32 [N, 3, H, W], with the data set's normalisation
    labels.pt                int64 [N], for `hard_labels` or `labels`
    images/00000/000000.png  the same images, a folder per class number, for `image_path`

An image is the mosaic of r² patches, so H = W is the image size, and a class has as many as
DD-Ranking counts as its budget: ipc, or the number generated once, then the real images that doping
added. Classes have DD-Ranking's numbers, not the order of the folders: ImageNet's subsets have an
order of their own, and folders 0 to 99 sort as 0, 1, 10. So every class is found by its id:
ImageNet's WordNet id, or CIFAR's name or number. DD-Ranking numbers TinyImageNet by the sorted
folders of its own copy: here it is only checked that they are 200 WordNet ids.

Soft labels are omitted: the stored ones belong to views, one per epoch, and DD-Ranking takes one
per image (mode S) or runs a teacher of its own (mode M). DD-Ranking reads files of `torch.save`,
which are pickles: these hold tensors alone, so torch.load's weights_only opens them. DD-Ranking
0.2.0 requires numpy below 2, but runs with 2, from a folder of its own: bench/ddranking_scores.py
lets it open an export both ways, and score it.

Legend: N images, K classes, M mosaics and D doped images per class, r factor, T = r² patches of a
mosaic, H W image size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...kernels.mosaic import mosaic
from ..coreset.coreset import Coreset, write_png
from ..data.names import imagenet_names
from ..errors import CoresetError

_Triple = tuple[float, float, float]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_TINY, _TINY_CLASSES = "TinyImageNet", 200
CIFAR_NAMES = {
    "CIFAR10": "airplane automobile bird cat deer dog frog horse ship truck",
    "CIFAR100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
        "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
        "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
        "house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
        "motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket "
        "rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
        "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
        "turtle wardrobe whale willow_tree wolf woman worm"
    ),
}
"""CIFAR's own names of its classes, in the order of its numbers."""
SUBSETS = {
    "ImageNet1K": tuple(range(1000)),
    "ImageNette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "ImageWoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "ImageMeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "ImageSquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "ImageFruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "ImageYellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}
"""ImageNet-1k's class indices, in DD-Ranking's order."""


def write_dd_ranking(coreset: Coreset, dataset: str | None, folder: Path) -> dict[str, Any]:
    """Fill `folder`; returns data set, ipc, image size, class ids in its order, and the like.

    Raises CoresetError for an unknown `dataset`, other classes than its own, or doped images of
    another size than the mosaics.
    """
    order = _class_order(coreset.class_ids, dataset)
    classes = [coreset.class_ids.index(class_id) for class_id in order]
    images_NHWC = _images(coreset, classes)
    ipc = len(images_NHWC) // len(classes)
    for number in range(len(classes)):
        (folder / "images" / f"{number:05d}").mkdir(parents=True)
        for each in range(ipc):
            path = folder / "images" / f"{number:05d}" / f"{each:06d}.png"
            write_png(path, images_NHWC[number * ipc + each].numpy())
    torch.save(_normalised(images_NHWC, dataset), folder / "images.pt")
    torch.save(torch.arange(len(classes)).repeat_interleave(ipc), folder / "labels.pt")
    return {
        "dataset": dataset,
        "ipc": ipc,
        "image_size_px": images_NHWC.shape[1],
        "class_order": order,
        "classes_checked": "by number alone" if dataset == _TINY else "by id",
        "images": len(images_NHWC),
    }


def _class_order(ids: Sequence[str], dataset: str | None) -> list[str]:
    """The class ids in the order of DD-Ranking's numbers."""
    known = (*CIFAR_NAMES, _TINY, *SUBSETS)
    found = {class_id: class_id for class_id in ids}
    if dataset in CIFAR_NAMES:
        found = {_plain(class_id): class_id for class_id in ids}
        names = CIFAR_NAMES[dataset].split()
        wanted = [str(n) for n in range(len(names))] if ids[0].isdecimal() else names
    elif dataset == _TINY:
        wordnet = [class_id for class_id in ids if re.fullmatch(r"n\d{8}", class_id)]
        wanted = (sorted(wordnet) + ["a WordNet id"] * _TINY_CLASSES)[:_TINY_CLASSES]
    elif dataset in SUBSETS:
        every = tuple(imagenet_names())
        wanted = [every[index] for index in SUBSETS[dataset]]
    else:
        raise CoresetError(
            f"--dataset {dataset}: expected DD-Ranking's name of the data set, which decides class "
            f"numbers and normalisation, one of {', '.join(known)}"
        )
    if sorted(found) != sorted(wanted) or len(found) != len(ids):
        strange = next((found[each] for each in found if each not in wanted), None)
        raise CoresetError(
            f"--dataset {dataset}: expected {len(wanted)} class folders ({', '.join(wanted[:3])}, "
            f"…), got {len(ids)}{f', {strange!r} among them' if strange else ''}: give the data "
            "set that the coreset was made of, or make the coreset of folders named so"
        )
    return [found[class_id] for class_id in wanted]


def _plain(class_id: str) -> str:
    """7 for "007", lawn_mower for "Lawn mower"."""
    return str(int(class_id)) if class_id.isdecimal() else re.sub(r"[\W_]+", "_", class_id.lower())


def _images(coreset: Coreset, classes: list[int]) -> torch.Tensor:
    """Each class's mosaics, then its doped images: uint8 [N, H, W, 3]."""
    factor, order_K = coreset.settings["factor"], torch.tensor(classes, dtype=torch.int64)
    patches_N = torch.arange(len(coreset.labels_N))
    patches_KMT = patches_N.reshape(len(classes), -1, factor**2)[order_K]
    made_NHWC = mosaic(coreset.patches(), patches_KMT.flatten(0, 1), factor)
    if not coreset.doped_per_class:
        return made_NHWC
    real_NHWC = coreset.doped()
    if made_NHWC.shape[1:] != real_NHWC.shape[1:]:
        raise CoresetError(
            f"{coreset.folder}: expected doped images of {made_NHWC.shape[1]} px, the size of its "
            f"mosaics, as images.pt holds one size, got {real_NHWC.shape[1]} px: export to another "
            "format, or the coreset without doped images"
        )
    by_class = (len(classes), -1)
    made_KMHWC = made_NHWC.unflatten(0, by_class)  # in DD-Ranking's order already
    real_KDHWC = real_NHWC.unflatten(0, by_class)[order_K]
    return torch.cat([made_KMHWC, real_KDHWC], 1).flatten(0, 1)


def mean_and_std(dataset: str | None) -> tuple[_Triple, _Triple]:
    """DD-Ranking's normalisation of the data set: per channel, for pixels in [0, 1]."""
    return _CIFAR if dataset in CIFAR_NAMES else _IMAGENET


def _normalised(images_NHWC: torch.Tensor, dataset: str | None) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in mean_and_std(dataset))
    images_NCHW = images_NHWC.permute(0, 3, 1, 2).float().contiguous().div_(255)
    return images_NCHW.sub_(mean[:, None, None]).div_(std[:, None, None])
