"""Who works on which bundle, and what a killed process left: beside each bundle's folder, hidden.

    .<name>.lock      held by who builds or removes the bundle; gone when nobody does
    .<name>.partial   what is being built
    .<name>.removed   what is being deleted

The system lets go of a lock when its process dies, so a hidden folder whose lock is free is a dead
process's. flock also works on NFS (Linux 2.6.12 and later).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from .bundle_key import BUNDLE_NAME


def remove_leftovers(bundles: Path) -> int:
    """Remove what killed processes left hidden here; returns the bytes freed.

    What a living process holds, and what may not be deleted here (another user's), stays.
    """
    names = set()
    for path in bundles.iterdir() if bundles.is_dir() else ():
        name, _, state = path.name.removeprefix(".").rpartition(".")
        if state in ("partial", "removed", "lock") and BUNDLE_NAME.fullmatch(name):
            names.add(name)
    freed = 0
    for name in sorted(names):
        with suppress(OSError):
            freed += _remove_leftovers_of(bundles / name)
    return freed


def _remove_leftovers_of(folder: Path) -> int:
    lock, freed = take_lock(folder), 0
    if lock is None:
        return 0
    with held(folder, lock):
        for state in ("partial", "removed"):
            left = hidden(folder, state)
            if left.exists():
                freed += bytes_of(left)
                shutil.rmtree(left)
    return freed


def bytes_of(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hidden(folder: Path, state: str) -> Path:
    """Path of a bundle's lock, partial or removed."""
    return folder.with_name(f".{folder.name}.{state}")


def take_lock(folder: Path, wait: bool = False) -> TextIOWrapper | None:
    """Lock a bundle's place; None when another process holds it and we do not wait."""
    path = hidden(folder, "lock")
    while True:
        file = open(path, "a")  # noqa: SIM115 - closing it frees the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()  # its holder removed the file when it was done: lock the one that counts


@contextmanager
def held(folder: Path, lock: TextIOWrapper) -> Iterator[None]:
    """Let go of the lock at the end, and leave no file of it."""
    try:
        yield
    finally:
        hidden(folder, "lock").unlink(missing_ok=True)
        lock.close()
