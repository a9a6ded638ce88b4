"""Atomic writes of files and folders, their hashes, and locks on them.

A file or folder is written under a temporary name beside its target, and renamed last. A killed
process leaves only the temporary one, which the next write to the same target removes.
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
from platformdirs import user_cache_path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/patchbloom. Default for XDG_CACHE_HOME: ~/.cache.

    Raises OSError where there is no home, as for a user of a container who is in no passwd file.
    """
    try:
        return user_cache_path("patchbloom")
    except RuntimeError as error:
        raise OSError(
            f"there is no home folder for a cache (HOME is not set, and user {os.getuid()} has "
            "none): set XDG_CACHE_HOME to a folder that you may write to"
        ) from error


@contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, and move it there when the block succeeds.

    Raises FileExistsError, and keeps `folder`, when another process filled it meanwhile.
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
        try:
            os.rename(partial, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                f"{folder} was free at first and is not now: another process wrote it; "
                "use what it wrote, or choose another folder"
            ) from error
        sync(folder.parent)
    except BaseException:
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary folders that killed processes on this machine left for this folder."""
    for state in ("partial", "replaced"):
        prefix = f".{folder.name}.{state}-{socket.gethostname()}-"
        for path in folder.parent.iterdir():
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdigit() and not _is_other_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)  # another writer may remove it too


def _is_other_alive(pid: int) -> bool:
    """Whether another process has this id; a leftover with our own id is from a dead process."""
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
def full_disk_explained(
    folder: Path, needed_bytes: int, elsewhere: str = "choose an --out"
) -> Iterator[None]:
    """Turn a full disk or quota into one line that names the folder and the space it needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space left for {folder}: it needs up to {needed_bytes / 2**20:.1f} MiB; "
            f"free some, or {elsewhere} on another disk"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write `path`, which must not exist, and wait until it is on the disk."""
    with path.open("xb") as stream:  # never through a link
        stream.write(data)
    sync(path)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move its file there when the block succeeds.

    The block opens it with mode "x": a link that lies there is removed, and never followed.
    """
    staged = path.with_name(f"{path.name}.partial")
    staged.unlink(missing_ok=True)
    try:
        yield staged
        os.replace(staged, path)
        sync(path.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` atomically."""
    with replacing_file(path) as staged:
        write_durably(staged, data)


def replace_json(path: Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write `value` atomically as indented JSON; `default` as in json.dumps."""
    replace_file(path, (json.dumps(value, indent=1, default=default) + "\n").encode())


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_link(folder: Path) -> Path | None:
    """The first symbolic link inside `folder`; None when there is none."""
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            if os.path.islink(path := os.path.join(parent, name)):
                return Path(path)
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
    ).hexdigest()


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock:
    """Lock the file `path`, which is created if missing and never written to.

    `release` or the end of the process frees it. A holder may delete the file before release:
    waiting processes then lock a new one. Raises TimeoutError when it is held and `wait` is false.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    lock.acquire(blocking=wait)
    return lock


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, before, now) where two configs differ, sorted; `before` was read from JSON."""
    now = json.loads(json.dumps(now))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)
