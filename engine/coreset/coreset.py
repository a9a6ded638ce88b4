"""The coreset artefact: a folder of lossless patches, a manifest and, optionally, soft labels.

    manifest.json                what it is, how it was made, the hash of every file
    patches/<class id>/*.png     a plain ImageFolder, nothing else in it
    doped/<class id>/*.png       another one, with the real images that doping added
    labels.safetensors           soft labels, see labels/file.py

Legend: N samples (patches), H and W patch size in pixels, C = 3, K classes, r factor, D doped
images, S image size in pixels.
A sample is a row in class-sorted order: class 0's ipc·r² patches, then class 1's, and so on. The
exceptions are methods t2i, dsco and herding: their patches are whole images (r = 1), for t2i
`generated` per class, otherwise ipc, and their samples are `samples_per_class` showings of these
(for t2i also of their variants).

A coreset is written under a temporary name beside its target and renamed last, so an interrupted
write leaves nothing that looks finished. Nothing is ever unpickled. The same pixels and Pillow
version give the same `content_sha256`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...export.durable import (
    find_link,
    full_disk_explained,
    replace_file,
    replacing,
    replacing_file,
    write_durably,
)
from ..errors import CoresetError
from ..labels.file import RecordedBlock, write_label_file
from ..labels.stored import SoftLabels
from .manifest import (
    DOPED,
    LABELS,
    LEFTOVERS,
    MANIFEST,
    NOISE_SCHEME,
    PATCHES,
    SCHEMA,
    SCHEMA_DOPED,
    check_class_ids,
    check_files,
    file_entry,
    image_files,
    read_manifest,
    require_replaceable,
    seal,
    spelled,
)


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
        counts = torch.tensor(
            [entry["patches"] for entry in self.manifest["classes"]], dtype=torch.int64
        )
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def samples_per_class(self) -> int:
        """Samples that a class shows per epoch, without its doped images: ipc·r² by default."""
        return self.settings.get("samples_per_class", self.manifest["classes"][0][PATCHES])

    @property
    def doped_samples_per_class(self) -> int:
        """Samples that a class shows per epoch of its doped images."""
        return self.settings["doping"]["samples_per_class"] if self.doped_per_class else 0

    @property
    def doped_per_class(self) -> int:
        """Real images that doping added to each class; 0 without doping."""
        return self.manifest["classes"][0].get(DOPED, 0)

    def patches(self) -> Tensor:
        """Every patch, uint8 [N, H, W, 3] in 0..255, class-sorted."""
        return self._images(PATCHES, self.settings["patch_px"])

    def doped(self) -> Tensor:
        """The real images that doping added, uint8 [D, S, S, 3] in 0..255, class-sorted."""
        return self._images(DOPED, self.settings["image_size_px"])

    def _images(self, kind: str, size_px: int) -> Tensor:
        """CoresetError for a file that is no PNG, or of another size or mode."""
        names = [
            name
            for entry in self.manifest["classes"]
            for name in image_files(kind, entry["id"], entry.get(kind, 0))
        ]
        if not names:
            return torch.empty((0, size_px, size_px, 3), dtype=torch.uint8)
        first_HWC = _read_png(self.folder / names[0], size_px)  # of a size that memory can hold
        pixels_NHWC = torch.empty((len(names), *first_HWC.shape), dtype=torch.uint8)
        for row, name in enumerate(names):
            pixels_NHWC[row] = torch.from_numpy(_read_png(self.folder / name, size_px))
        return pixels_NHWC

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
    changed or does not belong there, or is a link: what it leads to may be another file.
    """
    folder = Path(folder)
    if (link := find_link(folder)) is not None:
        raise CoresetError(
            f"{link} is a symbolic link, and a coreset holds plain files and folders only: "
            "put a copy in its place"
        )
    manifest = read_manifest(folder)
    if verify:
        check_files(folder, manifest)
    return Coreset(folder, manifest)


def write_coreset(
    folder: str | Path,
    *,
    patches_NHWC: Tensor | np.ndarray,
    class_ids: Sequence[str],
    class_names: Sequence[str],
    settings: dict[str, Any],
    model: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    doped_DHWC: Tensor | None = None,
    provenance: dict[str, Any],
    overwrite: bool = False,
) -> Coreset:
    """Write a coreset folder, without labels, and open it.

    patches_NHWC: uint8 [N, patch_px, patch_px, 3], class after class, ipc·r² of each class, or
    `settings["generated"]` if set: images that were generated once and are augmented to ipc.
    `settings` must name method, seed, image_size_px, factor, patch_px and ipc.
    `settings`, `model` and `teacher` are hashed, so paths, times and host names belong in
    `provenance`. doped_DHWC: real images, uint8 [D, image_size_px, image_size_px, 3], equally many
    per class, in class order.

    Raises CoresetError for arguments that contradict each other or a folder that is not empty
    (`overwrite` replaces a coreset, and only a coreset); OSError, one clear line, on a full disk.
    """
    folder, size_px = Path(folder), settings["image_size_px"]
    patches = torch.as_tensor(patches_NHWC)
    doped = (
        torch.empty(0, size_px, size_px, 3, dtype=torch.uint8) if doped_DHWC is None else doped_DHWC
    )
    check_class_ids(class_ids)
    each = settings.get("generated", settings["ipc"] * settings["factor"] ** 2)
    doped_each = len(doped) // len(class_ids)
    _check_images("patches", patches, settings["patch_px"], each, len(class_ids))
    _check_images("doped images", doped, size_px, doped_each, len(class_ids))
    require_replaceable(folder, overwrite, "a coreset", MANIFEST, "patchbloom.coreset/", LEFTOVERS)
    needed = patches.nbytes + doped.nbytes
    with full_disk_explained(folder, needed), replacing(folder, overwrite) as partial:
        files: dict[str, Any] = {}
        for index, class_id in enumerate(class_ids):
            for kind, images, count in ((PATCHES, patches, each), (DOPED, doped, doped_each)):
                own_NHWC = images[index * count : (index + 1) * count]
                files |= _write_images(partial, kind, class_id, own_NHWC)
        counts = {PATCHES: each} | ({DOPED: doped_each} if doped_each else {})
        content = {
            "schema": SCHEMA_DOPED if doped_each else SCHEMA,
            "classes": [
                {"index": index, "id": class_id, "name": name, **counts}
                for index, (class_id, name) in enumerate(zip(class_ids, class_names, strict=True))
            ],
            "settings": settings,
            "noise": NOISE_SCHEME,
            "model": model,
            "teacher": teacher,
            "labels": None,
            "files": files,
        }
        manifest = seal(_as_json(content, "settings, model and teacher"), _as_json(provenance))
        write_durably(partial / MANIFEST, spelled(manifest))
    return open_coreset(folder, verify=False)


def _write_images(
    folder: Path, kind: str, class_id: str, images_NHWC: Tensor
) -> dict[str, dict[str, Any]]:
    """Write the images of a class; returns the size and hash of each file."""
    entries = {}
    names = image_files(kind, class_id, len(images_NHWC))
    for name, image_HWC in zip(names, images_NHWC.cpu().numpy(), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, image_HWC)
        entries[name] = file_entry(path)
    return entries


def _read_png(path: Path, size_px: int) -> np.ndarray:
    quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
    try:
        with quiet, Image.open(path, formats=("PNG",)) as image:
            found = f"{image.mode} {image.size[0]}×{image.size[1]}"
            if image.mode == "RGB" and image.size == (size_px, size_px):
                return np.array(image)
    except MemoryError:
        raise MemoryError(f"reading {path}") from None
    except Exception as error:  # Pillow raises half a dozen types, from SyntaxError to IndexError
        found = f"no PNG or a damaged one ({error})"
    raise CoresetError(
        f"{path}: expected an RGB image of {size_px}×{size_px} px, got {found}: restore the file, "
        "or make the coreset again with --overwrite"
    )


def write_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write one uint8 image, as Pillow does at level 9 without metadata."""
    with path.open("wb") as stream:
        Image.fromarray(image_HWC).save(stream, "PNG", compress_level=9)


def attach_labels(
    folder: str | Path, labels: RecordedBlock, *, provenance: dict[str, Any] | None = None
) -> Coreset:
    """Store soft labels in a coreset, replacing its old ones; `provenance` is added to its own.

    After a kill at any point the folder opens as the coreset with the old labels, with none, or
    with the new ones: the manifest first drops the old file and is replaced last.
    """
    coreset = open_coreset(folder)
    folder, manifest, layout = coreset.folder, coreset.manifest, labels.layout
    if layout.classes != len(coreset.class_ids):
        raise CoresetError(
            f"soft labels: expected {len(coreset.class_ids)} classes, as the coreset has, got "
            f"{layout.classes}: use a teacher trained on these classes"
        )
    with full_disk_explained(folder, layout.bytes):
        files = {name: entry for name, entry in manifest["files"].items() if name != LABELS}
        with replacing_file(folder / LABELS) as staged:
            write_label_file(staged, layout, labels.epoch, labels.basis)
            if manifest["labels"] is not None:
                _replace_manifest(folder, {**manifest, "labels": None, "files": files}, {})
        files[LABELS] = file_entry(folder / LABELS)
        described = _as_json(labels.describe(), "label settings")
        _replace_manifest(
            folder, {**manifest, "labels": described, "files": files}, provenance or {}
        )
    return open_coreset(folder, verify=False)


def _replace_manifest(folder: Path, content: dict[str, Any], provenance: dict[str, Any]) -> None:
    sealed = seal(content, {**content["provenance"], **_as_json(provenance)})
    replace_file(folder / MANIFEST, spelled(sealed))


def _check_images(what: str, images: Tensor, size_px: int, each: int, classes: int) -> None:
    expected = (each * classes, size_px, size_px, 3)
    if images.dtype != torch.uint8 or images.shape != expected:
        raise CoresetError(
            f"{what}: expected uint8 {list(expected)}, {each} of each of {classes} classes, got "
            f"{images.dtype} {list(images.shape)}"
        )


def _as_json(value: dict[str, Any], what: str = "provenance") -> dict[str, Any]:
    """`value` as JSON reads it back (tuples become lists); CoresetError if it is not plain JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CoresetError(f"{what}: expected plain JSON values, got {error}") from None
