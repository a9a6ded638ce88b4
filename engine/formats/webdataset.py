"""A coreset as WebDataset shards: tar files of the samples in order, each some entries of one key.

    train-000000.tar, …       at most SHARD_BYTES each, unless a single sample is larger
    <class>_<number>.png      the patch: index of the class, 5 digits, and number in it, 6 digits
    <class>_doped_<number>.png                            a real image, where doping added some
    <class>_<number>.cls      the class index
    <class>_<number>.json     {"class_id", "class_name", "doped"}
    <class>_<number>.logits.npy                           soft labels as logits, fp16 [A, K]
    <class>_<number>.probabilities.npy, .classes.npy      top-k labels, fp16 and int16 [A, k]
    <class>_<number>.views.npy      the view of each label, int32 [A, 3]: sample, epoch, variant

WebDataset's own decoders read all of it; nothing in it is a pickle. Entries carry neither time nor
owner, so equal coresets give equal bytes.

Legend: A labels per image (coreset/shown.py), K classes, k kept probabilities.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..coreset.coreset import Coreset
from ..coreset.shown import StoredImage, stored_images
from ..labels.stored import SoftLabels

SHARD_BYTES = 2**30
_BLOCK = tarfile.BLOCKSIZE
Entries = list[tuple[str, bytes]]
"""Name and content of each entry of a sample."""


def write_shards(
    coreset: Coreset, labels: SoftLabels | None, folder: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Fill `folder` with shards of at most `shard_bytes`; returns their entries for export.json."""
    images = stored_images(coreset, labels)
    samples, count = (_sample(coreset.folder, image, labels) for image in images), 0
    pending = next(samples, None)
    while pending is not None:
        path = folder / f"train-{count:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
            pending = _fill(shard, pending, samples, shard_bytes - tarfile.RECORDSIZE)
        count += 1
    return {"split": "train", "shards": count}


def _fill(
    shard: tarfile.TarFile, pending: Entries | None, samples: Iterator[Entries], most_bytes: int
) -> Entries | None:
    """Add samples while there is room, at least one; returns the first that is left, if any."""
    while pending is not None:
        needed = sum(_BLOCK + len(data) + -len(data) % _BLOCK for _, data in pending)
        if shard.offset and shard.offset + needed > most_bytes:
            break
        for name, data in pending:
            entry = tarfile.TarInfo(name)  # dated 1970, without an owner
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
        pending = next(samples, None)
    return pending


def _sample(folder: Path, image: StoredImage, labels: SoftLabels | None) -> Entries:
    key = f"{image.class_index:05d}_{image.name}"
    fields = {"class_id": image.class_id, "class_name": image.class_name, "doped": image.doped}
    entries = [
        (f"{key}.png", (folder / image.file).read_bytes()),
        (f"{key}.cls", str(image.class_index).encode()),
        (f"{key}.json", json.dumps(fields, sort_keys=True).encode()),
    ]
    if labels is None:
        return entries
    parts = labels.answers(image.views_A3[:, 1], image.views_A3[:, 0])
    arrays = {**parts, "views": image.views_A3}
    return entries + [(f"{key}.{part}.npy", _npy(rows)) for part, rows in arrays.items()]


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)
    return stream.getvalue()
