"""`engine coreset info|verify|show|export`: the commands, and their output for people."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ...export.durable import full_disk_explained, replace_file
from ..console import print_fields
from ..coreset.coreset import Coreset, open_coreset
from ..coreset.sheet import coreset_sheet
from ..options import CoresetExport, CoresetInfo, CoresetShow, CoresetVerify
from .exports import export_coreset


def run_coreset_command(
    command: CoresetInfo | CoresetVerify | CoresetShow | CoresetExport,
) -> dict[str, Any]:
    """Run the command, and print its result for people unless JSON alone is requested."""
    match command:
        case CoresetInfo():
            result = _info(open_coreset(command.folder, verify=False))
        case CoresetVerify():
            coreset = open_coreset(command.folder)
            result = {
                "coreset": str(coreset.folder),
                "content_sha256": coreset.content_sha256,
                "files": len(coreset.manifest["files"]),
                "verified": True,
            }
        case CoresetShow():
            result = _show(open_coreset(command.folder), command.out, command.patches_per_class)
        case CoresetExport():
            result = export_coreset(
                open_coreset(command.folder),
                command.to,
                command.out,
                labels=command.labels,
                dataset=command.dataset,
                overwrite=command.overwrite,
            )
    if not command.json:
        print_fields(result)
    return result


def _info(coreset: Coreset) -> dict[str, Any]:
    manifest = coreset.manifest
    described = ("settings", "model", "teacher", "labels", "noise")
    labels = coreset.soft_labels()
    provenance = dict(manifest["provenance"])
    provenance.pop("patches", None)  # a line per patch: read them in manifest.json
    return {
        "coreset": str(coreset.folder),
        "content_sha256": coreset.content_sha256,
        "patches": len(coreset.labels_N),
        "doped_images": coreset.doped_per_class * len(coreset.class_ids),
        "classes": dict(zip(coreset.class_ids, coreset.class_names, strict=True)),
        "bytes": coreset.bytes(),
        "recognised_by_the_teacher": None if labels is None else round(labels.recognised(0), 2),
        **{key: manifest[key] for key in described},
        "provenance": provenance,
    }


def _show(coreset: Coreset, out: Path | None, patches_per_class: int) -> dict[str, Any]:
    folder = coreset.folder.absolute()
    out = folder.with_name(f"{folder.name}.png") if out is None else out.absolute()
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} lies in the coreset, which holds its own files only")
    sheet = coreset_sheet(coreset, patches_per_class)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    with full_disk_explained(out, png.tell()):
        replace_file(out, png.getvalue())
    return {"coreset": str(coreset.folder), "picture": str(out), "size_px": list(sheet.size)}
