"""`engine coreset info|verify|show|export`: the commands, and their output for people."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ...export.durable import full_disk_explained, replace_file
from ...export.hub import HUB
from ..console import print_fields
from ..coreset.coreset import Coreset, open_coreset
from ..coreset.sheet import coreset_sheet
from ..options import CoresetExport, CoresetInfo, CoresetShow, CoresetVerify
from .exports import export_coreset


def run_coreset_command(
    command: CoresetInfo | CoresetVerify | CoresetShow | CoresetExport, folder: Path
) -> dict[str, Any]:
    """Run the command on the coreset in `folder`, and print its result for people unless JSON alone
    is requested."""
    match command:
        case CoresetInfo():
            result = _info(open_coreset(folder, verify=False))
        case CoresetVerify():
            coreset = open_coreset(folder)
            result = {
                "coreset": str(coreset.folder),
                "content_sha256": coreset.content_sha256,
                "files": len(coreset.manifest["files"]),
                "verified": True,
            }
        case CoresetShow():
            result = _show(open_coreset(folder), command)
        case CoresetExport():
            result = export_coreset(
                open_coreset(folder),
                command.to,
                command.out,
                labels=command.labels,
                dataset=command.dataset,
                overwrite=command.overwrite,
            )
    if not command.json:
        print_fields(_for_people(result) if isinstance(command, CoresetInfo) else result)
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


def _for_people(info: dict[str, Any]) -> dict[str, Any]:
    """The classes on one line, and no mappings inside mappings: --json has them."""
    names = [name if key == name else f"{key}: {name}" for key, name in info["classes"].items()]
    flat = {
        key: {k: v for k, v in value.items() if not isinstance(v, dict)}
        for key, value in info.items()
        if isinstance(value, dict)
    }
    return {**info, **flat, "classes": f"{len(names)}: {', '.join(names)}"}


def _show(coreset: Coreset, command: CoresetShow) -> dict[str, Any]:
    given = command.folder
    beside = Path() if str(given).startswith(HUB) else given.absolute().parent
    out = (command.out or beside / f"{given.absolute().name}.png").absolute()
    if out.resolve().is_relative_to(coreset.folder.resolve()):
        raise ValueError(f"--out {out} lies in the coreset, which holds its own files only")
    sheet = coreset_sheet(coreset, command.patches_per_class)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    with full_disk_explained(out, png.tell()):
        replace_file(out, png.getvalue())
    return {"coreset": str(coreset.folder), "picture": str(out), "size_px": list(sheet.size)}
