"""Contact sheets: rows of small pictures, each with a name in front.

Legend: N pictures, H and W their size in pixels, C = 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .coreset import Coreset

_GAP_PX, _LINE_PX = 4, 18
_SMALLEST_TILE_PX = 48  # smaller pictures are enlarged by an integer factor
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def coreset_sheet(
    coreset: Coreset, patches_per_class: int, classes: int | None = None
) -> Image.Image:
    """A line per class, with its first patches; `classes` limits the lines."""
    patches, labels = coreset.patches().numpy(), coreset.labels_N.numpy()
    return contact_sheet(
        [
            (name, patches[labels == index][:patches_per_class])
            for index, name in enumerate(coreset.class_names[:classes])
        ]
    )


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str] = ()
) -> Image.Image:
    """One line per (name, pictures uint8 [N, H, W, 3]); all pictures have the same size.

    `columns` are names to write over them, cut to the width of a picture.
    Raises ValueError when there is no picture or the sizes differ.
    """
    shapes = {pictures.shape[1:] for _, pictures in rows}
    longest = max((len(pictures) for _, pictures in rows), default=0)
    if len(shapes) != 1 or longest == 0:
        raise ValueError(f"contact sheet: expected pictures of one size, got {sorted(shapes)}")
    height, width, _ = shapes.pop()
    scale = max(1, -(-_SMALLEST_TILE_PX // height))
    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(size=13)
    names_px = 2 * _GAP_PX + max(int(font.getlength(name)) + 1 for name, _ in rows)
    first_px = _GAP_PX + (_LINE_PX if columns else 0)
    sheet = Image.new(
        "RGB",
        (
            names_px + longest * (tile_width + _GAP_PX),
            first_px + len(rows) * (tile_height + _GAP_PX),
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        fits = next(n for n in range(len(name), -1, -1) if font.getlength(name[:n]) <= tile_width)
        left = names_px + column * (tile_width + _GAP_PX)
        draw.text((left, _GAP_PX), name[:fits], fill=_INK, font=font)
    for line, (name, pictures) in enumerate(rows):
        top = first_px + line * (tile_height + _GAP_PX)
        draw.text((_GAP_PX, top + tile_height // 2), name, fill=_INK, font=font, anchor="lm")
        for column, picture_HWC in enumerate(pictures):
            tile = Image.fromarray(picture_HWC).resize(
                (tile_width, tile_height), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (names_px + column * (tile_width + _GAP_PX), top))
    return sheet
