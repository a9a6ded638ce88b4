"""The data that --data names, a folder or the generated set, and one hash of its images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...engine.data.images import ImageSet
from ..run.progress import Report
from .shapes import GENERATOR_VERSION, write_shapes


def data_folder(data: str, shapes_per_class: int, report: Report) -> Path:
    """The folder that --data names; `shapes` is generated into the cache on first use."""
    if data != "shapes":
        return Path(data).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbloom"
    folder = cache / f"shapes-{GENERATOR_VERSION}-{shapes_per_class}"
    if not folder.is_dir():
        report.say(f"data: writing the generated set to {folder}")
    val_per_class = max(1, shapes_per_class // 5)
    return write_shapes(folder, train_per_class=shapes_per_class, val_per_class=val_per_class)


def images_sha256(*sets: ImageSet) -> str:
    """One hash of the relative paths and file sizes of all images; independent of their folder."""
    digest = hashlib.sha256()
    for images in sets:
        for path in images.paths:
            size = os.stat(images.root / path).st_size
            digest.update(f"{images.split}/{path} {size}\n".encode())
    return digest.hexdigest()
