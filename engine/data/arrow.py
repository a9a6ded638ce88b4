"""Sets that `datasets` opens: of the Hugging Face hub, of `save_to_disk`, Parquet files.

`datasets` maps its Arrow files into memory, and the encoded bytes come out of that map. An image is
named by its file in the set, or, where these are not all there and distinct, by its row. Its class
is in the first column of ClassLabels, or else in the column `label`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...export.hub import HUB
from .images import (
    GIVE_LABELS,
    GIVE_VAL,
    ImageSet,
    InputError,
    Label,
    UnlabelledError,
    class_folders,
    is_label,
    stored_set,
)

SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "test")}
SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk: several splits, or one


@dataclass(frozen=True)
class Rows:
    """Two chunked arrays of pyarrow: the bytes of each image, or else the path of its file."""

    name: str
    bytes_N: Any
    paths_N: Any
    changed_ns: int
    """Modification time of the newest Arrow file."""

    def place(self, row: int) -> str:
        """The set and the row."""
        return f"{self.name}, row {row}"

    def read(self, row: int) -> np.ndarray:
        """The image's bytes: a view of the map, read-only."""
        found = self.bytes_N[row].as_buffer()
        if found is None:
            return np.fromfile(self.paths_N[row].as_py(), np.uint8)
        return np.frombuffer(found, np.uint8)

    def status(self, row: int) -> tuple[int, int, int]:
        """The image's size; time and inode of its file, or the time of all Arrow files, and 0."""
        found = self.bytes_N[row].as_buffer()
        if found is not None:
            return found.size, self.changed_ns, 0
        status = os.stat(self.paths_N[row].as_py())
        return status.st_size, status.st_mtime_ns, status.st_ino % 2**63


def is_rows(data: str) -> bool:
    """Whether this names a set of the hub, a folder of `save_to_disk`, or one of Parquet files.

    A folder with train/<class>/ is an image folder, whatever else lies in it.
    """
    folder = Path(data).expanduser()
    if data.startswith(HUB) or any((folder / mark).is_file() for mark in SAVED):
        return True
    patterns = ("*.parquet", "*/*.parquet")
    found = any(True for pattern in patterns for _ in folder.glob(pattern))
    return found and not any(path.is_dir() for path in folder.glob("train/*"))


def open_rows(data: str, split: Literal["train", "val"]) -> ImageSet:
    """One split of the set: `train`, or the first of `validation`, `valid`, `val` and `test`.

    Raises ValueError without `datasets`, OSError for a set that cannot be had, FileNotFoundError
    when it has no such split, UnlabelledError and InputError for one without classes or images.
    """
    sets = _loaded(data)
    name = next((name for name in SPLITS[split] if name in sets), None)
    if name is None:
        raise FileNotFoundError(
            f"{data}: no split {' or '.join(SPLITS[split])} in it, it has {', '.join(sets)}"
            f"{f': {GIVE_VAL}' if split == 'val' else ''}"
        )
    return _image_set(data, split, f"{data}, split {name}", sets[name])


def _loaded(data: str) -> dict[Any, Any]:
    """The set's splits by name."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {data}: `datasets` is not installed: pip install 'patchbloom[data]'"
        ) from None
    folder, (name, _, config) = Path(data).expanduser(), data.removeprefix(HUB).partition(":")
    remedy = "give what save_to_disk wrote, or Parquet files as the hub stores them"
    try:
        if data.startswith(HUB):
            remedy = (
                f"where the hub is in reach, run `hf download {name} --repo-type dataset "
                "--local-dir DIR`, and give --data DIR"
            )
            found = datasets.load_dataset(name, config or None)
        elif any((folder / mark).is_file() for mark in SAVED):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder))
    except Exception as error:  # of datasets, the hub, its HTTP library: they share no class
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"{data} cannot be opened ({said}): {remedy}") from error
    return {**found} if isinstance(found, dict) else {"train": found}


def _image_set(data: str, split: str, place: str, dataset: Any) -> ImageSet:
    """The rows of one split, named `place` in messages."""
    from datasets import ClassLabel, Image

    column = _column(dataset.features, Image, ("image", "img"))
    if column is None:
        raise InputError(f"{place}: no column of images, it has {', '.join(dataset.features)}")
    folders = _folders(place, dataset, _column(dataset.features, ClassLabel, ("label", "labels")))
    dataset = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    bytes_N, paths_N = dataset.with_format("arrow")[:][column].flatten()
    files = (os.stat(each["filename"]) for each in dataset.cache_files)
    changed_ns = max((file.st_mtime_ns for file in files), default=time.time_ns())
    store = Rows(place, bytes_N, paths_N, changed_ns)
    missing_N = bytes_N.is_null().to_numpy() & paths_N.is_null().to_numpy()
    if missing_N.any():
        row = int(missing_N.argmax())
        raise InputError(f"{store.place(row)}: there is no image in it: remove the row")
    names = [os.path.basename(path or "") for path in paths_N.to_pylist()]
    if not all(names) or len({*zip(folders, names, strict=True)}) < len(names):
        names = [f"{row:0{len(str(len(names) - 1))}d}" for row in range(len(names))]
    return stored_set(Path(data), split, [*zip(folders, names, strict=True)], store)


def _column(features: Any, kind: type, names: tuple[str, ...]) -> str | None:
    """The first column of this kind, or else of one of these names."""
    typed = (name for name, feature in features.items() if isinstance(feature, kind))
    return next(typed, None) or next((name for name in names if name in features), None)


def _folders(place: str, dataset: Any, column: str | None) -> list[str]:
    """The class folder of each row."""
    if column is None:
        has = ", ".join(dataset.features)
        raise UnlabelledError(f"{place}: no column of labels, it has {has}: {GIVE_LABELS}")
    labels: list[Label] = dataset.with_format("arrow")[:][column].to_pylist()
    for row, label in enumerate(labels):
        if not is_label(label):
            raise UnlabelledError(f"{place}, row {row}: {label!r} is no label: {GIVE_LABELS}")
    names = getattr(dataset.features[column], "names", None)
    labels = [names[label] for label in labels] if names else labels
    folder_of = class_folders(labels, place)
    return [folder_of[label] for label in labels]
