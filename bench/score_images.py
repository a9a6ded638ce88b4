"""Generated JPEGs of ImageNet's usual size, for bench_score.py without photographs.

    python bench/score_images.py FOLDER COUNT

They are pictures of the generated set (train/data/shapes.py), enlarged to 500 × 375 px, with grain
that gives them a photograph's bytes: decoding cost depends on bytes. Standard library, NumPy and
Pillow.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from patchbloom.train.data.shapes import CLASS_NAMES, image
from PIL import Image

WIDTH_PX, HEIGHT_PX = 500, 375
GRAIN, QUALITY = 12.0, 95
"""Standard deviation of the grain, of 255, and JPEG quality; files have 108 kB, like ImageNet's."""


def write_image(folder: Path, number: int) -> int:
    """Write picture `number` into its class's folder below `train/`; its size in bytes."""
    index = number % len(CLASS_NAMES)
    small = Image.fromarray(image(0, "train", index, number))
    large = np.asarray(small.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(number).normal(0, GRAIN, large.shape)
    path = folder / "train" / CLASS_NAMES[index] / f"{number:06d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
    return path.stat().st_size


def write_images(folder: Path, count: int) -> str:
    """Write `count` images as `folder/train/<class>/*.jpg` unless they exist; a line for the log.

    Raises FileExistsError when the folder holds something else.
    """
    recipe = {"count": count, "width_px": WIDTH_PX, "height_px": HEIGHT_PX, "grain": GRAIN}
    card = folder / "score_images.json"
    told = f"generated JPEGs in {folder}: {count}, {WIDTH_PX} × {HEIGHT_PX} px"
    if card.is_file() and json.loads(card.read_text()) == recipe:
        return f"{told}, there already"
    if folder.exists():
        raise FileExistsError(f"{folder} holds something other than {recipe}: remove it")
    building = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        sizes = list(pool.map(write_image, [building] * count, range(count), chunksize=8))
    (building / card.name).write_text(json.dumps(recipe))
    building.rename(folder)
    return f"{told}, {np.mean(sizes) / 1000:.0f} kB each"


if __name__ == "__main__":
    try:
        print(write_images(Path(sys.argv[1]), int(sys.argv[2])))
    except OSError as error:
        sys.exit(f"error: {error}")
