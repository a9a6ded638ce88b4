"""`torchvision:NAME`: a set that torchvision keeps as one array, written once as an image folder.

Sets that torchvision keeps as image files are given as folders, or by hf:NAME.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...engine.data.images import class_folders
from ...export.durable import cache_folder, full_disk_explained, json_sha256, replacing
from ..run.progress import Report

NAMES = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN", "USPS")
SPLITS = {"train": "train", "val": "test"}
_IMAGE_BYTES = 2**15  # more than the 96 x 96 x 3 of STL10's, which are the largest


def write_torchvision(name: str, root: Path | None, report: Report) -> Path:
    """Write `{train,val}/<class>/<number>.png` into the cache, unless it is there; the folder.

    torchvision finds the set in `root`, or downloads it there. Raises ValueError for a set that is
    not among NAMES, OSError for one that is neither there nor to be had.
    """
    if name not in NAMES:
        raise ValueError(
            f"--data torchvision:{name}: expected one of {', '.join(NAMES)}; for others give an "
            "image folder, or hf:NAME"
        )
    root = (root or cache_folder() / "torchvision").expanduser().absolute()
    folder = cache_folder() / f"torchvision-{name}-{json_sha256(str(root))[:8]}"
    if folder.is_dir():
        return folder
    sets = {split: _opened(name, root, of) for split, of in SPLITS.items()}
    total = sum(map(len, sets.values()))
    report.say(f"data: writing {total} images to {folder}")
    with (
        suppress(FileExistsError),  # another process finished first: its copy is the same
        full_disk_explained(folder, total * _IMAGE_BYTES, "set XDG_CACHE_HOME to a folder"),
        replacing(folder, overwrite=False) as building,
    ):
        for split, images in sets.items():
            _write(building / split, images, report)
    return folder


def _opened(name: str, root: Path, split: str) -> Any:
    from torchvision import datasets

    kind = getattr(datasets, name)
    by_flag = "train" in inspect.signature(kind).parameters
    chosen = {"train": split == "train"} if by_flag else {"split": split}
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(str(root), download=True, **chosen)
    except ImportError as error:  # SVHN's
        raise ValueError(f"--data torchvision:{name} needs {error.name}: pip install it") from None
    except (OSError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise OSError(
            f"--data torchvision:{name} is not in {root} and cannot be downloaded ({said}): put "
            f"{', '.join(_files(kind))} there, or give the folder that has it by --root"
        ) from error


def _files(kind: Any) -> list[str]:
    """The files that torchvision downloads, below the root."""
    if hasattr(kind, "resources"):
        return [f"{kind.__name__}/raw/{file}" for file, _ in kind.resources]
    if hasattr(kind, "split_list"):
        return [kind.split_list[split][1] for split in SPLITS.values()]
    return [kind.filename]


def _write(folder: Path, images: Any, report: Report) -> None:
    names = getattr(images, "classes", range(10))
    folders = class_folders(names, str(folder))
    for each in folders.values():
        (folder / each).mkdir(parents=True)
    width = len(str(len(images) - 1))
    for index in range(len(images)):
        image, label = images[index]
        image.save(folder / folders[names[label]] / f"{index:0{width}d}.png")
        report.progress(f"write {folder.name}", index + 1, len(images), "images")
