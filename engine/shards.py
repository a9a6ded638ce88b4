"""A coreset as WebDataset shards: tar files of the samples in order, each a few entries of one key.

    train-000000.tar, …       at most SHARD_BYTES each, but for a single sample that is larger
    <class>_<number>.png      the patch: index of the class, 5 digits, and number in it, 6 digits
    <class>_<number>.cls      the class index
    <class>_<number>.json     {"class_id", "class_name", "sample"}
    <class>_<number>.logits.npy                           dense soft labels, fp16 [E, K]
    <class>_<number>.probabilities.npy, .classes.npy      top-k ones, fp16 and int16 [E, k]

WebDataset's own decoders read all of it; nothing in it is a pickle. Entries carry neither time nor
owner, so equal coresets give equal bytes.

Legend: E epochs, K classes, k kept probabilities.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .coreset import Coreset
from .manifest import patch_files
from .soft_labels import SoftLabels

SHARD_BYTES = 2**30
_BLOCK = tarfile.BLOCKSIZE
Entries = list[tuple[str, bytes]]
"""Name and content of each entry of a sample."""


def write_shards(
    coreset: Coreset, labels: SoftLabels | None, folder: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Fill `folder` with shards of at most `shard_bytes`; what is told of them."""
    samples, count = _samples(coreset, labels), 0
    pending = next(samples, None)
    while pending is not None:
        path = folder / f"train-{count:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
            pending = _fill(shard, pending, samples, shard_bytes - tarfile.RECORDSIZE)
        count += 1
    return {"split": "train", "samples": len(coreset.labels_N), "shards": count}


def _fill(
    shard: tarfile.TarFile, pending: Entries | None, samples: Iterator[Entries], most_bytes: int
) -> Entries | None:
    """Add samples while there is room, one at least; returns the first that is left, if any."""
    while pending is not None:
        needed = sum(_BLOCK + len(data) + -len(data) % _BLOCK for _, data in pending)
        if shard.offset and shard.offset + needed > most_bytes:
            break
        for name, data in pending:
            entry = tarfile.TarInfo(name)  # of 1970, of nobody
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
        pending = next(samples, None)
    return pending


def _samples(coreset: Coreset, labels: SoftLabels | None) -> Iterator[Entries]:
    """Of every sample, in order."""
    sample = 0
    for entry in coreset.manifest["classes"]:
        for number, name in enumerate(patch_files(entry["id"], entry["patches"])):
            key = f"{entry['index']:05d}_{number:06d}"
            told = {"class_id": entry["id"], "class_name": entry["name"], "sample": sample}
            entries = [
                (f"{key}.png", (coreset.folder / name).read_bytes()),
                (f"{key}.cls", str(entry["index"]).encode()),
                (f"{key}.json", json.dumps(told, sort_keys=True).encode()),
            ]
            parts = {} if labels is None else labels.every_epoch([sample])
            entries += [(f"{key}.{part}.npy", _npy(rows[:, 0])) for part, rows in parts.items()]
            yield entries
            sample += 1


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)
    return stream.getvalue()
