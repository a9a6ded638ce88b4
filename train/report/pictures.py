"""Pictures of a run: what the patches are, what becomes of them, how the networks learnt.

Legend: N pictures of one row, H = W their size in pixels, C = 3.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...engine.coreset.coreset import Coreset
from ...engine.coreset.sheet import contact_sheet
from ...engine.data.images import to_pixels
from ...engine.expand.expander import Expander
from ...export.durable import replace_file
from ...kernels.pixels import upsample_patches
from ..methods.source import ImageSource, render_all
from .page import PICTURES

RHOS = (0.2, 0.4, 0.6, 0.8, 1.0)
MOST_CLASSES = 10  # rows of the coreset's sheet, columns of the others
SHOWN_EPOCHS = 3
MOST_PATCHES = 10  # of a class in the coreset's sheet


def coreset_sheet(coreset: Coreset) -> Image.Image:
    """A row of patches per class, of the first classes."""
    patches, labels = coreset.patches().numpy(), coreset.labels_N.numpy()
    return contact_sheet(
        [
            (name, patches[labels == index][:MOST_PATCHES])
            for index, name in enumerate(coreset.class_names[:MOST_CLASSES])
        ]
    )


def one_sample_per_class(labels_N: Tensor) -> list[int]:
    """The first sample of each of the first classes."""
    labels = labels_N.tolist()
    return [labels.index(label) for label in sorted(set(labels))[:MOST_CLASSES]]


def expansion_sheet(
    expander: Expander, patches_NHWC: Tensor, samples: Sequence[int]
) -> Image.Image:
    """The same patches, a column each: upsampled, at every rho, with mixup, from noise alone.

    Rows at a rho whose evaluations round to 0 are left out; of an Expander that starts from noise,
    all that would start from the patches.
    """
    size_px, steps = expander.config.size_px, expander.config.steps
    patches = upsample_patches(patches_NHWC[list(samples)], size_px)
    rows = [("patch", _pixels(patches))]
    variants: list[tuple[str, dict[str, Any]]] = []
    if expander.config.start == "image":
        variants += [
            (f"rho {rho:g}", {"rho": rho, "mixup": False}) for rho in RHOS if int(steps * rho) >= 1
        ]
        weight = expander.config.mixup_weight
        mixup = "mixup" if weight == "uniform" else f"mixup {weight}"
        variants.append((f"rho {expander.config.rho:g}, {mixup}", {"mixup": True}))
    variants.append(("text only", {"start": "noise"}))
    for name, changes in variants:
        rows.append((name, _pixels(expander.varied(**changes).expand(samples, epoch=0))))
    return contact_sheet(rows)


def _pixels(images_NCHW: Tensor) -> np.ndarray:
    return to_pixels(images_NCHW).cpu().numpy()


def rendered_sheet(source: ImageSource, samples: Sequence[int]) -> Image.Image:
    """What students see before it is cropped: the same samples, a column each, in three epochs."""
    return contact_sheet(
        [
            (f"epoch {epoch}", _pixels(render_all(source, epoch, samples)))
            for epoch in range(SHOWN_EPOCHS)
        ]
    )


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> bytes:
    """A PNG with a panel per entry: {title: {curve: [(epoch, value), …]}}."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()


def write_picture(run: Path, name: str, picture: Image.Image) -> None:
    """Write RUN/pictures/NAME.png, whole or not at all."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    (run / PICTURES).mkdir(parents=True, exist_ok=True)
    replace_file(run / PICTURES / f"{name}.png", png.getvalue())
