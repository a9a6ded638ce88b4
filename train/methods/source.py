"""Where the images of an epoch come from: one image per (sample, epoch) and method.

RealImages are fresh images of the training split: the ceiling, no distillation. The other sources
are of methods, whose modules say what they show.

Every method renders ipc·r² samples of each class per epoch, so that all give a student the same
number of steps. Legend: N samples in all, P samples asked for, r factor, p patch side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset
from ...engine.data.images import (
    STANDARD_RESIZE_RATIO,
    ImageSet,
    center_boxes,
    stream_crops,
    to_unit,
)
from ...engine.expand.expander import Expander
from ...engine.expand.naming import describe_source, prompts_of
from ...export.models import ModelSource
from ...kernels.mosaic import mosaic
from ...kernels.noise import Draw, uniform, uniform_numpy
from ...kernels.pixels import upsample_patches
from ..run.world import World


class ImageSource(Protocol):
    """Images by (sample, epoch): a pure function, whatever else is rendered and in which order."""

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
        """fp32 [P, 3, H, W] in [-1, 1], on the source's device, in the order asked for."""
        ...

    def describe(self) -> dict[str, Any]:
        """`method`, and all else that names the images; plain JSON without paths."""
        ...


class DealtSource(ImageSource, Protocol):
    """A source whose work can be dealt to several processes."""

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        """Positions in `samples_P`, int64, of the samples that one call of an engine renders.

        Whole calls, rendered alone in this order, are the same calls.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What renders a coreset's images here."""

    device: str
    world: World
    model: ModelSource | None = None
    expand: ExpandConfig | None = None
    """How `model` is used."""


@dataclass(frozen=True, kw_only=True)
class Expansions:
    """Method dace."""

    expander: Expander
    labels_N: Tensor
    class_ids: tuple[str, ...]

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return self.expander.expand(samples_P, epoch)

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(at) for at in self.expander.calls(samples_P)]

    def describe(self) -> dict[str, Any]:
        expander = self.expander
        return {"method": "dace", **describe_source(expander.model, expander.config)}


@contextmanager
def open_expander(
    model: ModelSource | None,
    config: ExpandConfig,
    world: World,
    *,
    patches_NHWC: Tensor | None = None,
    labels_N: Tensor,
    prompts_K: Sequence[str],
) -> Iterator[Expander]:
    """An Expander on every rank, rank 0's first: it builds the engine that the others find.

    Frees the model at the end. ValueError without a model, or as the Expander has it.
    """
    if model is None:
        raise ValueError("expected a model, got none")
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
    """The coreset's patches, expanded by the machine's model. Frees it at the end."""
    if machine.expand is None:
        raise ValueError("method dace: expected how to use its model, got nothing")
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
    """Methods upsample and random, which differ in how the patches were chosen."""

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

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        return one_by_one(samples_P)

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
    """Method rded. Samples s with one s // r² share their r² patches; each has its own order."""

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

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        return one_by_one(samples_P)

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


@dataclass(kw_only=True)
class RealImages:
    """The ceiling: for every (sample, epoch) another image of the class, from all of the split.

    A file is decoded, cut and resized as validation does it. Images are drawn with replacement.
    """

    images: ImageSet
    labels_N: Tensor
    size_px: int
    seed: int
    device: str = "cpu"
    threads: int | None = None
    """Of the decoder; None: all cores."""
    _first_K: np.ndarray = field(init=False, repr=False)
    _count_K: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._count_K = np.bincount(self.images.labels, minlength=len(self.class_ids))
        self._first_K = np.cumsum(self._count_K) - self._count_K

    @property
    def class_ids(self) -> tuple[str, ...]:
        return self.images.class_ids

    @property
    def samples(self) -> int:
        return len(self.labels_N)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        stream = stream_crops(
            self.images,
            self.drawn(samples_P.numpy(), epoch),
            center_boxes(STANDARD_RESIZE_RATIO, self.size_px),
            crops=1,
            size_px=self.size_px,
            batch=min(64, len(samples_P)),
            device=self.device,
            threads=self.threads,
        )
        return to_unit(torch.cat([crops.pixels_BPHWC[:, 0] for crops in stream]))

    def calls(self, samples_P: Tensor) -> Sequence[Tensor]:
        return one_by_one(samples_P)

    def drawn(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Which image of the split each sample is at `epoch`: indices of `images.paths`."""
        u_P = uniform_numpy(self.seed, Draw.CEILING, samples, epoch, 1)[:, 0]
        classes_P = self.labels_N.numpy()[samples]
        within_P = np.floor(u_P.astype(np.float64) * self._count_K[classes_P]).astype(np.int64)
        return self._first_K[classes_P] + within_P

    def describe(self) -> dict[str, Any]:
        described = {"method": "real", "images": len(self.images)}
        return {**described, "seed": self.seed, "size_px": self.size_px}


def one_by_one(samples_P: Tensor) -> Sequence[Tensor]:
    """`ImageSource.calls` where no engine renders: an image has no neighbours."""
    return torch.arange(len(samples_P)).split(1)


def render_all(source: ImageSource, epoch: int, samples: Sequence[int] | Tensor) -> Tensor:
    """Any samples' images on the CPU, for pictures: fp32 [len(samples), 3, H, W] in [-1, 1]."""
    return source.render(torch.as_tensor(samples, dtype=torch.int64), epoch).cpu()
