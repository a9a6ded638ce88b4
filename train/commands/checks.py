"""Checks before anything trains: sizes, networks, images per class, the compiler.

Each raises ValueError, or Unavailable for what the machine lacks: one line that names the option,
what was found and a way out.
"""

from __future__ import annotations

import numpy as np
import torch

from ...engine.data.images import ImageSet
from ...export.machine import cxx_compiler
from ...export.models import ModelSource, Unavailable
from ..config import naming_option
from ..methods.registry import METHODS
from ..networks import build_network
from ..options import RunOptions


def check_compiler() -> None:
    """Raises Unavailable when torch.compile finds no C++ compiler."""
    if cxx_compiler() is None:
        raise Unavailable(
            "--student-compile needs a C++ compiler, and there is none here: install g++, or leave "
            "it out"
        )


def check_network(
    option: str, name: str, classes: int, size_px: int, *, shown_px: int | None = None
) -> None:
    """Build the network for images of `size_px`, and run it on the meta device.

    `shown_px`: side of the images it sees; default: `size_px`. Raises ValueError, naming `option`.
    """
    shown_px = shown_px or size_px
    with naming_option(option, name), torch.device("meta"):
        network = build_network(name, classes, size_px)
    try:
        network(torch.empty(2, 3, shown_px, shown_px, device="meta"))
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["it is made for one size"])[0]
        way_out = "give a larger --image-size" if shown_px == size_px else "give another --scoring"
        raise ValueError(
            f"{option} {name}: cannot take images of {shown_px} px ({reason}): {way_out} or "
            "another network"
        ) from None


def check_sizes(
    options: RunOptions, model: ModelSource | None, image_size: int, factor: int
) -> None:
    """Raises ValueError for a size that the model cannot make, or a fractional patch size."""
    if model is not None:
        generate_size = options.generate_size or model.trained_px()
        sizes_px = {"--image-size": image_size, "--generate-size": generate_size}
        for option in filter(None, (METHODS[method].sized_by for method in options.methods)):
            if sizes_px[option] % model.vae_factor():
                raise ValueError(
                    f"{option} {sizes_px[option]}: expected a multiple of {model.vae_factor()}, "
                    f"by which the VAE of {model.name} makes images smaller"
                )
    if image_size % factor:
        raise ValueError(
            f"--factor {factor}: expected a divisor of the image size, {image_size} px: "
            "patches are image size / factor wide"
        )


def check_images_per_class(
    train: ImageSet, methods: tuple[str, ...], *, ipc: int, factor: int, doped: int
) -> None:
    """Raises ValueError when a class has fewer images than a method takes, or than `doped`."""
    counts = np.bincount(train.labels, minlength=len(train.class_ids))
    fewest = int(counts.argmin())
    found = f"class {train.class_ids[fewest]!r} has {counts[fewest]} training images, but "
    for takes in filter(None, (METHODS[method].takes for method in methods)):
        needed, wanted = takes(ipc, factor)
        if counts[fewest] < needed:
            raise ValueError(f"{found}{wanted}, or more images")
    if counts[fewest] < doped:
        raise ValueError(f"{found}--dope {doped} asks for more: give a smaller one")
