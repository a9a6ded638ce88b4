"""The manifest of a coreset: its content, its hashes and its checks.

A manifest is JSON with sorted keys. `content_sha256` is the SHA-256 of everything in it but itself
and the provenance (command, time, versions, world size), which differs when the same content is
made twice. The provenance has a hash of its own, and the file has exactly one valid spelling, so
that no byte of `manifest.json` can change unnoticed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...export.documents import check_document, parse_json, read_json
from ...export.durable import file_sha256, json_sha256
from ..errors import CoresetError
from .schema import Manifest

SCHEMA = "patchbloom.coreset/1"
SCHEMA_DOPED = "patchbloom.coreset/2"
"""Schema of a coreset with real images beside its patches; all else is as in version 1."""
NOISE_SCHEME = "philox4x32-10/box-muller/1"
MANIFEST = "manifest.json"
LABELS = "labels.safetensors"
PATCHES, DOPED = "patches", "doped"
# A killed `attach_labels` may leave these behind; the manifest, replaced last, does not list them.
LEFTOVERS = frozenset({f"{MANIFEST}.partial", f"{LABELS}.partial", LABELS})
_OUTSIDE_CONTENT = ("content_sha256", "provenance", "provenance_sha256")


def spelled(manifest: dict[str, Any]) -> bytes:
    """The bytes of `manifest.json`: sorted, indented, one final newline."""
    return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def content_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 of the content: every key but the hashes and the provenance."""
    content = {key: manifest[key] for key in manifest if key not in _OUTSIDE_CONTENT}
    return json_sha256(content)


def seal(content: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """`content` plus its hash, and `provenance` beside it with its own."""
    sealed = {key: content[key] for key in content if key not in _OUTSIDE_CONTENT}
    sealed["content_sha256"] = content_sha256(sealed)
    sealed["provenance"] = provenance
    sealed["provenance_sha256"] = json_sha256(provenance)
    return sealed


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file, read in a streaming way."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def image_files(kind: str, class_id: str, count: int) -> list[str]:
    """The relative paths of a class's images in sample order; `kind` is PATCHES or DOPED."""
    return [f"{kind}/{class_id}/{index:06d}.png" for index in range(count)]


def expected_files(manifest: dict[str, Any]) -> list[str]:
    """Every file a coreset with this manifest consists of, patches in sample order, labels last."""
    files = []
    for entry in manifest["classes"]:
        for kind in (PATCHES, DOPED):
            files += image_files(kind, entry["id"], entry.get(kind, 0))
    labels = manifest["labels"]
    return [*files, LABELS] if labels is not None and labels["codec"] != "none" else files


def check_class_ids(class_ids: Sequence[str]) -> None:
    """Refuse ids that are no folder names, or not in the order of an ImageFolder (sorted)."""
    for class_id in class_ids:
        if not class_id or class_id in {".", ".."} or "/" in class_id or "\0" in class_id:
            raise CoresetError(f"class id {class_id!r} cannot be a folder name: rename the class")
    if list(class_ids) != sorted(set(class_ids)):
        raise CoresetError(
            "class ids must be unique and sorted, as an ImageFolder orders them; "
            f"got {list(class_ids)[:8]}: sort the classes and renumber the labels"
        )


def require_manifest(folder: Path) -> Path:
    """The path of `manifest.json`; CoresetError when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        found = "no such folder" if not folder.is_dir() else f"it has no {MANIFEST}"
        raise CoresetError(
            f"{folder} is not a coreset: {found}. Give the folder that `train` or "
            "`train coreset` wrote (RUN/coreset)"
        )
    return path


def coreset_folder(folder: Path) -> Path:
    """`folder`, or the coreset in it where it is a run's; CoresetError when there is none."""
    inside = folder / "coreset"
    found = (
        inside if (inside / MANIFEST).is_file() and not (folder / MANIFEST).is_file() else folder
    )
    return require_manifest(found).parent


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse and check `manifest.json`; says nothing yet about the other files.

    Raises CoresetError when the folder is no coreset, the schema is another one, any byte of the
    manifest was changed after it was written, or a field is not what schema.py says.
    """
    path = require_manifest(folder)
    manifest = read_sealed(path, (SCHEMA, SCHEMA_DOPED), Manifest, "coreset")
    check_class_ids([entry["id"] for entry in manifest["classes"]])
    if sorted(expected_files(manifest)) != sorted(manifest["files"]):
        raise CoresetError(f"{path}: files: expected one for each image of its classes: {_again()}")
    return manifest


def read_sealed(
    path: Path, schemas: tuple[str, ...], kind: type[BaseModel], what: str
) -> dict[str, Any]:
    """The document that `seal` made and `spelled` spelled; it describes `what` ("coreset").

    Raises CoresetError for another schema, a changed byte, or a field that `kind` refuses.
    """
    raw, again = path.read_bytes(), _again(what)
    manifest = parse_json(raw, str(path), CoresetError, again)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema not in schemas:
        raise CoresetError(
            f"{path}: expected schema {schemas[0]!r}, got {schema!r}: open it with the version of "
            f"patchbloom that wrote it, or make the {what} again"
        )
    try:
        intact = (
            raw == spelled(manifest)
            and manifest["content_sha256"] == content_sha256(manifest)
            and manifest["provenance_sha256"] == json_sha256(manifest["provenance"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CoresetError(f"{path} was changed after it was written ({error}): {again}") from None
    if not intact:
        raise CoresetError(f"{path} was changed after it was written: {again}")
    check_document(manifest, str(path), CoresetError, again, kind)
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], what: str = "coreset") -> None:
    """Compare every file with its size and SHA-256; CoresetError names the first that differs.

    Files that the manifest does not list are refused too: `patches/` is a plain ImageFolder, and a
    stray image in it would be trained on.
    """
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            remedy, encoding = _again(what), sys.getfilesystemencoding()
            if encoding != "utf-8" and not name.isascii():
                remedy = f"its name may have no spelling in {encoding}: set LC_ALL=C.UTF-8"
            raise CoresetError(f"{path} is missing from the {what}: {remedy}")
        found = file_entry(path)
        if found["bytes"] != entry["bytes"]:
            raise CoresetError(
                f"{path}: expected {entry['bytes']} bytes, found {found['bytes']}: {_again(what)}"
            )
        if found["sha256"] != entry["sha256"]:
            raise CoresetError(
                f"{path} was changed: expected sha256 {entry['sha256'][:16]}…, "
                f"found {found['sha256'][:16]}…: {_again(what)}"
            )
    for path in _strays(folder, {*manifest["files"], MANIFEST, *LEFTOVERS}):
        raise CoresetError(f"{path} is not part of this {what}: move it elsewhere")


def require_replaceable(
    folder: Path,
    overwrite: bool,
    what: str,
    mark: str,
    schemas: str,
    leftovers: frozenset[str] = frozenset(),
    option: str = "--out",
) -> None:
    """Refuse to write over anything but `what`, and over that without `overwrite`.

    `mark` is the JSON file that lists its files, even damaged ones, under a schema of any version;
    `leftovers` may lie beside them.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CoresetError(f"{folder} exists and is not a folder: choose another {option}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CoresetError(
            f"{folder} is not empty: choose another {option}, or --overwrite to replace {what}"
        )
    try:
        written = read_json(folder / mark, CoresetError, _again())
        files = set(written["files"]) if written["schema"].startswith(schemas) else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = set()
    if not files:
        raise CoresetError(
            f"{folder} is not {what}, and --overwrite replaces nothing else: choose another "
            f"{option}"
        )
    for path in _strays(folder, {*files, mark, *leftovers}):
        raise CoresetError(
            f"{path} is not part of {what}, and --overwrite replaces nothing else: "
            f"move it elsewhere, or choose another {option}"
        )


def _strays(folder: Path, files: set[str]) -> Iterator[Path]:
    """Paths in the folder that are neither among these files nor above one of them."""
    expected = files | {above.as_posix() for name in files for above in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).as_posix() not in expected:
            yield path


def _again(what: str = "coreset") -> str:
    return f"restore the file, or make the {what} again with --overwrite"
