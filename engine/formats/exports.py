"""A coreset in the layouts of other libraries: images, classes and, where they fit, soft labels.

    imagefolder  train/<class id>/000000.png          torchvision's ImageFolder(OUT/train)
                 train/<class id>/doped_000000.png    after the patches, where doping added some
    webdataset   train-000000.tar, …                  formats/webdataset.py
    parquet      data/train-00000-of-00001.parquet    formats/parquet.py
    hf           the same and a card, README.md
    ddranking    images.pt, labels.pt, images/        formats/ddranking.py

    export.json  beside them: the coreset's hash, the classes in order, a description of the labels
                 and the parts of them that are here, and size and SHA-256 of every file

A coreset holds only training data, so the one split is `train`: patches, and the real images that
doping added, which may be larger. Both are the coreset's own PNG bytes. Soft labels are the
teacher's outputs for views of images derived from the stored ones, not for the stored ones
themselves. Each is exported once, with its image (coreset/shown.py); export.json describes the
derivation. Labels in principal components are exported as logits, which at 1000 classes are 50
times as large. The same coreset gives the same bytes, and an export is complete or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...export.durable import full_disk_explained, replacing, write_durably
from ..coreset.coreset import Coreset
from ..coreset.manifest import file_entry, require_replaceable, spelled
from ..coreset.shown import describe_views, stored_images
from ..errors import CoresetError
from ..labels.stored import SoftLabels
from ..options import ExportFormat
from .ddranking import write_dd_ranking
from .parquet import write_data_set, write_parquet
from .webdataset import write_shards

SCHEMA, MARK = "patchbloom.export/2", "export.json"
HOLDS_LABELS = ("webdataset", "parquet", "hf")


def export_coreset(
    coreset: Coreset,
    to: ExportFormat,
    out: Path,
    *,
    labels: bool = True,
    dataset: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a coreset as `to` into the folder `out`; returns format, files, bytes, soft labels.

    `labels`: include the stored soft labels, where the format can hold them. `dataset`:
    DD-Ranking's name of the data set, for `ddranking` alone.

    Raises CoresetError for a folder that is not empty (`overwrite` replaces an export, and only an
    export), soft labels that belong to no stored image, or arguments that write_dd_ranking refuses;
    Unavailable without pyarrow, for `parquet` and `hf`; OSError, one clear line, on a full disk.
    """
    out = out.expanduser()
    if out.resolve().is_relative_to(coreset.folder.resolve()):
        raise CoresetError(f"--out {out} lies in the coreset, which holds its own files only")
    if coreset.folder.resolve().is_relative_to(out.resolve()):
        raise CoresetError(f"--out {out} holds the coreset itself: choose another --out")
    require_replaceable(out, overwrite, "an export", MARK, "patchbloom.export/")
    stored = coreset.soft_labels() if labels and to in HOLDS_LABELS else None
    writers: dict[ExportFormat, Callable[[Path], dict[str, Any]]] = {
        "imagefolder": lambda folder: _write_image_folder(coreset, folder),
        "webdataset": lambda folder: write_shards(coreset, stored, folder),
        "parquet": lambda folder: write_parquet(coreset, stored, folder),
        "hf": lambda folder: write_data_set(coreset, stored, folder),
        "ddranking": lambda folder: write_dd_ranking(coreset, dataset, folder),
    }
    needed = _needed_bytes(coreset, to, stored)
    with full_disk_explained(out, needed), replacing(out, overwrite) as partial:
        summary = {**_counts(coreset), **writers[to](partial)}
        files = _write_mark(coreset, to, stored, partial, summary)
    return {
        "format": to,
        "export": str(out),
        "coreset": coreset.content_sha256,
        "files": len(files) + 1,
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "soft_labels": None if stored is None else stored.codec.name,
        **summary,
    }


def _counts(coreset: Coreset) -> dict[str, int]:
    doped = len(coreset.class_ids) * coreset.doped_per_class
    return {"images": len(coreset.labels_N) + doped, "doped_images": doped}


def _write_image_folder(coreset: Coreset, folder: Path) -> dict[str, Any]:
    for image in stored_images(coreset, None):
        path = folder / "train" / image.class_id / f"{image.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(coreset.folder / image.file, path)
    return {"split": "train"}


def _write_mark(
    coreset: Coreset,
    to: ExportFormat,
    stored: SoftLabels | None,
    folder: Path,
    summary: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write `export.json`; returns the size and hash of each other file."""
    manifest = coreset.manifest
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        "schema": SCHEMA,
        "format": to,
        **summary,
        "coreset": coreset.content_sha256,
        "classes": manifest["classes"],
        "settings": coreset.settings,
        "labels": None if stored is None else manifest["labels"] | {"parts": stored.parts},
        "views": None if stored is None else describe_views(coreset),
        "files": {path.relative_to(folder).as_posix(): file_entry(path) for path in paths},
    }
    write_durably(folder / MARK, spelled(described))
    return described["files"]


def _needed_bytes(coreset: Coreset, to: ExportFormat, labels: SoftLabels | None) -> int:
    sizes = coreset.bytes()
    images_bytes = 2 * (sizes["patches"] or 0)
    if labels is not None:
        return images_bytes + labels.epochs * labels.samples * labels.answer_bytes
    if to != "ddranking":
        return images_bytes
    settings = coreset.settings
    mosaics = len(coreset.labels_N) // settings["factor"] ** 2
    images = mosaics + _counts(coreset)["doped_images"]
    return images_bytes + images * 3 * 4 * settings["image_size_px"] ** 2
