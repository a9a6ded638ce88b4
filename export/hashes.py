"""SHA-256 of engines and weights, remembered: 12 GB of them take 12 s of a core, or a disk's time.

    $XDG_CACHE_HOME/patchbloom/hashes.json    resolved path → stamp, sha256

A stamp is [inode, bytes, modification time, change time]. A write that restores the modification
time still moves the change time. Pages that were written through a mapping are flushed first, so
that the next write moves it too. A file system without a change time (exFAT) sees less. The device
is left out: a network drive has another number on every machine. A failing disk changes no stamp;
`forget_hashes` is for those who ask for every byte. Where hashes.json cannot be read or written,
every process hashes again.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from .documents import Sha256, read_json
from .durable import cache_folder, replace_json, take_lock
from .terminal import say

FILE = "hashes.json"
LEAST_BYTES = 1 << 20  # a smaller file is hashed as fast as it is looked up
_CHUNK_BYTES = 1 << 24
_PATIENCE_S = 2.0  # between two progress lines; SDXL-Turbo's UNet of 5 GB takes 3 to 10 s
_TICK_NS = 2 * 10**9  # the coarsest clock of a file system: the next write may get the same times


class _Entry(BaseModel):
    stamp: list[int]
    sha256: Sha256


_hashed: dict[str, dict[str, Any]] = {}
"""Entries of files that this process has hashed itself."""
_trusts_others = True


def known_sha256(path: Path) -> str:
    """SHA-256 of a file's content; a large file is read only when its stamp is not known."""
    with path.open("rb") as file:
        with suppress(OSError):  # a file system that cannot
            os.fsync(file.fileno())
        now_ns, stamp = time.time_ns(), _stamp(file)
        _, size_bytes, _, changed_ns = stamp
        if size_bytes < LEAST_BYTES:
            return _hash(path, file)
        name = str(path.resolve())
        known = _hashed.get(name) or (_read_entries().get(name) if _trusts_others else None)
        if known and known["stamp"] == stamp:
            return known["sha256"]
        sha256 = _hash(path, file)
        if now_ns - changed_ns > _TICK_NS and _stamp(file) == stamp:
            _hashed[name] = {"stamp": stamp, "sha256": sha256}
            _add_entries()
        return sha256


def read_sha256(path: Path) -> str:
    """SHA-256 of a file's content, of which every byte is read; reports progress."""
    with path.open("rb") as file:
        return _hash(path, file)


def forget_hashes() -> None:
    """From now on this process trusts no hash but its own from after this call."""
    global _trusts_others
    _trusts_others = False
    _hashed.clear()


def _stamp(file: BinaryIO) -> list[int]:
    status = os.fstat(file.fileno())
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash(path: Path, file: BinaryIO) -> str:
    digest, said_s = hashlib.sha256(), time.monotonic()
    total_bytes = os.fstat(file.fileno()).st_size
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        if time.monotonic() - said_s > _PATIENCE_S:
            said_s = time.monotonic()
            percent = 100 * file.tell() // total_bytes
            say(f"hashing {path.parent.name}/{path.name}: {percent} % of {total_bytes:,} bytes")
    return digest.hexdigest()


def _read_entries() -> dict[str, dict[str, Any]]:
    """The stored entries; none where they are missing, unreadable or damaged."""
    try:
        return read_json(cache_folder() / FILE, ValueError, "", dict[str, _Entry])
    except (OSError, ValueError):
        return {}


def _add_entries() -> None:
    """Add this process's entries and drop those of files that are gone.

    Does nothing while another process writes, or where nothing can be written.
    """
    with suppress(OSError):
        path = cache_folder() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path.with_suffix(".lock"))
        try:
            entries = _read_entries() | _hashed
            replace_json(path, {name: entries[name] for name in entries if os.path.exists(name)})
        finally:
            lock.release()
