"""An image dataset where it lies: a list of its images.

An ``ImageSet`` lists images and opens none: the files of an ImageFolder, or what a ``Store`` holds
(shards.py, arrow.py). Only the list grows with the number of images: 95 B each for paths of 30
letters, and 16 B for an order of them; 1.6 GB for the 14 million of ImageNet-21k.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, Protocol
from unicodedata import normalize

import numpy as np

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SUFFIXES = ", ".join(SUFFIXES)
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test")}
GIVE_VAL = "give --val-data or --val-fraction"
GIVE_LABELS = f"give images with labels; for validation {GIVE_VAL}"
Label = int | str
"""The number or the name of a class."""


class InputError(ValueError):
    """The user's data does not fit the request; the message says what to do."""


class UnlabelledError(InputError):
    """Images that say no class; the message names the first."""


class Store(Protocol):
    """Holds images that are no files of their own; `row` is the place of one in it."""

    def place(self, row: int) -> str:
        """Its container, to name before the image in a message."""
        ...

    def read(self, row: int) -> np.ndarray:
        """Its encoded bytes, uint8 [n]."""
        ...

    def status(self, row: int) -> tuple[int, int, int]:
        """Its size in bytes, and the modification time (ns) and inode of the file around it."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """The images of one split, sorted by class folder, then by name."""

    root: Path
    """The folder that holds the class folders, e.g. DIR/train; what was given for a store."""
    split: str
    class_ids: tuple[str, ...]
    """Class folder names, sorted; the class index is the position in this tuple."""
    paths: tuple[str, ...]
    """Relative to ``root``, with forward slashes: ``n01440764/n01440764_10026.JPEG``. Images of a
    store are named as an image folder would name them."""
    labels: np.ndarray
    """int64 [len(paths)], ascending."""
    passed_over: tuple[str, ...] = ()
    """Files that are no images by their suffix, or lie in no class folder; relative to ``root``."""
    store: Store | None = None
    """None: the images are files below ``root``."""
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [len(paths)]: where the images lie in the store."""

    def __len__(self) -> int:
        return len(self.paths)

    def taken(self, index_M: np.ndarray) -> ImageSet:
        """The set with these images alone, in this order."""
        paths = tuple(self.paths[index] for index in index_M)
        rows = self.rows if self.store is None else self.rows[index_M]
        return replace(self, paths=paths, labels=self.labels[index_M], rows=rows)

    def place(self, index: int) -> str:
        """The image's name in a message: its path, or what holds it and its path there."""
        if self.store is None:
            return f"{self.root}/{self.paths[index]}"
        return f"{self.store.place(int(self.rows[index]))}: {self.paths[index]}"

    def read(self, index: int) -> np.ndarray:
        """Its encoded bytes, uint8 [n]; [0] for a dangling link or a special file, which might
        never end."""
        if self.store is not None:
            return self.store.read(int(self.rows[index]))
        path = self.place(index)
        if not os.path.isfile(path) and os.path.lexists(path):
            return np.zeros(0, np.uint8)
        return np.fromfile(path, np.uint8)

    def status(self, index: int) -> tuple[int, int, int]:
        """Size, modification time and inode: of the link itself if it leads nowhere."""
        if self.store is not None:
            return self.store.status(int(self.rows[index]))
        try:
            found = os.stat(self.place(index))
        except OSError:
            found = os.lstat(self.place(index))
        return found.st_size, found.st_mtime_ns, found.st_ino % 2**63


def open_image_set(
    root: Path | str, split: Literal["train", "val"], plain: Literal["train", "val"] = "train"
) -> ImageSet:
    """List DIR/train or DIR/val (or DIR/test); an ImageFolder without these is the split `plain`.

    Images may lie at any depth below a class folder; hidden files are ignored, and other suffixes
    than ``SUFFIXES`` are passed over. Raises FileNotFoundError when there is no such folder,
    InputError when it holds no classes or a class holds no images.
    """
    folder = _split_folder(require_data_folder(root), split, plain)
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    class_ids = tuple(sorted(entry.name for entry in entries if _is_folder(entry)))
    if not class_ids:
        raise InputError(
            f"{folder}: no class folders; expected {folder}/<class>/<image>, one folder per class"
        )
    _require_text(folder, class_ids)
    paths: list[str] = []
    counts: list[int] = []
    passed_over = [entry.name for entry in entries if not _is_folder(entry)]
    above = [os.stat(folder)]
    for class_id in class_ids:
        found = sorted(_image_files(folder / class_id, f"{class_id}/", passed_over, above))
        paths += found
        counts.append(len(found))
    if not paths:
        raise InputError(f"{folder}: no images in it; expected files ending in {_SUFFIXES}")
    empty = [class_id for class_id, count in zip(class_ids, counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"{folder}: no images in class folder {listed(empty)}; add images "
            f"({_SUFFIXES}) or remove the folder"
        )
    labels = np.repeat(np.arange(len(class_ids), dtype=np.int64), counts)
    return ImageSet(folder, split, class_ids, tuple(paths), labels, tuple(sorted(passed_over)))


def is_label(value: object) -> bool:
    """Whether this is the name or number of a class."""
    return value >= 0 if type(value) is int else isinstance(value, str) and value != ""


def class_folders(labels: Iterable[Label], place: str) -> dict[Label, str]:
    """The class folder of each label: `/` becomes `_`, and numbers are padded with zeros.

    Raises InputError, naming the `place`, for a name that no folder can have, or for two that
    become one.
    """
    distinct = sorted(set(labels), key=str)
    width = max((len(str(label)) for label in distinct if isinstance(label, int)), default=0)
    label_of: dict[str, Label] = {}
    for label in distinct:
        folder = f"{label:0{width}d}" if isinstance(label, int) else label.replace("/", "_")
        if folder.startswith(".") or "\0" in folder:
            raise InputError(f"{place}: class {label!a} cannot be a folder name: rename the class")
        if label_of.setdefault(folder, label) != label:
            raise InputError(
                f"{place}: classes {label_of[folder]!a} and {label!a} would both be in folder "
                f"{folder!a}: rename one"
            )
    return {label: folder for folder, label in label_of.items()}


def stored_set(
    root: Path, split: str, images: Sequence[tuple[str, str]], store: Store | None = None
) -> ImageSet:
    """The images of a store, (class folder, name) by row, listed as an image folder lists them.

    Raises InputError when there are none, or two have one name.
    """
    if not images:
        raise InputError(f"{root}: no images with a class in it")
    rows = sorted(range(len(images)), key=images.__getitem__)
    for row, after in pairwise(rows):
        if images[row] == images[after]:
            raise InputError(f"{root}: two images are named {'/'.join(images[row])}: rename one")
    folders = [images[row][0] for row in rows]
    class_ids = tuple(dict.fromkeys(folders))
    _require_text(root, class_ids)
    index = {folder: k for k, folder in enumerate(class_ids)}
    return ImageSet(
        *(root, split, class_ids, tuple("/".join(images[row]) for row in rows)),
        labels=np.array([index[folder] for folder in folders], np.int64),
        store=store,
        rows=np.array(rows, np.int64),
    )


def _require_text(folder: Path, class_ids: Sequence[str]) -> None:
    """Raise InputError for a class folder whose name cannot stand in a manifest or a prompt."""
    for class_id in class_ids:
        try:
            class_id.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding().upper()
            raise InputError(
                f"{folder}: expected names of class folders in {encoding}, the encoding of this "
                f"locale, got {class_id!a}: rename it, or set LC_ALL=C.UTF-8"
            ) from None


def require_data_folder(root: Path | str) -> Path:
    """The folder itself, `~` expanded; FileNotFoundError when there is none."""
    root = Path(root).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise FileNotFoundError(f"data folder {root}: found {found}; give an existing folder")
    return root


def with_classes(images: ImageSet, class_ids: tuple[str, ...]) -> ImageSet:
    """The set with these class folders' spelling and order, if they are its own but normalised.

    macOS writes é as two characters, and other systems as one. Sets of other classes are returned
    unchanged.
    """
    index = {normalize("NFC", class_id): k for k, class_id in enumerate(class_ids)}
    own = [index.get(normalize("NFC", class_id), -1) for class_id in images.class_ids]
    if images.class_ids == class_ids or sorted(own) != list(range(len(class_ids))):
        return images
    labels = np.array(own)[images.labels]
    order = np.argsort(labels, kind="stable")
    return replace(images.taken(order), class_ids=class_ids, labels=labels[order])


def check_same_classes(train: ImageSet, val: ImageSet) -> None:
    """Raise InputError, naming the differences, unless both sets have the same class folders."""
    only_train = sorted(set(train.class_ids) - set(val.class_ids))
    only_val = sorted(set(val.class_ids) - set(train.class_ids))
    if only_train or only_val:
        parts = [
            f"only in {images.root}: {listed(names)}"
            for images, names in ((train, only_train), (val, only_val))
            if names
        ]
        raise InputError(
            f"class folders differ: {'; '.join(parts)}; both splits need the same class folders"
        )


def check_no_class_emptied(images: ImageSet, decoded: np.ndarray) -> None:
    """Raise InputError when a class is missing from `decoded`, the classes of decoded images."""
    counts = np.bincount(decoded, minlength=len(images.class_ids))
    if not counts.all():
        raise InputError(
            f"{images.root / images.class_ids[counts.argmin()]}: not one image in it can be "
            "decoded: add images or remove the folder"
        )


def _split_folder(root: Path, split: str, plain: str) -> Path:
    """The folder of the split; ``root`` itself for `plain` when it has no split folders."""
    names = SPLIT_FOLDERS[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    if split == plain and not any(
        (root / name).is_dir() for names in SPLIT_FOLDERS.values() for name in names
    ):
        return root
    raise FileNotFoundError(
        f"{root}: no {' or '.join(f'{name}/' for name in names)} folder in it; "
        f"expected {root}/{names[0]}/<class>/<image>{f', or {GIVE_VAL}' if split == 'val' else ''}"
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _image_files(
    folder: Path, prefix: str, passed_over: list[str], above: list[os.stat_result]
) -> Iterator[str]:
    """Image files at any depth below the folder, as prefix + relative path.

    Files with other suffixes are added to ``passed_over``. Raises InputError for a link to one of
    the folders ``above``, which would never end.
    """
    here = os.stat(folder)
    if any(os.path.samestat(here, each) for each in above):
        raise InputError(f"{folder} is a link to a folder that holds it: remove the link")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        if _is_folder(entry):
            yield from _image_files(folder / entry.name, f"{name}/", passed_over, [*above, here])
        elif entry.name.lower().endswith(SUFFIXES):
            yield name
        else:
            passed_over.append(name)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The names, or the first few and the number of the others; escaped where not plain ASCII."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    plain = (name if name.isascii() and name.isprintable() else ascii(name) for name in names)
    return ", ".join(islice(plain, limit)) + more
