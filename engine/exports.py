"""A coreset in the layouts of other libraries: patches, classes and, where they fit, soft labels.

    imagefolder  train/<class id>/000000.png          torchvision's ImageFolder(OUT/train)
    webdataset   train-000000.tar, …                  shards.py
    parquet      data/train-00000-of-00001.parquet    parquet.py
    ddranking    images.pt, labels.pt, images/        dd_ranking.py

    export.json  beside them: the coreset's name, the classes in order, what the labels are of, and
                 size and SHA-256 of every file

All that a coreset holds is training data, so the one split is `train`. Soft labels are the
teacher's answers to views, one per epoch, of the images that are made of a patch: export.json says
of which. Patches are the coreset's own PNG bytes. The same coreset gives the same bytes, and an
export is there whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .commands import ExportFormat
from .coreset import Coreset
from .dd_ranking import write_dd_ranking
from .durable import full_disk_explained, replacing, write_durably
from .manifest import CoresetError, file_entry, patch_files, spelled
from .parquet import write_parquet
from .shards import write_shards
from .soft_labels import SoftLabels

SCHEMA, MARK = "patchbloom.export/1", "export.json"
HOLDS_LABELS = ("webdataset", "parquet")


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

    `labels`: with the stored soft labels, where the format can hold them. `dataset`: DD-Ranking's
    name of the data set, for `ddranking` alone.

    Raises CoresetError for a folder that is not empty (`overwrite` replaces an export, and only an
    export) or classes that `dataset` does not have; Unavailable without pyarrow, for `parquet`;
    OSError, one clear line, on a full disk.
    """
    out = out.expanduser()
    _check_target(coreset, out, overwrite)
    stored = coreset.soft_labels() if labels and to in HOLDS_LABELS else None
    writers: dict[ExportFormat, Callable[[Path], dict[str, Any]]] = {
        "imagefolder": lambda folder: _write_image_folder(coreset, folder),
        "webdataset": lambda folder: write_shards(coreset, stored, folder),
        "parquet": lambda folder: write_parquet(coreset, stored, folder),
        "ddranking": lambda folder: write_dd_ranking(coreset, dataset, folder),
    }
    with full_disk_explained(out, _needed_bytes(coreset, to)), replacing(out, overwrite) as partial:
        told = writers[to](partial)
        _write_mark(coreset, to, stored, partial, told)
    files = json.loads((out / MARK).read_bytes())["files"]
    return {
        "format": to,
        "export": str(out),
        "coreset": coreset.content_sha256,
        "files": len(files) + 1,
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "soft_labels": None if stored is None else stored.codec,
        **told,
    }


def _write_image_folder(coreset: Coreset, folder: Path) -> dict[str, Any]:
    for entry in coreset.manifest["classes"]:
        (folder / "train" / entry["id"]).mkdir(parents=True)
        for name in patch_files(entry["id"], entry["patches"]):
            shutil.copyfile(coreset.folder / name, folder / "train" / entry["id"] / Path(name).name)
    return {"split": "train", "samples": len(coreset.labels_N)}


def _write_mark(
    coreset: Coreset,
    to: ExportFormat,
    stored: SoftLabels | None,
    folder: Path,
    told: dict[str, Any],
) -> None:
    manifest = coreset.manifest
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        "schema": SCHEMA,
        "format": to,
        **told,
        "coreset": coreset.content_sha256,
        "classes": manifest["classes"],
        "settings": coreset.settings,
        "labels": None if stored is None else manifest["labels"],
        "files": {path.relative_to(folder).as_posix(): file_entry(path) for path in paths},
    }
    write_durably(folder / MARK, spelled(described))


def _needed_bytes(coreset: Coreset, to: ExportFormat) -> int:
    files = coreset.manifest["files"]
    stored = sum(entry["bytes"] for entry in files.values())
    if to != "ddranking":
        return 2 * stored
    settings = coreset.settings
    images = len(coreset.class_ids) * settings["ipc"]
    return 2 * stored + images * 3 * 4 * settings["image_size_px"] ** 2


def _check_target(coreset: Coreset, out: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is an export and `overwrite` was asked for."""
    if out.resolve().is_relative_to(coreset.folder.resolve()):
        raise CoresetError(f"--out {out} lies in the coreset, which holds its own files only")
    if coreset.folder.resolve().is_relative_to(out.resolve()):
        raise CoresetError(f"--out {out} holds the coreset itself: choose another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CoresetError(f"--out {out} exists and is not a folder: choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CoresetError(
            f"--out {out} is not empty: choose another --out, or --overwrite to replace an export"
        )
    files = _exported_files(out)
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.relative_to(out).as_posix() not in files:
            raise CoresetError(
                f"{path} is not part of an export, and --overwrite replaces nothing else: "
                "move it elsewhere, or choose another --out"
            )


def _exported_files(out: Path) -> set[str]:
    """What an export in `out` consists of; nothing if there is none."""
    try:
        mark = json.loads((out / MARK).read_bytes())
        return {MARK, *mark["files"]} if mark["schema"] == SCHEMA else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
