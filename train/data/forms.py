"""The forms of --data: what each names, and the image sets that come of it. Torch-free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ...engine.data.arrow import is_rows, open_rows
from ...engine.data.images import (
    GIVE_VAL,
    SUFFIXES,
    ImageSet,
    InputError,
    UnlabelledError,
    listed,
    open_image_set,
    require_data_folder,
)
from ...engine.data.shards import is_shards, open_shards
from ...export.durable import cache_folder
from ...export.hub import HUB
from ..config import TORCHVISION
from ..coreset_options import DataOptions
from ..run.progress import Report
from .shapes import GENERATOR_VERSION, write_shapes
from .torchvision_sets import write_torchvision

SHAPES = "shapes"
SPLIT_SEED = "patchbloom validation 1"
"""Before each name that is hashed for --val-fraction; another would choose other images."""
Split = Literal["train", "val"]


def check_data(data: str) -> None:
    """FileNotFoundError for a folder that is not there; `open_data` raises it too, and others."""
    if data != SHAPES and not data.startswith((TORCHVISION, HUB)) and not is_shards(data):
        require_data_folder(data)


def data_name(data: str) -> str:
    """A name for people, without the folders above."""
    return data if data.startswith(HUB) else data.rstrip("/").rsplit("/", 1)[-1]


def open_data(
    data: str,
    splits: Sequence[Split],
    report: Report,
    where: DataOptions | None = None,
    shapes_per_class: int = 1000,
) -> list[ImageSet]:
    """These splits of --data, in this order; says which files were passed over.

    Shards are the validation images themselves where only these are wanted. Raises ValueError or
    OSError, one clear line, for data that is not there or does not fit.
    """
    where = where or DataOptions()
    named = (data, where.val_data or "")
    if where.root is not None and not any(name.startswith(TORCHVISION) for name in named):
        raise ValueError(f"--root {where.root}: only torchvision:NAME has one: leave it out")
    open_one = partial(_open, where.root, shapes_per_class, report)
    if where.val_fraction is not None:
        if not is_shards(data):
            with suppress(FileNotFoundError, UnlabelledError):
                open_one(data, "val")
                raise ValueError(f"--val-fraction: {data} has validation images: leave it out")
        parts = split_off(open_one(data, "train"), where.val_fraction)
        return [parts[split] for split in splits]
    if where.val_data is None and is_shards(data) and len(splits) > 1:
        raise ValueError(f"--data {data}: these shards are one split: {GIVE_VAL}")
    return [
        open_one(data, split)
        if split == "train" or where.val_data is None
        else open_one(where.val_data, split, plain=split)
        for split in splits
    ]


def split_off(images: ImageSet, fraction: float) -> dict[str, ImageSet]:
    """`images` as train and val: in each class the share `fraction` of lowest hashes is val.

    Every class keeps an image on either side; InputError for one of a single image.
    """
    counts_K = np.bincount(images.labels)
    if counts_K.min() < 2:
        single = images.class_ids[counts_K.argmin()]
        raise InputError(f"--val-fraction: class {single!a} of {images.root} has a single image")
    hashed = (hashlib.sha256(os.fsencode(SPLIT_SEED + path)).digest()[:8] for path in images.paths)
    hashes_N = np.frombuffer(b"".join(hashed), ">u8")
    order_N = np.lexsort((hashes_N, images.labels))
    rank_N = np.arange(len(images)) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    wanted_K = np.clip(np.rint(counts_K * fraction).astype(np.int64), 1, counts_K - 1)
    is_val_N = np.zeros(len(images), bool)
    is_val_N[order_N] = rank_N < np.repeat(wanted_K, counts_K)
    val = replace(images.taken(np.flatnonzero(is_val_N)), split="val", passed_over=())
    return {"train": images.taken(np.flatnonzero(~is_val_N)), "val": val}


def _open(
    root: Path | None,
    shapes_per_class: int,
    report: Report,
    data: str,
    split: Split,
    plain: Split = "train",
) -> ImageSet:
    if data == SHAPES:
        data = str(_shapes(shapes_per_class, report))
    elif data.startswith(TORCHVISION):
        data = str(write_torchvision(data.removeprefix(TORCHVISION), root, report))
    if is_shards(data):
        images = open_shards(data, split, partial(report.progress, "index", unit="shards"))
    elif is_rows(data):
        images = open_rows(data, split)
    else:
        images = open_image_set(data, split, plain)
    if images.passed_over:
        files = f"{len(images.passed_over)} of {len(images.passed_over) + len(images)} files"
        report.say(
            f"warning: {images.root}: {files} passed over (expected <class>/<image>, ending in "
            f"{', '.join(SUFFIXES)}): {listed(images.passed_over)}"
        )
    return images


def _shapes(per_class: int, report: Report) -> Path:
    """The generated set, which is written into the cache on first use."""
    folder = cache_folder() / f"shapes-{GENERATOR_VERSION}-{per_class}"
    try:
        if not folder.is_dir():
            report.say(f"data: writing the generated set to {folder}")
        return write_shapes(folder, train_per_class=per_class, val_per_class=max(1, per_class // 5))
    except OSError as error:
        if error.errno is None:  # a message of ours
            raise
        raise OSError(
            f"the generated set cannot be written to {folder} ({os.strerror(error.errno)}): set "
            "XDG_CACHE_HOME to a folder that you may write to"
        ) from error
