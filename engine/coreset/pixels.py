"""The images of a coreset: PNG files, as Pillow writes them at level 9 without metadata.

Legend: N images of one size, H W in pixels, 3 channels (RGB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import CoresetError
from .manifest import file_entry


def read_images(folder: Path, names: Sequence[str], size_px: int) -> Tensor:
    """uint8 [N, size_px, size_px, 3] in 0..255, in the order of the names.

    Raises CoresetError for a file of another size or mode.
    """
    pixels_NHWC = torch.empty((len(names), size_px, size_px, 3), dtype=torch.uint8)
    for row, name in enumerate(names):
        with Image.open(folder / name) as image:
            if image.mode != "RGB" or image.size != (size_px, size_px):
                raise CoresetError(
                    f"{folder / name}: expected an RGB image of {size_px}×{size_px} px, "
                    f"got {image.mode} {image.size[0]}×{image.size[1]}"
                )
            pixels_NHWC[row] = torch.from_numpy(np.array(image))
    return pixels_NHWC


def write_images(
    folder: Path, names: Sequence[str], pixels: Iterator[np.ndarray]
) -> dict[str, Any]:
    """Write the next images, uint8 [H, W, 3], under these names; returns each size and hash."""
    entries = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, next(pixels))
        entries[name] = file_entry(path)
    return entries


def write_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write one image, uint8."""
    with path.open("wb") as stream:
        Image.fromarray(image_HWC).save(stream, "PNG", compress_level=9)
