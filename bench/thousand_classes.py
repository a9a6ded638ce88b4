"""A generated set of 1000 classes, for measuring label codecs.

A class is a mosaic of 4 × 4 colours, with 25 classes per family. Classes of a family differ in 4 of
their 16 colours, so a teacher's outputs spread over several classes, as on ImageNet. An image is
its class's mosaic, shifted by up to a quarter of its side, under different light, with noise.
Every image is a function of its split, class and number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from patchbloom.export.durable import replacing
from PIL import Image

CLASSES, SIZE_PX = 1000, 32
IMAGES = {"train": 10, "val": 4}
"""Images per class, by split."""
_FAMILY, _OWN_COLOURS = 25, 4
_GRID = 4


def write_thousand(folder: Path) -> None:
    """Write the set atomically as an image folder of PNGs; keep an existing one."""
    if folder.is_dir():
        return
    with replacing(folder, overwrite=False) as partial:
        for class_ in range(CLASSES):
            mosaic = _mosaic(class_)
            for split, count in IMAGES.items():
                place = partial / split / f"class{class_:04d}"
                place.mkdir(parents=True)
                for number in range(count):
                    image = _image(mosaic, np.random.default_rng((class_, split == "val", number)))
                    Image.fromarray(image).save(place / f"{number}.png")


def _mosaic(class_: int) -> np.ndarray:
    """Colours of a class, float64 [4, 4, 3] in [32, 224]."""
    family, own = divmod(class_, _FAMILY)
    colours = np.random.default_rng(family).uniform(32, 224, (_GRID**2, 3))
    draw = np.random.default_rng((family, 1 + own))
    which = draw.choice(_GRID**2, _OWN_COLOURS, replace=False)
    colours[which] = draw.uniform(32, 224, (_OWN_COLOURS, 3))
    return colours.reshape(_GRID, _GRID, 3)


def _image(mosaic: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    side = SIZE_PX // _GRID
    pixels = mosaic.repeat(side, 0).repeat(side, 1)
    pixels = np.roll(pixels, draw.integers(-side, side + 1, 2), (0, 1))
    light = draw.uniform(0.7, 1.3) * pixels + draw.uniform(-24, 24, 3)
    noisy = light + draw.normal(0, 20, pixels.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)
