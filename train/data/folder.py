"""The identity of the images of a run, wherever they lie.

Stored settings hold one hash of all names and sizes. A run also keeps a record of the content,
RECORD in its folder: images may change under the same names and sizes.

Shapes: N images, M of them in the record, U of them not read yet. A row of stats is (size,
modification time, inode), int64; a row of hashes is a SHA-256, uint8 [32].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ...engine.data.images import ImageSet, listed
from ...export.durable import file_sha256
from ..run.checkpoint import CheckpointError, read_tensors, write_tensors
from ..run.folder import RunError
from ..run.progress import Report

RECORD = "images.safetensors"
READ_TOGETHER = 1024  # images between two reports of progress


def images_sha256(*sets: ImageSet) -> str:
    """One hash of the relative paths and sizes of all images; independent of where they lie."""
    digest = hashlib.sha256()
    for images in sets:
        for index, path in enumerate(images.paths):
            size = images.status(index)[0]
            digest.update(os.fsencode(f"{images.split}/{path} {size}\n"))
    return digest.hexdigest()


def check_content(folder: Path, sets: Sequence[ImageSet], report: Report, *, begun: bool) -> None:
    """Compare the content of all images with the record in `folder`, and bring it up to date.

    An image is read again only when its `status` differs. An older version
    wrote no record: the content counts from now on. Raises RunError, naming images, when a run has
    `begun` with other content, or the record is damaged.
    """
    record = folder / RECORD
    known_names, known_stats_M3, known_hashes_M = _read_record(record)
    names = [os.fsencode(f"{images.split}/{path}") for images in sets for path in images.paths]
    places = [(images, index) for images in sets for index in range(len(images))]
    stats_N3 = np.array([images.status(index) for images, index in places], np.int64)
    row_N = np.arange(len(names))  # of each image in the record, -1 for none
    if names != known_names:
        rows = {name: row for row, name in enumerate(known_names)}
        row_N = np.array([rows.get(name, -1) for name in names])
    old_N = np.flatnonzero(row_N >= 0)
    same_N = old_N[(known_stats_M3[row_N[old_N]] == stats_N3[old_N]).all(axis=1)]
    hashes_N = np.zeros((len(names), 32), np.uint8)
    hashes_N[same_N] = known_hashes_M[row_N[same_N]]
    unread_N = np.setdiff1d(np.arange(len(names)), same_N)
    _hash_images(places, unread_N, hashes_N, report)
    if begun and known_names:
        changed_N = old_N[(known_hashes_M[row_N[old_N]] != hashes_N[old_N]).any(axis=1)]
        gone_M = np.setdiff1d(np.arange(len(known_names)), row_N)
        changes = {
            "have other content": [names[index] for index in changed_N],
            "were added": [names[index] for index in np.flatnonzero(row_N < 0)],
            "are gone": [known_names[index] for index in gone_M],
        }
        _refuse_changes(folder, changes)
    if len(unread_N) or names != known_names:
        tensors = {"names": np.array(bytearray(b"\0".join(names)))}
        tensors |= {"stats": stats_N3, "sha256": hashes_N}
        write_tensors(record, {key: torch.from_numpy(each) for key, each in tensors.items()}, {})


def validation_sha256(folder: Path) -> str | None:
    """One hash of the content and classes of the validation images in the record of `folder`.

    Names of files play no part. None without a record. Raises RunError for a damaged one.
    """
    names, _, hashes_M = _read_record(folder / RECORD)
    rows = sorted(
        (name.rsplit(b"/", 1)[0], bytes(sha256))
        for name, sha256 in zip(names, hashes_M, strict=True)
        if name.startswith(b"val/")
    )
    return hashlib.sha256(b"".join(map(b"\0".join, rows))).hexdigest() if rows else None


def _sha256(place: tuple[ImageSet, int]) -> list[int]:
    """Hash of an image's bytes; of none for a special file, which may never end."""
    images, index = place
    path = images.place(index)
    if images.store is None and os.path.isfile(path):  # read in parts
        return list(bytes.fromhex(file_sha256(Path(path))))
    return list(hashlib.sha256(images.read(index).data).digest())


def _hash_images(
    places: Sequence[tuple[ImageSet, int]],
    index_U: np.ndarray,
    hashes_N: np.ndarray,
    report: Report,
) -> None:
    """Put the SHA-256 of the images `index_U` into their rows of `hashes_N`."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(index_U), READ_TOGETHER):
            part = index_U[start : start + READ_TOGETHER]
            hashes_N[part] = list(pool.map(_sha256, [places[index] for index in part]))
            if len(index_U) > READ_TOGETHER:
                report.progress("hash images", start + len(part), len(index_U), "images")


def _read_record(record: Path) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Names, stats_M3 and hashes_M of the images that a run began with; M = 0 without a record."""
    if not record.is_file():
        return [], np.zeros((0, 3), np.int64), np.zeros((0, 32), np.uint8)
    try:
        tensors = read_tensors(record)[0]
        names = tensors["names"].numpy().tobytes().split(b"\0")
        stats_M3, hashes_M = (
            tensors[key].numpy().reshape(len(names), columns)
            for key, columns in (("stats", 3), ("sha256", 32))
        )
    except (CheckpointError, KeyError, ValueError):
        raise RunError(
            f"{record} is damaged: remove it (whether the images are those that the run began "
            "with is then not known), or start again with --overwrite"
        ) from None
    return names, stats_M3, hashes_M


def _refuse_changes(folder: Path, changes: dict[str, list[bytes]]) -> None:
    """Raise RunError when a list of images is not empty."""
    told = [
        f"{len(names)} {how} ({listed([os.fsdecode(name) for name in names])})"
        for how, names in changes.items()
        if names
    ]
    if told:
        raise RunError(
            f"the images have changed since {folder} was begun: {'; '.join(told)}: "
            "give the same images, or start again with --overwrite"
        )
