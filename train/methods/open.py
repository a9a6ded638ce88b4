"""Open what renders a method's images: patches, with or without the model, or real images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...engine.coreset.coreset import Coreset
from ..plan import Plan
from ..run.world import ALONE, World
from .refresh import Refreshed
from .registry import method_of
from .shared import SharedImages
from .source import ImageSource, Machine, RealImages
from .stored import Doped, with_doped


@contextmanager
def open_source(plan: Plan, coreset: Coreset | None, world: World = ALONE) -> Iterator[ImageSource]:
    """The images of a coreset; without one real images, the ceiling. Frees the model at the end.

    The ranks of `world` each open it, rank 0 first: it builds the engine that the others find. They
    share the rendering, so all ask for the same images in the same order.
    """
    if coreset is None:
        samples = plan.samples_per_class + plan.doped_samples_per_class
        own = RealImages(
            images=plan.train,
            labels_N=torch.arange(len(plan.class_names)).repeat_interleave(samples),
            size_px=plan.image_size,
            seed=plan.seed,
            device=plan.device,
            threads=world.threads,
        )
        yield own if world.size == 1 else SharedImages(own, world.producing)
        return
    machine = Machine(device=plan.device, world=world, model=plan.model, expand=plan.expand)
    with open_coreset_source(coreset, machine, plan.refresh) as source:
        yield source


@contextmanager
def open_coreset_source(
    coreset: Coreset, machine: Machine, refresh: float = 1.0
) -> Iterator[ImageSource]:
    """The images of a coreset; `refresh` is the share that a model renders anew in an epoch."""
    method = method_of(coreset)
    with method.open(coreset, machine) as own:
        shared = machine.world.size > 1
        source = SharedImages(own, machine.world.producing) if shared else own
        if method.model == "rendered" and refresh < 1:
            source = Refreshed(source, refresh, coreset.settings["seed"])
        yield with_doped(source, coreset, machine.device)


def own_part(source: ImageSource) -> ImageSource:
    """What makes images in this process, of a source that keeps some, shares the work, or is doped
    with real ones."""
    while isinstance(source, Doped | Refreshed | SharedImages):
        source = source.source
    return source
