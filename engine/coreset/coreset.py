"""The coreset artefact: a folder of lossless patches, a manifest and, optionally, soft labels.

    manifest.json                what it is, how it was made, the hash of every file
    patches/<class id>/*.png     a plain ImageFolder, nothing else in it
    doped/<class id>/*.png       another one, with the real images that doping added
    labels.safetensors           soft labels, see labels/file.py

Legend: N samples (patches), H and W patch size in pixels, C = 3, K classes, r factor, D doped
images, S image size in pixels.
A sample is a row in class-sorted order: class 0's ipc·r² patches, then class 1's, and so on. The
exceptions are methods t2i and dsco: their patches are whole images (r = 1), `generated` per class,
and their samples are `samples_per_class` showings of these (for t2i also of their variants).

A coreset is written under a temporary name beside its target and renamed last, so an interrupted
write leaves nothing that looks finished. Nothing is ever unpickled. The same pixels and Pillow
version give the same `content_sha256`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...export.durable import full_disk_explained, replace_file, replacing, write_durably
from ..errors import CoresetError
from ..labels.file import RecordedBlock, write_label_file
from ..labels.stored import SoftLabels
from .manifest import (
    LABELS,
    MANIFEST,
    NOISE_SCHEME,
    REQUIRED_SETTINGS,
    SCHEMA,
    SCHEMA_DOPED,
    check_class_ids,
    check_files,
    doped_files,
    file_entry,
    patch_files,
    read_manifest,
    seal,
    spelled,
    strays,
)
from .pixels import read_images, write_images


@dataclass(frozen=True)
class Coreset:
    """An opened coreset. Patches and labels are read on demand."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def content_sha256(self) -> str:
        """The name of this content: equal for equal seed, data, teacher and settings."""
        return self.manifest["content_sha256"]

    @property
    def settings(self) -> dict[str, Any]:
        """method, seed, image_size_px, factor, patch_px, ipc and the method's own settings."""
        return self.manifest["settings"]

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Folder names, in class order."""
        return tuple(entry["id"] for entry in self.manifest["classes"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names for prompts and people, in class order."""
        return tuple(entry["name"] for entry in self.manifest["classes"])

    @property
    def labels_N(self) -> Tensor:
        """The class index of every patch, int64 [N], non-decreasing."""
        counts = torch.tensor([entry["patches"] for entry in self.manifest["classes"]])
        return torch.arange(len(counts)).repeat_interleave(counts)

    def patches(self) -> Tensor:
        """Every patch, uint8 [N, H, W, 3] in 0..255, class-sorted."""
        names = [
            name
            for entry in self.manifest["classes"]
            for name in patch_files(entry["id"], entry["patches"])
        ]
        return read_images(self.folder, names, self.settings["patch_px"])

    @property
    def doped_per_class(self) -> int:
        """Real images that doping added to each class; 0 without doping."""
        return self.manifest["classes"][0].get("doped", 0)

    def doped(self) -> Tensor:
        """The real images that doping added, uint8 [D, S, S, 3] in 0..255, class-sorted."""
        names = [
            name
            for entry in self.manifest["classes"]
            for name in doped_files(entry["id"], entry.get("doped", 0))
        ]
        return read_images(self.folder, names, self.settings["image_size_px"])

    def soft_labels(self) -> SoftLabels | None:
        """Stored labels; None when there are none (not labelled, or the teacher labels online)."""
        described = self.manifest["labels"]
        if described is None or described["codec"] == "none":
            return None
        return SoftLabels(self.folder / LABELS, described)

    def bytes(self) -> dict[str, int | None]:
        """Sizes on disk, with and without labels, with and without the generator.

        `generator` is the model's own `weights_bytes`; None where the manifest lacks it. The
        manifest counts without its provenance, which no student needs. `patches` includes the
        images that doping added.
        """
        files = self.manifest["files"]
        patches = sum(entry["bytes"] for name, entry in files.items() if name != LABELS)
        labels = files.get(LABELS, {"bytes": 0})["bytes"]
        manifest = len(spelled(self.manifest | {"provenance": {}}))
        generator = (self.manifest["model"] or {"weights_bytes": 0}).get("weights_bytes")
        with_labels = patches + manifest + labels
        return {
            "patches": patches,
            "labels": labels,
            "manifest": manifest,
            "generator": generator,
            "without_labels": patches + manifest,
            "with_labels": with_labels,
            "with_generator": None if generator is None else with_labels + generator,
        }


def open_coreset(folder: str | Path, verify: bool = True) -> Coreset:
    """Open a coreset; `verify` compares every file with its hash.

    The manifest itself is always checked. Raises CoresetError naming the file that is missing,
    changed or does not belong there.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if verify:
        check_files(folder, manifest)
    return Coreset(folder, manifest)


def write_coreset(
    folder: str | Path,
    *,
    patches_NHWC: Tensor | np.ndarray,
    labels_N: Tensor | np.ndarray | Sequence[int],
    class_ids: Sequence[str],
    class_names: Sequence[str],
    settings: dict[str, Any],
    model: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    labels: RecordedBlock | None = None,
    doped_DHWC: Tensor | None = None,
    provenance: dict[str, Any],
    overwrite: bool = False,
) -> Coreset:
    """Write a coreset folder and open it.

    patches_NHWC: uint8 [N, patch_px, patch_px, 3]; labels_N: class indices, non-decreasing, each
    class ipc·r² times, or `settings["generated"]` times if set: images that were generated once and
    are augmented to ipc. `settings` must name method, seed, image_size_px, factor, patch_px and
    ipc.
    `settings`, `model` and `teacher` are hashed, so paths, times and host names belong in
    `provenance`. doped_DHWC: real images, uint8 [D, image_size_px, image_size_px, 3], equally many
    per class, in class order.

    Raises CoresetError for arguments that contradict each other or a folder that is not empty
    (`overwrite` replaces a coreset, and only a coreset); OSError, one clear line, on a full disk.
    """
    folder = Path(folder)
    patches = np.ascontiguousarray(torch.as_tensor(patches_NHWC).cpu().numpy())
    classes = torch.as_tensor(labels_N, dtype=torch.int64).cpu()
    _check_arguments(patches, classes, class_ids, class_names, settings, labels)
    doped = _checked_doped(doped_DHWC, len(class_ids), settings)
    _check_target(folder, overwrite)
    layout = None if labels is None else labels.layout
    needed = patches.nbytes + doped.nbytes + (0 if layout is None else layout.bytes)
    with full_disk_explained(folder, needed), replacing(folder, overwrite) as partial:
        files: dict[str, Any] = {}
        counts = torch.bincount(classes, minlength=len(class_ids)).tolist()
        doped_each = len(doped) // len(class_ids)
        rows, real = iter(patches), iter(doped)
        for class_id, count in zip(class_ids, counts, strict=True):
            files |= write_images(partial, patch_files(class_id, count), rows)
            files |= write_images(partial, doped_files(class_id, doped_each), real)
        if labels is not None and layout is not None:
            write_label_file(partial / LABELS, layout, labels.epoch, labels.basis)
            files[LABELS] = file_entry(partial / LABELS)
        content = {
            "schema": SCHEMA_DOPED if doped_each else SCHEMA,
            "classes": [
                {"index": index, "id": class_id, "name": name, "patches": count}
                | ({"doped": doped_each} if doped_each else {})
                for index, (class_id, name, count) in enumerate(
                    zip(class_ids, class_names, counts, strict=True)
                )
            ],
            "settings": settings,
            "noise": NOISE_SCHEME,
            "model": model,
            "teacher": teacher,
            "labels": None if labels is None else labels.describe(),
            "files": files,
        }
        manifest = seal(_as_json(content, "settings, model and teacher"), _as_json(provenance))
        write_durably(partial / MANIFEST, spelled(manifest))
    return open_coreset(folder, verify=False)


def attach_labels(
    folder: str | Path, labels: RecordedBlock, *, provenance: dict[str, Any] | None = None
) -> Coreset:
    """Store soft labels in a coreset, replacing its old ones; `provenance` is added to its own.

    After a kill at any point the folder opens as the coreset with the old labels, with none, or
    with the new ones: the manifest first drops the old file and is replaced last.
    """
    coreset = open_coreset(folder)
    folder, manifest = coreset.folder, coreset.manifest
    _check_label_classes(labels, len(coreset.class_ids))
    layout = labels.layout
    with full_disk_explained(folder, 0 if layout is None else layout.bytes):
        staged = folder / f"{LABELS}.partial"
        if layout is not None:
            try:
                write_label_file(staged, layout, labels.epoch, labels.basis)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
        files = {name: entry for name, entry in manifest["files"].items() if name != LABELS}
        if manifest["labels"] is not None:
            _replace_manifest(folder, {**manifest, "labels": None, "files": files}, {})
        if layout is None:
            (folder / LABELS).unlink(missing_ok=True)
        else:
            os.replace(staged, folder / LABELS)
            files[LABELS] = file_entry(folder / LABELS)
        described = _as_json(labels.describe(), "label settings")
        _replace_manifest(
            folder, {**manifest, "labels": described, "files": files}, provenance or {}
        )
    return open_coreset(folder, verify=False)


def _replace_manifest(folder: Path, content: dict[str, Any], provenance: dict[str, Any]) -> None:
    sealed = seal(content, {**content["provenance"], **_as_json(provenance)})
    replace_file(folder / MANIFEST, spelled(sealed))


def _check_arguments(
    patches: np.ndarray,
    classes: Tensor,
    class_ids: Sequence[str],
    class_names: Sequence[str],
    settings: dict[str, Any],
    labels: RecordedBlock | None,
) -> None:
    missing = [key for key in REQUIRED_SETTINGS if key not in settings]
    if missing:
        raise CoresetError(f"settings: expected {', '.join(REQUIRED_SETTINGS)}; missing {missing}")
    size_px = settings["patch_px"]
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1:] != (size_px, size_px, 3):
        raise CoresetError(
            f"patches: expected uint8 [N, {size_px}, {size_px}, 3], "
            f"got {patches.dtype} {list(patches.shape)}"
        )
    check_class_ids(list(class_ids))
    if len(class_names) != len(class_ids):
        raise CoresetError(f"expected {len(class_ids)} class names, got {len(class_names)}")
    each = settings.get("generated", settings["ipc"] * settings["factor"] ** 2)
    expected = torch.arange(len(class_ids)).repeat_interleave(each)
    if not torch.equal(classes, expected) or len(patches) != len(expected):
        raise CoresetError(
            f"labels: expected ipc·factor² (or generated) = {each} rows of each of "
            f"{len(class_ids)} classes, in class order; got {len(patches)} patches and labels "
            f"{torch.bincount(classes.clamp_min(0)).tolist()[:8]}"
        )
    if labels is not None:
        _check_label_classes(labels, len(class_ids))


def _checked_doped(doped_DHWC: Tensor | None, classes: int, settings: dict[str, Any]) -> np.ndarray:
    size_px = settings["image_size_px"]
    if doped_DHWC is None:
        return np.empty((0, size_px, size_px, 3), np.uint8)
    doped = doped_DHWC.cpu().numpy()
    shape = doped.shape
    if doped.dtype != np.uint8 or shape[1:] != (size_px, size_px, 3) or shape[0] % classes:
        raise CoresetError(
            f"doped images: expected uint8 [D, {size_px}, {size_px}, 3], D a multiple of {classes} "
            f"classes, got {doped.dtype} {list(shape)}"
        )
    return doped


def _check_label_classes(labels: RecordedBlock, classes: int) -> None:
    layout = labels.layout
    if layout is not None and layout.classes != classes:
        raise CoresetError(
            f"soft labels: expected {classes} classes, as the coreset has, got "
            f"{layout.classes}: use a teacher trained on these classes"
        )


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse to write over anything but a coreset, and over that without `overwrite`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CoresetError(f"{folder} exists and is not a folder: choose another --out")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CoresetError(
            f"{folder} is not empty: choose another --out, or --overwrite to replace a coreset"
        )
    manifest = _any_manifest(folder / MANIFEST)
    if manifest is None:
        raise CoresetError(
            f"{folder} is not a coreset, and --overwrite replaces nothing else: "
            "choose another --out"
        )
    for path in strays(folder, manifest):
        raise CoresetError(
            f"{path} is not part of the coreset that --overwrite would replace: "
            "move it elsewhere, or choose another --out"
        )


def _any_manifest(path: Path) -> dict[str, Any] | None:
    """A patchbloom manifest of any version, even of a damaged coreset; None if it is not one."""
    try:
        manifest = json.loads(path.read_bytes())
        ours = manifest["schema"].startswith("patchbloom.coreset/") and set(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if ours else None


def _as_json(value: dict[str, Any], what: str = "provenance") -> dict[str, Any]:
    """`value` as JSON reads it back (tuples become lists); CoresetError if it is not plain JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CoresetError(f"{what}: expected plain JSON values, got {error}") from None
