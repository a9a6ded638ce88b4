"""Pictures of a run: the patches, their expansions, and the training curves.

Legend: N pictures of one row, H = W their size in pixels, C = 3.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...engine.coreset.coreset import Coreset
from ...engine.coreset.sheet import contact_sheet, coreset_sheet
from ...engine.data.crops import to_pixels
from ...engine.expand.expander import Expander
from ...export.durable import replace_file
from ...kernels.pixels import upsample_patches
from ..methods.open import own_part
from ..methods.source import Expansions, ImageSource, render_all
from ..teacher.teacher import Teacher
from .gallery import RHOS, SHOWN_EPOCHS, draw_gallery
from .page import PICTURES

MOST_CLASSES = 10  # rows of the coreset's sheet, columns of the others
MOST_PATCHES = 10  # per class in the coreset's sheet


def draw_coreset(run: Path, coreset: Coreset, name: str = "coreset") -> None:
    """Write NAME.png: a row of patches for each of the first classes."""
    _write(run, name, coreset_sheet(coreset, MOST_PATCHES, MOST_CLASSES).save)


def draw_images(
    run: Path,
    method: str,
    source: ImageSource,
    coreset: Coreset | None,
    names: Sequence[str],
    teacher: Teacher,
) -> None:
    """Write rendered-METHOD.png: one sample of each of the first classes, a column each, in three
    epochs (or once, if it is always the same), before it is cropped; and where a model expands
    patches expansions.png and the gallery. `names` are those of all classes."""
    own = own_part(source)
    labels = own.labels_N.tolist()
    shown = sorted(set(labels))[:MOST_CLASSES]
    columns = [names[int(label)] for label in shown]
    samples = [labels.index(label) for label in shown]
    epochs = range(SHOWN_EPOCHS)
    rows = [(f"epoch {epoch}", _pixels(render_all(own, epoch, samples))) for epoch in epochs]
    if all(np.array_equal(rows[0][1], pixels) for _, pixels in rows):
        rows = [("every epoch", rows[0][1])]
    _write(run, f"rendered-{method}", contact_sheet(rows, columns).save)
    if coreset is not None and isinstance(own, Expansions):
        sheet = expansion_sheet(own.expander, coreset.patches(), samples, columns)
        _write(run, "expansions", sheet.save)
        if own.expander.config.start == "image":
            draw_gallery(run, own.expander, coreset, samples, teacher)


def expansion_sheet(
    expander: Expander, patches_NHWC: Tensor, samples: Sequence[int], columns: Sequence[str] = ()
) -> Image.Image:
    """The same patches, a column each: upsampled, at every rho, with mixup, from noise alone.

    Omits a rho whose evaluations round to 0, and all rows that start from the patches when the
    Expander starts from noise.
    """
    config = expander.config
    variants: dict[str, dict[str, Any]] = {}
    if config.start == "image":
        for rho in RHOS:
            if int(config.steps * rho) >= 1:
                variants[f"rho {rho:g}"] = {"rho": rho, "mixup": False}
        mixup = "mixup" if config.mixup_weight == "uniform" else f"mixup {config.mixup_weight}"
        variants[f"rho {config.rho:g}, {mixup}"] = {"mixup": True}
    variants["text only"] = {"start": "noise"}
    patches = upsample_patches(patches_NHWC[list(samples)], config.size_px)
    rows = [("patch", _pixels(patches))]
    for name, changes in variants.items():
        rows.append((name, _pixels(expander.varied(**changes).expand(samples, epoch=0))))
    return contact_sheet(rows, columns)


def _pixels(images_NCHW: Tensor) -> np.ndarray:
    return to_pixels(images_NCHW).cpu().numpy()


def draw_curves(run: Path, panels: Mapping[str, Mapping[str, Iterable[Sequence[float]]]]) -> None:
    """Write curves.png with a panel per entry: {title: {curve: pairs of epoch and value}}."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    _write(run, "curves", partial(figure.savefig, dpi=110, metadata={"Software": None}))


def _write(run: Path, name: str, save: Callable[..., None]) -> None:
    """Write RUN/pictures/NAME.png, whole or not at all."""
    png = io.BytesIO()
    save(png, format="png")
    (run / PICTURES).mkdir(parents=True, exist_ok=True)
    replace_file(run / PICTURES / f"{name}.png", png.getvalue())
