"""A built engine on disk: a folder with a manifest, complete or absent.

    <bundles>/sdxl-tiny-ort-cpu-fp32-64px-4x8-<key>/
        manifest.json   key, sha256 and size of every file, parity, and a hash over all of that
        *.onnx, …       the backend's files
    .<name>.lock        held while a process builds or removes the bundle
    .<name>.partial     a build in progress
    .<name>.removed     a deletion in progress
    <name>.refused/     a build that failed the parity gate, kept on request; never an engine

The folder's name ends in a hash of the key (bundle_key.py); a bundle with another key is never
loaded. A build takes the lock of its key: a second one waits, and reuses the first one's bundle. A
killed process leaves only hidden files, with a free lock; the next build, list or remove deletes
them.
Opening verifies every file: by its bytes the first time and under `engine verify` or `--verify`,
otherwise by the size and times that hashes.py remembers.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from pydantic import BaseModel

from .bundle_key import BUNDLE_NAME, BundleKey, build_command, bundle_name, why_not
from .documents import Count, Finite, Inside, Sha256, check_document, read_json
from .durable import cache_folder, json_sha256, replace_file, sync, take_lock, write_durably
from .hashes import known_sha256, read_sha256
from .terminal import say

SCHEMA = 1
MANIFEST = "manifest.json"
Say = Callable[[str], None]
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_BYTES = 1 << 20  # with less free disk space than this, any failed build is due to the disk


class BundleError(OSError):
    """A bundle is damaged, does not match, or could not be built; the message says what to do."""


class ParityError(BundleError):
    """A built engine is refused: its outputs are not torch's."""

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = dict(report)
        """The measured figures, after those that a build had reported before."""


class _File(BaseModel):
    bytes: Count
    sha256: Sha256


class _Report(BaseModel):
    model: str | None = None
    built_at: str | None = None
    seconds: Finite = 0.0


class _Manifest(BaseModel):
    key: BundleKey
    report: _Report
    files: dict[Inside, _File]


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    folder: Path
    manifest: dict[str, Any]
    built: bool = False
    """Whether this call built it."""

    @property
    def key(self) -> dict[str, Any]:
        """Everything that it depends on."""
        return self.manifest["key"]

    @property
    def size_bytes(self) -> int:
        """Size of all files except the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def default_bundles_folder() -> Path:
    return cache_folder() / "bundles"


def bundles_option(bundles: Path) -> str:
    """The option that a printed command needs to reach this folder; empty for the default one."""
    is_default = bundles.absolute() == default_bundles_folder().absolute()
    return "" if is_default else f" --bundles {shlex.quote(str(bundles.absolute()))}"


def remove_command(folder: Path) -> str:
    """The command line that removes this bundle."""
    return f"engine remove {folder.name}{bundles_option(folder.parent)}"


def _refuse_shared(*paths: Path) -> None:
    """Raise BundleError when another user may write there: opening an engine runs its code.

    The sticky bit keeps others from replacing an engine's folder, whose own owner is checked too.
    """
    for path in paths:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            fault, remedy = f"belongs to user {status.st_uid}", ""
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            fault = "can be written to by others"
            remedy = f"close it with `chmod -R go-w {shlex.quote(str(path.absolute()))}`, or "
        else:
            continue
        raise BundleError(
            f"{path} {fault}, and who writes there can run code here: {remedy}choose another "
            "folder with --bundles"
        )


def find_or_build(
    bundles: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], dict[str, Any]],
    model: str | None = None,
    *,
    keep_refused: bool = False,
) -> Bundle:
    """Open the bundle with this key, or build it and print the command that builds the same engine
    from `model`.

    `build` fills an empty folder and returns its report (parity, seconds). Its exceptions pass
    through, and a failed build leaves nothing, except that `keep_refused` keeps what ParityError
    refuses. Raises BundleError for a damaged bundle or a full disk.
    """
    folder = bundles / bundle_name(key)
    if (stored := stored_folder(bundles, key)) is not None:
        return open_bundle(stored, key)
    try:
        bundles.mkdir(0o755, parents=True, exist_ok=True)
        _refuse_shared(bundles)
        try:
            lock = take_lock(_hidden(folder, "lock"))
        except TimeoutError:
            say("another process is building this engine: waiting for it")
            lock = take_lock(_hidden(folder, "lock"), wait=True)
    except BundleError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BundleError(
            f"no engine can be stored in {bundles} ({reason}): choose another folder with --bundles"
        ) from error
    with _held(folder, lock):
        remove_leftovers(bundles)
        if folder.exists():
            return open_bundle(folder, key)
        nearest = nearest_bundle(bundles, key)
        say(f"no engine for these settings yet{f'; {nearest}' if nearest else ''}")
        say(f"building it, as `{build_command(key, model, bundles_option(bundles))}` does")
        return _build(folder, key, build, keep_refused)


def stored_folder(bundles: Path, key: Mapping[str, Any]) -> Path | None:
    """The stored bundle of this key, or one that holds plans for its targets and more."""
    folder = bundles / bundle_name(key)
    if folder.exists() or not key.get("targets"):
        return folder if folder.exists() else None
    stored = stored_keys(bundles)
    return next((other for other, found in stored if not why_not(found, key)), None)


def _build(
    folder: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], dict[str, Any]],
    keep_refused: bool,
) -> Bundle:
    """Fill a hidden folder, write its manifest last, then rename it. The caller holds the lock."""
    partial = _hidden(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(0o755)
        try:
            report = build(partial)
        except ParityError as error:
            if not keep_refused or _full_disk_error(folder.parent, error):
                raise
            raise _keep(folder, key, error) from error
        manifest = {"schema": SCHEMA, "key": dict(key), "report": report, "files": {}}
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            sync(path)  # a full disk may show only now
            name, size_bytes = path.relative_to(partial).as_posix(), path.stat().st_size
            manifest["files"][name] = {"sha256": read_sha256(path), "bytes": size_bytes}
        manifest["content_sha256"] = json_sha256(manifest)
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        for path in partial.rglob("*"):
            path.chmod(path.stat().st_mode & ~0o022)
        os.rename(partial, folder)
    except BaseException as error:
        full_disk = _full_disk_error(folder.parent, error)
        shutil.rmtree(partial, ignore_errors=True)
        if full_disk is not None:
            raise full_disk from error
        raise
    return Bundle(folder, manifest, built=True)


def _keep(folder: Path, key: Mapping[str, Any], error: ParityError) -> ParityError:
    """Move a refused build to <name>.refused, in place of an older one; return an error with it."""
    partial, refused = _hidden(folder, "partial"), folder.with_name(f"{folder.name}.refused")
    content = {"refusal": str(error), "key": dict(key), "report": error.report}
    write_durably(partial / "refused.json", json.dumps(content, indent=1).encode())
    shutil.rmtree(refused, ignore_errors=True)
    os.rename(partial, refused)
    return ParityError(f"{error}; kept in {refused}, for study only: never used", error.report)


def _full_disk_error(bundles: Path, error: BaseException) -> BundleError | None:
    """The error to raise when a full disk caused `error`; None for another cause.

    C++ libraries report a full disk in their own ways, so this also checks the disk itself.
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


def open_bundle(folder: Path, key: Mapping[str, Any] | None = None) -> Bundle:
    """Read a bundle; verify its files, and its key if one is given.

    Raises BundleError, which names the file or field that is wrong.
    """
    remedy = f"remove it with `{remove_command(folder)}`, and it is built again"
    manifest = read_manifest(folder)
    _refuse_shared(folder.parent, folder, *folder.rglob("*"))
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
    if key is not None and (differences := why_not(manifest["key"], key)):
        model = manifest["report"].get("model")
        rebuild = build_command(key, model, bundles_option(folder.parent))
        raise BundleError(
            f"{folder} was built for {', '.join(differences)}: `{rebuild}` builds the right one"
        )
    for path, entry in zip(sizes, manifest["files"].values(), strict=True):
        if known_sha256(path) != entry["sha256"]:
            raise BundleError(f"{path} was changed after the build: {remedy}")
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest and verify its hash; read no other file.

    Raises BundleError when it is missing or was changed, or a field is not of its type.
    """
    remedy = f"remove it with `{remove_command(folder)}`, and it is built again"
    path = folder / MANIFEST
    try:
        manifest = read_json(path, BundleError, remedy)
        recorded = manifest.pop("content_sha256")
        intact = manifest["schema"] == SCHEMA and json_sha256(manifest) == recorded
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; {remedy}") from error
    except (KeyError, AttributeError, TypeError, ValueError):
        intact, manifest, recorded = False, {}, None
    if not intact:
        raise BundleError(f"{path} was changed after the build: {remedy}")
    check_document(manifest, str(path), BundleError, remedy, _Manifest)
    return {**manifest, "content_sha256": recorded}


def find_bundles(bundles: Path) -> list[Path]:
    """Folders of stored bundles, including damaged ones, sorted by name."""
    if not bundles.is_dir():
        return []
    return sorted(
        path for path in bundles.iterdir() if path.is_dir() and BUNDLE_NAME.fullmatch(path.name)
    )


def stored_keys(bundles: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and key of each stored bundle whose manifest is intact."""
    for folder in find_bundles(bundles):
        with suppress(BundleError):  # opening it reports the damage
            yield folder, read_manifest(folder)["key"]


def named_bundle(bundles: Path, name: str) -> Path:
    """The bundle with this name or unique prefix.

    Raises BundleError, which lists the candidates, when none or several match.
    """
    stored = {folder.name: folder for folder in find_bundles(bundles)}
    matches = [name] if name in stored else [each for each in stored if each.startswith(name)]
    if len(matches) == 1:
        return stored[matches[0]]
    if matches:
        raise BundleError(f"{name!r} begins several engines: {', '.join(matches)}")
    there = ", ".join(stored) or "none"
    raise BundleError(f"no engine in {bundles} is called {name!r}; there is: {there}")


def nearest_bundle(bundles: Path, key: Mapping[str, Any]) -> str | None:
    """Name the stored bundle of this model and backend that differs least, and its differences."""
    candidates = [
        (why_not(found, key), folder.name)
        for folder, found in stored_keys(bundles)
        if all(found.get(field) == key[field] for field in ("model", "backend"))
    ]
    if not candidates:
        return None
    differences, name = min(candidates, key=lambda candidate: len(candidate[0]))
    return f"the nearest one, {name}, differs in " + ", ".join(differences)


def remove_bundle(folder: Path) -> int:
    """Delete a bundle; return the bytes freed. Processes that have it open keep their mappings."""
    with _held(folder, take_lock(_hidden(folder, "lock"), wait=True)):
        if not folder.exists():
            return 0  # another process was faster
        freed = bytes_of(folder)
        doomed = _hidden(folder, "removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)  # gone at once, even if the deletion is interrupted
        for cache in folder.parent.glob(f".{folder.name}.*-kernels"):
            cache.unlink()
        shutil.rmtree(doomed)
    return freed


def remove_leftovers(bundles: Path) -> int:
    """Delete hidden files of killed processes; return the bytes freed.

    Skips files whose lock is held, and those that may not be deleted here (another user's).
    """
    names = set()
    for path in bundles.iterdir() if bundles.is_dir() else ():
        name, _, state = path.name.removeprefix(".").rpartition(".")
        if state in ("partial", "removed", "lock") and BUNDLE_NAME.fullmatch(name):
            names.add(name)
    freed = 0
    for folder in sorted(bundles / name for name in names):
        with suppress(OSError), _held(folder, take_lock(_hidden(folder, "lock"))):
            for left in (_hidden(folder, "partial"), _hidden(folder, "removed")):
                if left.exists():
                    freed += bytes_of(left)
                    shutil.rmtree(left)
    return freed


def bytes_of(folder: Path) -> int:
    """Size of all files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kernel_cache(folder: Path, graph: str) -> Path:
    """File beside a bundle for what TensorRT for RTX compiles of it on this machine's card."""
    return _hidden(folder, f"{graph}-kernels")


def record_run(bundle: Bundle, target: str, parity: dict[str, Any]) -> None:
    """Note in the manifest that the engine has run on this target, and its parity with torch.

    Where it may not be written, it says so, and the next process measures again.
    """
    manifest = bundle.manifest
    del manifest["content_sha256"]
    ran_on = [*manifest["report"].get("ran_on", []), target]
    manifest["report"] |= {"parity": parity, "ran_on": ran_on}
    manifest["content_sha256"] = json_sha256(manifest)
    try:
        replace_file(bundle.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        say(f"the parity could not be recorded in {bundle.folder}: {error}")


def _hidden(folder: Path, state: str) -> Path:
    """Path of a bundle's hidden lock file, or of its `partial` or `removed` folder."""
    return folder.with_name(f".{folder.name}.{state}")


@contextmanager
def _held(folder: Path, lock: BaseFileLock) -> Iterator[None]:
    """Delete and release the lock at the end."""
    try:
        yield
    finally:
        _hidden(folder, "lock").unlink(missing_ok=True)
        lock.release()
