"""Sources of an epoch's images: one image per (sample, epoch).

`RealImages` shows fresh images of the training split: the ceiling, without distillation. The other
sources belong to methods; whole_images.py has that of whole images. All methods render equally many
samples of each class per epoch (Plan.samples_per_class), so all give students the same number of
steps.

Legend: N samples in all, P requested samples, r factor, p patch side, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset
from ...engine.data.crops import stream_center, to_unit
from ...engine.data.images import ImageSet
from ...engine.expand.expander import Expander
from ...engine.expand.naming import describe_source, prompts_of
from ...export.models import ModelSource
from ...kernels.mosaic import mosaic
from ...kernels.noise import Draw, uniform, uniform_numpy
from ...kernels.pixels import upsample_patches
from ..run.world import World


class ImageSource(Protocol):
    """Images as a pure function of (sample, epoch): order and batching change nothing."""

    @property
    def samples(self) -> int:
        """N: images per epoch."""
        ...

    @property
    def labels_N(self) -> Tensor:
        """The class of every sample, int64, ascending, on the CPU."""
        ...

    @property
    def class_ids(self) -> tuple[str, ...]:
        """The classes' folder names, in the order of their indices."""
        ...

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        """fp32 [P, 3, S, S] in [-1, 1], on the source's device, in the requested order."""
        ...

    def describe(self) -> dict[str, Any]:
        """`method` and everything else that names the images; plain JSON without paths."""
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device, model and world that render a coreset's images here."""

    device: str
    world: World
    model: ModelSource | None = None
    """None where the method renders without a model."""
    expand: ExpandConfig | None = None
    """How `model` runs."""


@dataclass(frozen=True, kw_only=True)
class Expansions:
    """Images that the diffusion model makes of patches (dace) or of noise (t2i's rounds)."""

    expander: Expander
    labels_N: Tensor
    class_ids: tuple[str, ...]

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return self.expander.expand(samples_P, epoch)

    def describe(self) -> dict[str, Any]:
        expander = self.expander
        return {"method": "dace", **describe_source(expander.model, expander.config)}


@contextmanager
def open_expander(
    model: ModelSource | None,
    config: ExpandConfig | None,
    world: World,
    *,
    patches_NHWC: Tensor | None = None,
    labels_N: Tensor,
    prompts_K: Sequence[str],
) -> Iterator[Expander]:
    """An Expander on every rank; rank 0 opens first and builds the engine that the others load.

    Frees the model at the end. Raises ValueError without a model, and what Expander raises.
    """
    if model is None or config is None:
        raise ValueError("expected a model and how it runs, got none")
    expander = world.in_turn(
        lambda: Expander(
            model, config, patches_NHWC=patches_NHWC, labels_N=labels_N, prompts_K=prompts_K
        )
    )
    try:
        yield expander
    finally:
        expander.close()


@contextmanager
def open_expansions(coreset: Coreset, machine: Machine) -> Iterator[Expansions]:
    """The coreset's patches, expanded by the machine's model. Frees the model at the end."""
    with open_expander(
        machine.model,
        machine.expand,
        machine.world,
        patches_NHWC=coreset.patches(),
        labels_N=coreset.labels_N,
        prompts_K=prompts_of(coreset),
    ) as expander:
        yield Expansions(expander=expander, labels_N=coreset.labels_N, class_ids=coreset.class_ids)


@dataclass(frozen=True, kw_only=True)
class UpsampledPatches:
    """Enlarged patches: methods upsample and random, which differ in the choice of patches."""

    method: str
    patches_NHWC: Tensor
    """uint8 [N, p, p, 3], on the device to render on."""
    labels_N: Tensor
    class_ids: tuple[str, ...]
    size_px: int

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        patches_PHWC = self.patches_NHWC[samples_P.to(self.patches_NHWC.device)]
        return upsample_patches(patches_PHWC, self.size_px)

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "size_px": self.size_px, "upsampling": "bicubic"}


def open_enlarged(coreset: Coreset, machine: Machine) -> AbstractContextManager[UpsampledPatches]:
    """The coreset's patches, enlarged."""
    return nullcontext(
        UpsampledPatches(
            method=coreset.settings["method"],
            patches_NHWC=coreset.patches().to(machine.device),
            labels_N=coreset.labels_N,
            class_ids=coreset.class_ids,
            size_px=coreset.settings["image_size_px"],
        )
    )


@dataclass(frozen=True, kw_only=True)
class Mosaics:
    """Method rded. Samples s with equal s // r² show the same r² patches, each in its own order."""

    patches_NHWC: Tensor
    """uint8 [N, p, p, 3], on the device to render on; r² neighbours are of one class."""
    labels_N: Tensor
    class_ids: tuple[str, ...]
    factor: int
    seed: int

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        tiles = self.factor**2
        keys_PT = uniform(self.seed, Draw.PATCH_SHUFFLE, samples_P, epoch, tiles)
        first_P = samples_P // tiles * tiles
        rows_PT = first_P[:, None] + torch.argsort(keys_PT, dim=1, stable=True)
        rows_PT = rows_PT.to(self.patches_NHWC.device)
        canvas_PHWC = mosaic(self.patches_NHWC, rows_PT, self.factor)
        return to_unit(canvas_PHWC)

    def describe(self) -> dict[str, Any]:
        size_px = self.factor * self.patches_NHWC.shape[1]
        return {"method": "rded", "factor": self.factor, "seed": self.seed, "size_px": size_px}


def open_mosaics(coreset: Coreset, machine: Machine) -> AbstractContextManager[Mosaics]:
    """Mosaics of the coreset's patches."""
    return nullcontext(
        Mosaics(
            patches_NHWC=coreset.patches().to(machine.device),
            labels_N=coreset.labels_N,
            class_ids=coreset.class_ids,
            factor=coreset.settings["factor"],
            seed=coreset.settings["seed"],
        )
    )


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """The ceiling: every (sample, epoch) shows an image of the class, drawn with replacement."""

    images: ImageSet
    labels_N: Tensor
    size_px: int
    seed: int
    device: str = "cpu"
    threads: int | None = None
    """Threads of the decoder. Default: one per core."""

    @property
    def class_ids(self) -> tuple[str, ...]:
        return self.images.class_ids

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return to_unit(self.pixels(samples_P, epoch))

    def pixels(self, samples_P: Tensor, epoch: int) -> Tensor:
        """The images before `to_unit`: uint8 [P, S, S, 3] on the device."""
        batches = stream_whole(
            self.images,
            self.drawn(samples_P.numpy(), epoch),
            self.size_px,
            self.device,
            batch=min(64, len(samples_P)),
            threads=self.threads,
        )
        return torch.cat([pixels_BSSC for pixels_BSSC, _ in batches])

    def drawn(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """The image that each sample shows at `epoch`: indices of `images.paths`."""
        u_P = uniform_numpy(self.seed, Draw.CEILING, samples, epoch, 1)[:, 0]
        classes_P = self.labels_N.numpy()[samples]
        first_P = np.searchsorted(self.images.labels, classes_P)
        count_P = np.searchsorted(self.images.labels, classes_P, "right") - first_P
        return first_P + np.floor(u_P.astype(np.float64) * count_P).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        described = {"method": "real", "images": len(self.images)}
        return {**described, "seed": self.seed, "size_px": self.size_px}


def stream_whole(
    images: ImageSet,
    positions: np.ndarray,
    size_px: int,
    device: str,
    *,
    batch: int = 64,
    threads: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as validation sees them: uint8 [B, S, S, 3] on `device`, and their positions."""
    stream = stream_center(
        images, positions, size_px=size_px, batch=batch, device=device, threads=threads
    )
    for crops in stream:
        yield crops.pixels_BPHWC[:, 0], crops.index_B


def render_all(source: ImageSource, epoch: int, samples: Sequence[int] | Tensor) -> Tensor:
    """Images of any samples on the CPU, for pictures: fp32 [len(samples), 3, S, S] in [-1, 1]."""
    return source.render(torch.as_tensor(samples, dtype=torch.int64), epoch).cpu()
