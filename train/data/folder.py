"""The data that --data names, a folder or the generated set, and the identity of its images.

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
from typing import Literal

import numpy as np
import torch

from ...engine.data.images import SUFFIXES, ImageSet, listed, open_image_set
from ...export.durable import cache_folder, file_sha256
from ..run.checkpoint import CheckpointError, read_tensors, write_tensors
from ..run.folder import RunError
from ..run.progress import Report
from .shapes import GENERATOR_VERSION, write_shapes

RECORD = "images.safetensors"
READ_TOGETHER = 1024  # files between two reports of progress


def data_folder(data: str, shapes_per_class: int, report: Report) -> Path:
    """The folder that --data names; `shapes` is generated into the cache on first use."""
    if data != "shapes":
        return Path(data).expanduser()
    folder = cache_folder() / f"shapes-{GENERATOR_VERSION}-{shapes_per_class}"
    val_per_class = max(1, shapes_per_class // 5)
    try:
        if not folder.is_dir():
            report.say(f"data: writing the generated set to {folder}")
        return write_shapes(folder, train_per_class=shapes_per_class, val_per_class=val_per_class)
    except OSError as error:
        if error.errno is None:  # a message of ours
            raise
        raise OSError(
            f"the generated set cannot be written to {folder} ({os.strerror(error.errno)}): set "
            "XDG_CACHE_HOME to a folder that you may write to"
        ) from error


def open_split(data: Path, split: Literal["train", "val"], report: Report) -> ImageSet:
    """`open_image_set`, which raises as it does; says which files it passed over."""
    images = open_image_set(data, split)
    if images.passed_over:
        files = f"{len(images.passed_over)} of {len(images.passed_over) + len(images)} files"
        report.say(
            f"warning: {images.root}: {files} passed over (expected <class>/<image>, ending in "
            f"{', '.join(SUFFIXES)}): {listed(images.passed_over)}"
        )
    return images


def images_sha256(*sets: ImageSet) -> str:
    """One hash of the relative paths and file sizes of all images; independent of their folder."""
    digest = hashlib.sha256()
    for images in sets:
        for path in images.paths:
            size = _stat(f"{images.root}/{path}").st_size
            digest.update(os.fsencode(f"{images.split}/{path} {size}\n"))
    return digest.hexdigest()


def check_content(folder: Path, sets: Sequence[ImageSet], report: Report, *, begun: bool) -> None:
    """Compare the content of all images with the record in `folder`, and bring it up to date.

    A file is read again only when its size, modification time or inode differs. An older version
    wrote no record: the content counts from now on. Raises RunError, naming images, when a run has
    `begun` with other content, or the record is damaged.
    """
    record = folder / RECORD
    known_names, known_stats_M3, known_hashes_M = _read_record(record)
    names = [os.fsencode(f"{images.split}/{path}") for images in sets for path in images.paths]
    paths = [f"{images.root}/{path}" for images in sets for path in images.paths]
    found = map(_stat, paths)
    stats_N3 = np.array([(s.st_size, s.st_mtime_ns, s.st_ino % 2**63) for s in found], np.int64)
    row_N = np.arange(len(names))  # of each image in the record, -1 for none
    if names != known_names:
        rows = {name: row for row, name in enumerate(known_names)}
        row_N = np.array([rows.get(name, -1) for name in names])
    old_N = np.flatnonzero(row_N >= 0)
    same_N = old_N[(known_stats_M3[row_N[old_N]] == stats_N3[old_N]).all(axis=1)]
    hashes_N = np.zeros((len(names), 32), np.uint8)
    hashes_N[same_N] = known_hashes_M[row_N[same_N]]
    unread_N = np.setdiff1d(np.arange(len(names)), same_N)
    _hash_files(paths, unread_N, hashes_N, report)
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


def _stat(path: str) -> os.stat_result:
    """Status of the file, or of the link itself if it leads nowhere."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)


def _sha256(path: str) -> list[int]:
    """Hash of a regular file; of no bytes for a special file, which may never end."""
    digest = file_sha256(Path(path)) if os.path.isfile(path) else hashlib.sha256().hexdigest()
    return list(bytes.fromhex(digest))


def _hash_files(
    paths: Sequence[str], index_U: np.ndarray, hashes_N: np.ndarray, report: Report
) -> None:
    """Put the SHA-256 of the files `index_U` into their rows of `hashes_N`."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(index_U), READ_TOGETHER):
            part = index_U[start : start + READ_TOGETHER]
            hashes_N[part] = list(pool.map(_sha256, [paths[index] for index in part]))
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
