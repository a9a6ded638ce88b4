"""RUN/pictures/gallery.webp and gallery.json: expansions to look through in the report.

gallery.webp  a row of tiles per variant, a column per sample: first the patches, then for every
              rho without and with mixup SHOWN_EPOCHS epochs each
gallery.json  what the tiles show, in the same order: rho, classes, sources, partners, answers
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...engine.coreset.coreset import Coreset
from ...engine.data.crops import to_pixels
from ...engine.expand.expander import Expander
from ...export.durable import replace_file, replace_json
from ...kernels.noise import Draw, uniform
from ...kernels.pixels import upsample_patches
from ..teacher.teacher import Teacher
from .page import GALLERY, PICTURES

RHOS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN_EPOCHS = 3
MOST_TILE_PX = 96
ANSWERS = 5


def draw_gallery(
    run: Path, expander: Expander, coreset: Coreset, samples: Sequence[int], teacher: Teacher
) -> None:
    """Write the two files; `samples` are numbers of patches. Needs an Expander that takes patches.

    A rho whose evaluations round to 0 is omitted.
    """
    config, names = expander.config, coreset.class_names
    rhos = [rho for rho in RHOS if int(config.steps * rho) >= 1]
    epochs = range(SHOWN_EPOCHS)
    mixed_in = [_partners(coreset, samples, config.seed, epoch) for epoch in epochs]
    rows_NHWC = [upsample_patches(coreset.patches()[list(samples)], config.size_px)]
    partners = []
    for rho in rhos:
        for mixup in (False, True):
            varied = expander.varied(rho=rho, mixup=mixup)
            of_slots = [epoch for epoch in epochs for _ in samples]
            made = varied.expand(list(samples) * SHOWN_EPOCHS, of_slots)
            rows_NHWC += made.chunk(SHOWN_EPOCHS)
            partners += mixed_in if mixup else [None] * SHOWN_EPOCHS
    pixels = [to_pixels(row).cpu().contiguous() for row in rows_NHWC]
    told = {
        "tile_px": _write_tiles(run / PICTURES / f"{GALLERY}.webp", pixels),
        "rhos": rhos,
        "epochs": SHOWN_EPOCHS,
        "shown_rho": min(range(len(rhos)), key=lambda at: abs(rhos[at] - config.rho)),
        "classes": [names[int(coreset.labels_N[sample])] for sample in samples],
        "patches": [_told_patch(coreset, sample) for sample in samples],
        "partners": [None, *partners],
        "answers": [_answers(teacher, row.to(teacher.device), names) for row in pixels],
    }
    replace_json(run / PICTURES / f"{GALLERY}.json", told)


def _partners(coreset: Coreset, samples: Sequence[int], seed: int, epoch: int) -> list[str]:
    """The patches that are mixed in, as the Expander draws them."""
    samples_B, labels_N = torch.tensor(samples, dtype=torch.int64), coreset.labels_N
    u_B = uniform(seed, Draw.MIXUP_PARTNER, samples_B, epoch, 1)[:, 0]
    told = []
    for sample, u in zip(samples, u_B, strict=True):
        members = torch.nonzero(labels_N == labels_N[sample]).flatten()
        offset = min(int(u * len(members)), len(members) - 1)
        told.append(_told_patch(coreset, int(members[offset])))
    return told


def _told_patch(coreset: Coreset, sample: int) -> str:
    """`star/00081.jpg, 47 × 47 px at (16, 0)`, as far as the coreset knows."""
    origins = coreset.manifest.get("provenance", {}).get("patches") or []
    if sample >= len(origins):
        return f"patch {sample}"
    top, left, height, width = origins[sample]["top_left_height_width"]
    return f"{origins[sample]['image']}, {width} × {height} px at ({left}, {top})"


def _answers(teacher: Teacher, pixels_NHWC: Tensor, names: Sequence[str]) -> list[str]:
    """The teacher's likeliest classes for each picture, in percent."""
    shares_NK = teacher.logits_from_uint8(pixels_NHWC).softmax(1).cpu()
    best = shares_NK.topk(min(ANSWERS, len(names)), 1)
    return [
        ", ".join(f"{names[k]} {100 * share:.0f} %" for share, k in zip(*row, strict=True))
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _write_tiles(path: Path, pixels: Sequence[Tensor]) -> int:
    """Write the sheet of tiles; returns their side in px."""
    side = min(MOST_TILE_PX, pixels[0].shape[1])
    sheet = Image.new("RGB", (len(pixels[0]) * side, len(pixels) * side))
    for line, row_NHWC in enumerate(pixels):
        for column, picture_HWC in enumerate(row_NHWC.numpy()):
            tile = Image.fromarray(picture_HWC).resize((side, side), Image.Resampling.BOX)
            sheet.paste(tile, (column * side, line * side))
    webp = io.BytesIO()
    sheet.save(webp, format="webp", quality=85)
    replace_file(path, webp.getvalue())
    return side
