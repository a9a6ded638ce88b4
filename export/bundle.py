"""A built engine on disk: a folder with a manifest, there whole or not at all.

    <bundles>/sdxl-tiny-ort-cpu-fp32-64px-4x8-<key>/
        manifest.json   key, sha256 and size of every file, parity, and a hash over all of that
        *.onnx, …       what the backend made

The folder's name ends in a hash of the key: model weights, our exporting code, library versions,
shapes, batch, precision, device, flags. A bundle of another key is never loaded. Builds of one key
take a lock: the second waits and reuses. A build that was killed leaves a hidden folder, which the
next build of that key removes. Every file is verified when a bundle is opened.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
MANIFEST = "manifest.json"


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
    def size_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def default_bundles_folder() -> Path:
    """$XDG_CACHE_HOME/patchbloom/bundles, or the same below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "patchbloom" / "bundles"


def bundle_name(key: Mapping[str, Any]) -> str:
    """A readable folder name that ends in a hash of the whole key."""
    readable = [key[field] for field in ("model", "backend", "device", "precision")]
    if key["weights"] == "random":
        readable[0] += "-random"
    shape = f"{key['size_px']}px-{key['batch'] // key['images_per_prompt']}x"
    return "-".join([*readable, f"{shape}{key['images_per_prompt']}", _hash_json(key)[:12]])


def find_or_build(
    bundles: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Open the bundle of `key`, building it first when there is none; `say` is told why.

    `build` fills an empty folder and returns its report (parity, seconds); what it raises passes
    through, and nothing of a failed build stays. BundleError: damaged, or the disk is full.
    """
    folder = bundles / bundle_name(key)
    if (folder / MANIFEST).is_file():
        return open_bundle(folder, key)
    try:
        bundles.mkdir(parents=True, exist_ok=True)
        with _locked(bundles / f".{folder.name}.lock"):
            if (folder / MANIFEST).is_file():
                return open_bundle(folder, key)
            nearest = nearest_bundle(bundles, key)
            say(f"no engine for these settings yet{f'; {nearest}' if nearest else ''}")
            return _build(folder, key, build)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise BundleError(
            f"the engine could not be written to {bundles} ({os.strerror(error.errno)}): free some "
            "space there, or choose another folder with --bundles"
        ) from error


def _build(folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Bundle:
    """Fill a hidden folder, write its manifest last, rename. Call with the lock held."""
    partial = folder.parent / f".{folder.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        report = build(partial)
        manifest = {"schema": SCHEMA, "key": dict(key), "report": report, "files": {}}
        for path in sorted(partial.iterdir()):
            manifest["files"][path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        manifest["content_sha256"] = _hash_json(manifest)
        with open(partial / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Bundle(folder, manifest, built=True)


def build_command(key: Mapping[str, Any]) -> str:
    """The command line that builds the engine of a key."""
    command = f"engine build --model {key['model']} --backend {key['backend']}"
    if key["weights"] == "random":
        command += " --weights random"
    for option in ("size_px", "batch", "images_per_prompt", "precision", "device"):
        name = option.removesuffix("_px").replace("_", "-")
        command += f" --{name} {key[option]}"
    return command


def find_bundles(bundles: Path) -> list[Path]:
    """Folders of finished bundles, sorted by name."""
    return sorted(path.parent for path in bundles.glob(f"[!.]*/{MANIFEST}"))


def read_key(folder: Path) -> dict[str, Any]:
    """The key in a bundle's manifest, its files unread; {} when it cannot be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def why_not(found: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    """The fields in which two keys differ, as "libraries.torch 2.11 (here 2.12)"."""
    before, now = _flat(found), _flat(needed)
    fields = sorted(before.keys() | now.keys())
    return [
        f"{field} {before.get(field)} (here {now.get(field)})"
        for field in fields
        if before.get(field) != now.get(field)
    ]


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for field, value in key.items():
        inner = value if isinstance(value, Mapping) else {}
        flat |= {f"{field}.{name}": entry for name, entry in inner.items()} or {field: value}
    return flat


def nearest_bundle(bundles: Path, key: Mapping[str, Any]) -> str | None:
    """The stored bundle of this model and backend that differs in the fewest fields, and how."""
    candidates = []
    for folder in find_bundles(bundles):
        found = read_key(folder)
        if all(found.get(field) == key[field] for field in ("model", "backend")):
            candidates.append((why_not(found, key), folder.name))
    if not candidates:
        return None
    differences, name = min(candidates, key=lambda candidate: len(candidate[0]))
    return f"the nearest one, {name}, differs in " + ", ".join(differences)


def remove_bundle(folder: Path) -> int:
    """Delete a bundle; returns the bytes freed. A process that has it open keeps what it mapped."""
    freed = sum(path.stat().st_size for path in folder.iterdir())
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)  # gone at once, even if the deletion is interrupted
    shutil.rmtree(doomed)
    folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
    return freed


def open_bundle(folder: Path, key: Mapping[str, Any] | None = None) -> Bundle:
    """Read a bundle and verify every byte of it, and that its key is `key` when one is given.

    BundleError names the file or the field that is not as it should be.
    """
    remedy = f"remove the folder {folder} and it is built again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        recorded = manifest.pop("content_sha256")
        intact = manifest["schema"] == SCHEMA and _hash_json(manifest) == recorded
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}") from error
    except (ValueError, KeyError, AttributeError, TypeError):
        intact, manifest, recorded = False, {}, None
    if not intact:
        raise BundleError(f"{folder / MANIFEST} was changed after the build: {remedy}")
    manifest["content_sha256"] = recorded
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: {remedy}")
        if path.stat().st_size != entry["bytes"]:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes, expected {entry['bytes']}: {remedy}"
            )
        if _sha256(path) != entry["sha256"]:
            raise BundleError(f"{path} was changed after the build: {remedy}")
    if key is not None:
        _check_key(folder, manifest["key"], dict(key))
    return Bundle(folder, manifest)


def _check_key(folder: Path, found: dict[str, Any], needed: dict[str, Any]) -> None:
    differences = why_not(found, needed)
    if differences:
        raise BundleError(
            f"{folder} was built for {', '.join(differences)}: `{build_command(needed)}` builds "
            "the right one"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system lets go of it when the process dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(value: Mapping[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
