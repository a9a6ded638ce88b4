"""WebDataset shards: tar files that are indexed once, and whose images are then read in place.

Members with one name up to the first dot are a sample. Its class is "class_id" or "label" in its
.json, else its .cls, else the folder that holds it.

    a/0017.jpg, a/0017.cls, a/0017.json  named CLASS/a_0017.jpg; CLASS/SHARD_… if shards repeat it
    train/n01440764/0017.jpg             named n01440764/0017.jpg

The index lies in the user's cache, under a hash of names, sizes and times of the shards.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from ...export.durable import cache_folder, json_sha256, replacing_file, take_lock
from .images import (
    GIVE_LABELS,
    SUFFIXES,
    ImageSet,
    InputError,
    Label,
    UnlabelledError,
    class_folders,
    is_label,
    stored_set,
)

VERSION = 1  # of the index
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Shards:
    """Rows of `places_N3`, int64, are (number of the file, offset, size) of an image."""

    files: tuple[str, ...]
    stats: tuple[os.stat_result, ...]
    places_N3: np.ndarray

    def place(self, row: int) -> str:
        """The shard."""
        return self.files[self.places_N3[row, 0]]

    def read(self, row: int) -> np.ndarray:
        """The image's bytes; InputError when its shard has been cut since it was indexed."""
        _, offset, size = self.places_N3[row].tolist()
        found = np.fromfile(self.place(row), np.uint8, size, offset=offset)
        if len(found) < size:
            raise InputError(f"{self.place(row)} was cut after it was opened: start again")
        return found

    def status(self, row: int) -> tuple[int, int, int]:
        """The image's size; time and inode of its shard."""
        shard, _, size = self.places_N3[row].tolist()
        return size, self.stats[shard].st_mtime_ns, self.stats[shard].st_ino % 2**63


def is_shards(data: str) -> bool:
    """Whether this names tar files."""
    return data.endswith((".tar", ".tar.gz", ".tgz")) and not Path(data).expanduser().is_dir()


def shard_files(pattern: str) -> tuple[str, ...]:
    """The files of `DIR/train-{000..146}.tar` or `DIR/*.tar`, in order.

    Raises FileNotFoundError unless every number of the range leads to a file.
    """
    names = [str(Path(pattern).expanduser())]
    while names and (found := _RANGE.search(names[0])):
        first, last = found.groups()
        numbers = [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    files = [[name] if os.path.isfile(name) else sorted(glob.glob(name)) for name in names]
    missing = [name for name, found in zip(names, files, strict=True) if not found]
    if missing or not names:
        first = f", first {missing[0]}" if len(missing) < len(names) else ""
        raise FileNotFoundError(
            f"shards {pattern}: {len(missing)} of {len(names)} files are not there{first}: give "
            "tar files on this machine"
        )
    return tuple(file for found in files for file in found)


def open_shards(
    pattern: str, split: Literal["train", "val"], progress: Callable[[int, int], None]
) -> ImageSet:
    """The images of the shards as one split; `progress` is called with (shards read, all of them).

    One process indexes them, and others wait for it. Raises InputError, naming shard and member,
    for a shard that is cut, damaged or compressed, and for a label that is no class.
    """
    files = shard_files(pattern)
    stats = tuple(map(os.stat, files))
    named = [(os.path.abspath(files[k]), s.st_size, s.st_mtime_ns) for k, s in enumerate(stats)]
    path = cache_folder() / "shards" / f"{json_sha256([VERSION, named])}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path.with_suffix(".lock"), wait=True)
    try:
        with np.load(path) as arrays:
            index = dict(arrays)
    except (OSError, ValueError, BadZipFile):  # there is none, or it is damaged
        index = _index(Path(pattern), files, progress)
        with replacing_file(path) as staged, staged.open("xb") as stream:
            np.savez(stream, allow_pickle=False, **index)
    finally:
        lock.release()
    class_ids, paths, passed_over = map(tuple, json.loads(index["names"].tobytes()))
    return ImageSet(
        *(Path(pattern), split, class_ids, paths, index["labels"], passed_over),
        store=Shards(files, stats, index["places"]),
        rows=np.arange(len(paths)),
    )


def _index(
    root: Path, files: Sequence[str], progress: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    """Names, classes and places of the images, as an image folder lists them."""
    found: list[tuple[Label | None, str]] = []
    places = array("q")
    for shard, path in enumerate(files):
        for label, name, offset, size in _shard_images(path):
            found.append((label, name))
            places.extend((shard, offset, size))
        progress(shard + 1, len(files))
    places_N3 = np.frombuffer(places, np.int64).reshape(-1, 3)
    shard_N: list[int] = places_N3[:, 0].tolist()
    rows = [row for row, (label, _) in enumerate(found) if label is not None]
    images = [(label, name) for label, name in found if label is not None]
    if len(set(images)) < len(images):
        stems = [Path(files[shard_N[row]]).stem for row in rows]
        images = [(k, f"{stem}_{name}") for (k, name), stem in zip(images, stems, strict=True)]
    folders = class_folders((label for label, _ in images), str(root))
    listed = stored_set(root, "", [(folders[label], name) for label, name in images])
    lost = [f"{files[shard_N[n]]}: {name}" for n, (k, name) in enumerate(found) if k is None]
    names = json.dumps([listed.class_ids, listed.paths, lost]).encode()
    return {
        "names": np.frombuffer(names, np.uint8),
        "labels": listed.labels,
        "places": places_N3[rows][listed.rows],
    }


def _shard_images(path: str) -> Iterator[tuple[Label | None, str, int, int]]:
    """(label, name, offset, size) of each image; None where nothing says its class."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, Label] = {}
    for member, content in _members(path):
        name = member.name.removeprefix("./")
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if content is None:
            images.append((name, member.offset_data, member.size))
            continue
        label = _label(f"{path}: member {member.name}", content)
        if label is not None and (name.endswith(".json") or _key(name) not in labels):
            labels[_key(name)] = label
    for name, offset, size in images:
        key, (folder, base) = _key(name), os.path.split(name)
        if key not in labels:
            yield os.path.basename(folder) or None, base, offset, size
        elif name[len(key) :].lower() in SUFFIXES:
            yield labels[key], name.replace("/", "_"), offset, size
        else:  # x.mask.png, beside x.jpg and x.cls
            yield None, name, offset, size


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Images, with None, and labels, with their content, in the order of the shard.

    Raises InputError unless every member is whole and the mark of the end follows: tarfile takes a
    damaged header for the end.
    """
    last = ""
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
            while (member := shard.next()) is not None:
                shard.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                last = member.name
                if not member.isreg() or member.issparse():
                    continue
                if last.endswith((".cls", ".json")):
                    yield member, stream.read(member.size)
                elif last.lower().endswith(SUFFIXES):
                    yield member, None
            stream.seek(shard.offset)
            whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError):
        whole = False
    if not whole:
        where = f"in or after member {last}" if last else "from the start"
        raise InputError(
            f"{path}: cut, damaged or compressed {where}: give a whole tar file, not compressed"
        )


def _label(member: str, content: bytes) -> Label | None:
    """The class in a .cls or .json; None for a .json without one."""
    label = ""
    with suppress(ValueError):
        text = content.decode().strip()
        if member.endswith(".cls"):
            label = int(text) if text.lstrip("-").isdecimal() else text
        else:
            told = json.loads(text)
            label = told.get("class_id", told.get("label")) if isinstance(told, dict) else None
    if label is not None and not is_label(label):
        raise UnlabelledError(f"{member}: no name or number of a class: {GIVE_LABELS}")
    return label


def _key(name: str) -> str:
    """The name up to its first dot, which the members of a sample share."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
