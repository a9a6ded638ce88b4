"""An image dataset on disk and its decoder: files → uint8 crops, by DALI.

An ``ImageSet`` lists images and opens none: the files of an ImageFolder, or what a ``Store`` holds
(shards.py, arrow.py). ``stream_crops`` reads and decodes each image once, to upright RGB
(greyscale, CMYK, palette and alpha are converted, EXIF rotation is applied), and cuts P crops of
it. The crops depend only on its bytes, its boxes and the decoder: not on batch size, number of
threads, order, or a damaged neighbour. Only the list grows with the number of images: 95 B each for
paths of 30 letters, and 16 B for an order of them; 1.6 GB for the 14 million of ImageNet-21k.

Shapes: B images, P crops of one image, H = W = ``size_px``, C = 3 (RGB). A box is (top, left,
height, width) in whole pixels of the upright image.

Neither torch nor DALI is imported before the first stream starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol
from unicodedata import normalize

import numpy as np

if TYPE_CHECKING:
    import torch

    from .decode import CropRequest

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SUFFIXES = ", ".join(SUFFIXES)
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test")}
GIVE_VAL = "give --val-data or --val-fraction"
GIVE_LABELS = f"give images with labels; for validation {GIVE_VAL}"
STANDARD_RESIZE_RATIO = 8 / 7
"""Validation resizes the shorter side to size_px * 8/7 (256 for 224), then crops the centre."""

Label = int | str
"""The number or the name of a class."""
BoxFn = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""(index_B, heights_B, widths_B, epoch), int64 → boxes_BP4, integers inside the image."""


class InputError(ValueError):
    """The user's data does not fit the request; the message says what to do."""


class UnlabelledError(InputError):
    """Images that say no class; the message names the first."""


class CorruptImageError(InputError):
    """A file that DALI cannot decode; the message names it."""


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
        """Its encoded bytes, uint8 [n].

        None for a dangling link or a special file, which might never end.
        """
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


@dataclass(frozen=True)
class CropBatch:
    """Crops of B images, in the requested order. The caller owns all tensors."""

    pixels_BPHWC: torch.Tensor
    """uint8, on the requested device."""
    labels_B: torch.Tensor
    """int64, CPU."""
    index_B: torch.Tensor
    """int64, CPU: position in ``ImageSet.paths``."""
    boxes_BP4: torch.Tensor
    """int64, CPU: (top, left, height, width) in pixels of the upright image."""


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


def center_boxes(resize_ratio: float, size_px: int) -> BoxFn:
    """Boxes of "resize the shorter side to size_px * resize_ratio, crop the centre of size_px".

    In source pixels that is one centred square of side short / resize_ratio (rounded to whole
    pixels), so one resampling replaces the resize and the crop. A file that is already
    size_px × size_px is used whole.
    """
    if resize_ratio < 1.0:
        raise ValueError(f"resize_ratio: expected at least 1, got {resize_ratio}")

    def boxes(_: np.ndarray, heights_B: np.ndarray, widths_B: np.ndarray, __: int) -> np.ndarray:
        short_B = np.minimum(heights_B, widths_B)
        side_B = np.maximum(np.rint(short_B / resize_ratio).astype(np.int64), 1)
        side_B = np.where((heights_B == size_px) & (widths_B == size_px), size_px, side_B)
        corners = ((heights_B - side_B) // 2, (widths_B - side_B) // 2)
        return np.stack((*corners, side_B, side_B), axis=-1)[:, None]

    return boxes


@dataclass(frozen=True)
class CropStream:
    """Passes over ``order``; each ``iter`` starts one. ``stream_crops`` creates it."""

    images: ImageSet
    order: np.ndarray
    request: CropRequest
    skip_corrupt: bool
    skipped: list[int] = field(default_factory=list)
    """Indices of the undecodable files that the pass has skipped so far."""

    def __iter__(self) -> Iterator[CropBatch]:
        import torch

        from .decode import decode_crops

        self.skipped.clear()
        crops = decode_crops(self._read, self.order, self.request, self._leave_out)
        for pixels_BPHWC, index_B, boxes_BP4 in crops:
            yield CropBatch(
                pixels_BPHWC=pixels_BPHWC,
                labels_B=torch.from_numpy(self.images.labels[index_B]),
                index_B=torch.from_numpy(index_B),
                boxes_BP4=torch.from_numpy(boxes_BP4.astype(np.int64)),
            )

    def _read(self, index: int) -> np.ndarray:
        try:
            return self.images.read(index)
        except MemoryError:
            raise self._full_memory(index) from None

    def _full_memory(self, index: int) -> InputError:
        return InputError(
            f"memory is full, so {self.images.place(index)} cannot be decoded: "
            "close what else uses memory, or give a smaller image"
        )

    def _leave_out(self, index: int, reason: str) -> None:
        from .decode import NO_MEMORY

        if reason == NO_MEMORY:  # never skipped: the file is not damaged
            raise self._full_memory(index)
        place, what = self.images.place(index), "image"
        if self.images.store is None:
            reason, what = _fault(Path(place)) or reason, "file"
        if not self.skip_corrupt:
            raise CorruptImageError(
                f"cannot decode {place}: {reason}; replace or remove the {what}, "
                f"or leave such {what}s out with --skip-corrupt"
            )
        self.skipped.append(index)


def _fault(path: Path) -> str | None:
    """Why no decoder could read the file."""
    if not path.exists():
        return "it is a link to nothing"
    if not path.is_file():
        return "it is not a regular file"
    return None if path.stat().st_size else "the file is empty"


def stream_crops(
    images: ImageSet,
    order: np.ndarray,
    boxes: BoxFn,
    *,
    crops: int,
    size_px: int,
    batch: int = 64,
    device: str = "cpu",
    threads: int | None = None,
    skip_corrupt: bool = False,
    epoch: int = 0,
) -> CropStream:
    """Decode the images ``order`` (int64 indices) and cut ``crops`` boxes of each.

    Crops are resized to size_px × size_px by antialiased bilinear interpolation. ``device`` is
    "cpu" or "cuda[:n]", which decodes and resizes there; its pixels differ slightly from the CPU's.
    ``threads`` defaults to the cores that this process may use.

    While streaming, an undecodable file raises CorruptImageError, or with ``skip_corrupt`` is
    skipped and appended to ``skipped``. One that memory cannot hold raises InputError.
    """
    from .decode import CropRequest

    request = CropRequest(
        boxes=lambda index_B, heights_B, widths_B: boxes(index_B, heights_B, widths_B, epoch),
        crops=crops,
        size_px=size_px,
        batch=batch,
        device=device,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    return CropStream(images, np.asarray(order, dtype=np.int64), request, skip_corrupt)


def stream_center(
    images: ImageSet,
    *,
    size_px: int,
    batch: int = 64,
    device: str = "cpu",
    skip_corrupt: bool = False,
) -> CropStream:
    """The validation crop of every image, in order: see ``center_boxes``. P = 1."""
    return stream_crops(
        images,
        np.arange(len(images)),
        center_boxes(STANDARD_RESIZE_RATIO, size_px),
        crops=1,
        size_px=size_px,
        batch=batch,
        device=device,
        skip_corrupt=skip_corrupt,
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


def to_unit(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] → contiguous fp32 [N, 3, H, W] in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_pixels(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Images, clamped to [-1, 1] → uint8 [N, H, W, 3] on the same device."""
    pixels_NCHW = (images_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return pixels_NCHW.round().byte().permute(0, 2, 3, 1)
