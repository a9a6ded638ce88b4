"""`engine`: look at coresets. The last line of stdout is one JSON object.

Importing this module imports neither torch nor TensorRT: each command imports what it needs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.extras import SubcommandApp

from .commands import CoresetInfo, CoresetShow, CoresetVerify
from .console import run_command

if TYPE_CHECKING:
    from .coreset import Coreset

Command = CoresetInfo | CoresetVerify | CoresetShow


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 unusable input, 130 interrupted)."""
    coreset = SubcommandApp()
    coreset.command(name="info")(CoresetInfo)
    coreset.command(name="verify")(CoresetVerify)
    coreset.command(name="show")(CoresetShow)
    app = SubcommandApp()
    app.command(coreset, name="coreset", help="Look at a coreset folder.")
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(
        "engine",
        lambda: app.cli(prog="engine", args=given, description="Engines and coresets."),
        _execute,
    )


def _execute(command: Command) -> dict[str, Any]:
    from .coreset import open_coreset  # torch

    match command:
        case CoresetInfo():
            result = _info(open_coreset(command.folder, verify=False))
        case CoresetVerify():
            result = _verify(open_coreset(command.folder))
        case CoresetShow():
            result = _show(open_coreset(command.folder), command.out, command.patches_per_class)
    if not command.json:
        for key, value in result.items():
            for line, text in enumerate(_lines(value)):
                print(f"{'' if line else key:16}{text}")
    return result


def _info(coreset: Coreset) -> dict[str, Any]:
    manifest = coreset.manifest
    described = ("settings", "model", "teacher", "labels", "noise")
    provenance = dict(manifest["provenance"])
    provenance.pop("patches", None)  # a line per patch: read them in manifest.json
    return {
        "coreset": str(coreset.folder),
        "content_sha256": coreset.content_sha256,
        "patches": len(coreset.labels_N),
        "classes": dict(zip(coreset.class_ids, coreset.class_names, strict=True)),
        "bytes": coreset.bytes(),
        **{key: manifest[key] for key in described},
        "provenance": provenance,
    }


def _verify(coreset: Coreset) -> dict[str, Any]:
    return {
        "coreset": str(coreset.folder),
        "content_sha256": coreset.content_sha256,
        "files": len(coreset.manifest["files"]),
        "verified": True,
    }


def _show(coreset: Coreset, out: Path | None, patches_per_class: int) -> dict[str, Any]:
    from .contact_sheet import contact_sheet
    from .durable import replace_file

    folder = coreset.folder.absolute()
    out = folder.with_name(f"{folder.name}.png") if out is None else out.absolute()
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} lies in the coreset, which holds its own files only")
    patches, labels = coreset.patches().numpy(), coreset.labels_N.numpy()
    sheet = contact_sheet(
        [
            (name, patches[labels == index][:patches_per_class])
            for index, name in enumerate(coreset.class_names)
        ]
    )
    png = io.BytesIO()
    sheet.save(png, "PNG")
    replace_file(out, png.getvalue())
    return {"coreset": str(coreset.folder), "picture": str(out), "size_px": list(sheet.size)}


def _lines(value: Any) -> list[str]:
    """A value as people read it: a line per entry of a mapping."""
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()] or ["-"]
    return ["-" if value is None else str(value)]
