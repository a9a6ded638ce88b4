"""Files and folders that are there whole or not at all, their hashes, and locks on them.

A file or folder is written under a temporary name beside its place, and renamed last. A killed
process leaves only that temporary one, which the next write to the same place removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock


@contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well.

    FileExistsError when another process filled `folder` meanwhile; what it wrote stays.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{socket.gethostname()}-{os.getpid()}"
    partial = folder.parent / f".{folder.name}.partial-{mark}"
    replaced = folder.parent / f".{folder.name}.replaced-{mark}"
    _remove_abandoned(folder)
    partial.mkdir()
    try:
        yield partial
        if overwrite and folder.exists():
            os.rename(folder, replaced)
        _rename_into_place(partial, folder)
        _sync_folder(folder.parent)
    except BaseException:
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def _rename_into_place(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(
            f"{folder} was free at first and is not now: another process wrote it; "
            "use what it wrote, or choose another --out"
        ) from error


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed process of this machine left while writing this folder."""
    for state in ("partial", "replaced"):
        prefix = f".{folder.name}.{state}-{socket.gethostname()}-"
        for path in folder.parent.iterdir():
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdigit() and not _is_other_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)  # another writer may be at it too


def _is_other_alive(pid: int) -> bool:
    """Whether another process has this id; our own id on a leftover was a dead namesake's."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def full_disk_explained(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk or quota into one line that says where and how much is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space left for {folder}: it needs up to {needed_bytes / 2**20:.1f} MiB; "
            "free some, or choose an --out on another disk"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write `path` and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; the file there takes its place when the block ends well."""
    staged = path.with_name(f"{path.name}.partial")
    try:
        yield staged
        os.replace(staged, path)
        _sync_folder(path.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all."""
    with replacing_file(path) as staged:
        write_durably(staged, data)


def replace_json(path: Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write `value` as indented JSON, whole or not at all; `default` as in json.dumps."""
    replace_file(path, (json.dumps(value, indent=1, default=default) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in a streaming way."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of the one JSON spelling of `value`: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
    ).hexdigest()


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock:
    """Lock the file `path`, which is created if need be and never written to.

    `release` frees it, and so does the death of the process. A holder may remove the file first:
    those who wait then lock a new one. TimeoutError: another holder has it, and we do not wait.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    lock.acquire(blocking=wait)
    return lock


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, before, now) where two configs differ, by name; `before` was read from JSON."""
    now = json.loads(json.dumps(now))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)
