"""A built engine on disk: a folder with a manifest, there whole or not at all.

    <bundles>/sdxl-tiny-ort-cpu-fp32-64px-4x8-<key>/
        manifest.json   key, sha256 and size of every file, parity, and a hash over all of that
        *.onnx, …       what the backend made
    .<name>.lock        held by who builds or removes the bundle; gone when nobody does
    .<name>.partial     what is being built
    .<name>.removed     what is being deleted

The folder's name ends in a hash of the key (bundle_key.py); a bundle of another key is never
loaded. Builds of one key take a lock: the second waits and reuses. A process that was killed leaves
hidden files only, whose lock is free; the next build, list or remove clears them away. Every byte
is verified when a bundle is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from .bundle_key import BUNDLE_NAME, build_command, bundle_name, why_not
from .durable import json_sha256, take_lock, write_durably

SCHEMA = 1
MANIFEST = "manifest.json"
Say = Callable[[str], None]
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_BYTES = 1 << 20  # below this, a build that failed in whatever way failed for want of space
_CHUNK_BYTES = 1 << 24
_PATIENCE_S = 2.0  # of hashing in silence; SDXL-Turbo's 5 GB take 3 to 10 s


class BundleError(OSError):
    """A bundle is damaged, does not fit, or could not be built; the message says what to do."""


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    folder: Path
    manifest: dict[str, Any]
    built: bool = False
    """Whether this call built it, rather than found it."""

    def file(self, name: str) -> Path:
        """Path of one of its files."""
        return self.folder / name

    @property
    def key(self) -> dict[str, Any]:
        """All that it depends on."""
        return self.manifest["key"]

    @property
    def size_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def default_bundles_folder() -> Path:
    """$XDG_CACHE_HOME/patchbloom/bundles, or the same below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "patchbloom" / "bundles"


def _silent(line: str) -> None:
    pass


def find_or_build(
    bundles: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], dict[str, Any]],
    say: Say = _silent,
    model: str | None = None,
) -> Bundle:
    """Open the bundle of `key`, building it first when there is none; `say` is told why, and the
    command that builds the same, in which the model is `model`.

    `build` fills an empty folder and returns its report (parity, seconds); what it raises passes
    through, and nothing of a failed build stays. BundleError: damaged, or the disk is full.
    """
    folder = bundles / bundle_name(key)
    if folder.exists():
        return open_bundle(folder, key, say)
    with _place_faults_told(bundles):
        bundles.mkdir(parents=True, exist_ok=True)
        try:
            lock = take_lock(_hidden(folder, "lock"))
        except TimeoutError:
            say("another process is building this engine: waiting for it")
            lock = take_lock(_hidden(folder, "lock"), wait=True)
    with _held(folder, lock):
        remove_leftovers(bundles)
        if folder.exists():
            return open_bundle(folder, key, say)
        nearest = nearest_bundle(bundles, key)
        say(f"no engine for these settings yet{f'; {nearest}' if nearest else ''}")
        say(f"building it, as `{build_command(key, model)}` does")
        return _build(folder, key, build, say)


def _build(
    folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]], say: Say
) -> Bundle:
    """Fill a hidden folder, write its manifest last, rename. Call with the lock held."""
    partial = _hidden(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        report = build(partial)
        manifest = {"schema": SCHEMA, "key": dict(key), "report": report, "files": {}}
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        hashing = _Hashing(folder.name, sum(path.stat().st_size for path in files), say)
        for path in files:
            _sync(path)
            manifest["files"][path.relative_to(partial).as_posix()] = {
                "sha256": hashing.sha256(path),
                "bytes": path.stat().st_size,
            }
        manifest["content_sha256"] = json_sha256(manifest)
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        os.rename(partial, folder)
    except BaseException as error:
        told = _space_fault(folder.parent, error)
        shutil.rmtree(partial, ignore_errors=True)
        if told is not None:
            raise told from error
        raise
    return Bundle(folder, manifest, built=True)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: only then is it known to have had room there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _space_fault(bundles: Path, error: BaseException) -> BundleError | None:
    """The one line for a disk that is full, or was when `error` came; None for another fault.

    Libraries in C++ tell of a full disk in their own ways: then the disk itself is asked.
    """
    reason = None
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        reason = os.strerror(error.errno)
    elif isinstance(error, Exception) and shutil.disk_usage(bundles).free < _FULL_BYTES:
        reason = os.strerror(errno.ENOSPC)
    if reason is None:
        return None
    elsewhere = getattr(error, "filename", None)
    if elsewhere and not Path(elsewhere).absolute().is_relative_to(bundles.absolute()):
        return BundleError(
            f"the engine could not be built ({reason} for {elsewhere}): free some space there, or "
            "choose another folder for temporary files with TMPDIR"
        )
    return BundleError(
        f"the engine could not be written to {bundles} ({reason}): free some space there, or "
        "choose another folder with --bundles"
    )


@contextmanager
def _place_faults_told(bundles: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BundleError(
            f"no engine can be stored in {bundles} ({reason}): choose another folder with --bundles"
        ) from error


def open_bundle(folder: Path, key: Mapping[str, Any] | None = None, say: Say = _silent) -> Bundle:
    """Read a bundle and verify every byte of it, and that its key is `key` when one is given.

    BundleError names the file or the field that is not as it should be.
    """
    remedy = f"remove it with `engine remove {folder.name}`, and it is built again"
    manifest = read_manifest(folder)
    sizes = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in sizes and path != folder / MANIFEST:
            raise BundleError(f"{path} is not of this engine: remove that file")
    for path, size_bytes in sizes.items():
        if not path.is_file():
            raise BundleError(f"{path} is missing: {remedy}")
        if path.stat().st_size != size_bytes:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes, expected {size_bytes}: {remedy}"
            )
    if key is not None:
        check_key(folder, manifest["key"], key)
    hashing = _Hashing(folder.name, sum(sizes.values()), say)
    for path, entry in zip(sizes, manifest["files"].values(), strict=True):
        if hashing.sha256(path) != entry["sha256"]:
            raise BundleError(f"{path} was changed after the build: {remedy}")
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A bundle's manifest, verified against its own hash; the files themselves are not read.

    BundleError: there is none, or it was changed.
    """
    remedy = f"remove it with `engine remove {folder.name}`, and it is built again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        recorded = manifest.pop("content_sha256")
        intact = manifest["schema"] == SCHEMA and json_sha256(manifest) == recorded
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; {remedy}") from error
    except (ValueError, KeyError, AttributeError, TypeError):
        intact, manifest, recorded = False, {}, None
    if not intact:
        raise BundleError(f"{folder / MANIFEST} was changed after the build: {remedy}")
    return {**manifest, "content_sha256": recorded}


def check_key(folder: Path, found: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """BundleError unless the keys are the same: the fields that differ, and the right command."""
    differences = why_not(found, needed)
    if differences:
        raise BundleError(
            f"{folder} was built for {', '.join(differences)}: `{build_command(needed)}` builds "
            "the right one"
        )


def find_bundles(bundles: Path) -> list[Path]:
    """Folders of stored bundles, damaged ones too, sorted by name."""
    if not bundles.is_dir():
        return []
    return sorted(
        path for path in bundles.iterdir() if path.is_dir() and BUNDLE_NAME.fullmatch(path.name)
    )


def named_bundle(bundles: Path, name: str) -> Path:
    """The bundle of this name or unique beginning of a name.

    BundleError: none or several, and which there are.
    """
    stored = {folder.name: folder for folder in find_bundles(bundles)}
    matches = [each for each in stored if each == name] or [
        each for each in stored if each.startswith(name)
    ]
    if len(matches) == 1:
        return stored[matches[0]]
    if matches:
        raise BundleError(f"{name!r} begins several engines: {', '.join(matches)}")
    there = ", ".join(stored) or "none"
    raise BundleError(f"no engine in {bundles} is called {name!r}; there is: {there}")


def nearest_bundle(bundles: Path, key: Mapping[str, Any]) -> str | None:
    """The stored bundle of this model and backend that differs in the fewest fields, and how."""
    candidates = []
    for folder in find_bundles(bundles):
        try:
            found = read_manifest(folder)["key"]
        except BundleError:
            continue  # told when it is asked for
        if all(found.get(field) == key[field] for field in ("model", "backend")):
            candidates.append((why_not(found, key), folder.name))
    if not candidates:
        return None
    differences, name = min(candidates, key=lambda candidate: len(candidate[0]))
    return f"the nearest one, {name}, differs in " + ", ".join(differences)


def remove_bundle(folder: Path) -> int:
    """Delete a bundle; returns the bytes freed. A process that has it open keeps what it mapped."""
    with _held(folder, take_lock(_hidden(folder, "lock"), wait=True)):
        if not folder.exists():
            return 0  # another process was faster
        freed = bytes_of(folder)
        doomed = _hidden(folder, "removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)  # gone at once, even if the deletion is interrupted
        shutil.rmtree(doomed)
    return freed


def remove_leftovers(bundles: Path) -> int:
    """Remove what killed processes left hidden here; returns the bytes freed.

    Keeps what a running process holds and what may not be deleted here (another user's).
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
    """TimeoutError: a living process holds the lock."""
    freed = 0
    with _held(folder, take_lock(_hidden(folder, "lock"))):
        for state in ("partial", "removed"):
            left = _hidden(folder, state)
            if left.exists():
                freed += bytes_of(left)
                shutil.rmtree(left)
    return freed


def bytes_of(folder: Path) -> int:
    """Size of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hidden(folder: Path, state: str) -> Path:
    """Path of a bundle's lock, partial or removed."""
    return folder.with_name(f".{folder.name}.{state}")


@contextmanager
def _held(folder: Path, lock: BaseFileLock) -> Iterator[None]:
    """Let go of the lock at the end, and leave no file of it."""
    try:
        yield
    finally:
        _hidden(folder, "lock").unlink(missing_ok=True)
        lock.release()


class _Hashing:
    """sha256 of a bundle's files, one after another, with a word when it takes long."""

    def __init__(self, name: str, total_bytes: int, say: Say) -> None:
        self._name, self._total_bytes, self._say = name, total_bytes, say
        self._done_bytes, self._said_s = 0, time.monotonic()

    def sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                self._done_bytes += len(chunk)
                if time.monotonic() - self._said_s > _PATIENCE_S:
                    self._said_s = time.monotonic()
                    percent = 100 * self._done_bytes // self._total_bytes
                    self._say(f"hashing {self._name}: {percent} % of {self._total_bytes:,} bytes")
        return digest.hexdigest()
