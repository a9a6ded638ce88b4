"""The data that --data names, a folder or the generated set, and one hash of its images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...engine.data.images import ImageSet
from ...export.durable import cache_folder
from ..run.progress import Report
from .shapes import GENERATOR_VERSION, write_shapes


def data_folder(data: str, shapes_per_class: int, report: Report) -> Path:
    """The folder that --data names; `shapes` is generated into the cache on first use."""
    if data != "shapes":
        return Path(data).expanduser()
    folder = cache_folder() / f"shapes-{GENERATOR_VERSION}-{shapes_per_class}"
    val_per_class = max(1, shapes_per_class // 5)
    try:
        if not folder.is_dir():
            report.say(f"data: writing the generated set to {folder}")
        return write_shapes(folder, train_per_class=shapes_per_class, val_per_class=val_per_class)
    except OSError as error:
        if error.errno is None:  # a message of ours
            raise
        raise OSError(
            f"the generated set cannot be written to {folder} ({os.strerror(error.errno)}): set "
            "XDG_CACHE_HOME to a folder that you may write to"
        ) from error


def images_sha256(*sets: ImageSet) -> str:
    """One hash of the relative paths and file sizes of all images; independent of their folder."""
    digest = hashlib.sha256()
    for images in sets:
        for path in images.paths:
            size = os.stat(images.root / path).st_size
            digest.update(f"{images.split}/{path} {size}\n".encode())
    return digest.hexdigest()
