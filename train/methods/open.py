"""Open what renders a method's images: patches, with or without the model, or real images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset
from ...engine.expand import naming
from ...engine.expand.expander import Expander
from ...export.models import ModelSource
from ..plan import Plan
from ..run.world import ALONE, World
from .refresh import Refreshed
from .shared import SharedImages
from .source import (
    DealtSource,
    Expansions,
    ImageSource,
    Mosaics,
    RealImages,
    UpsampledPatches,
)
from .stored import Doped, StoredImages, with_doped

MEASURED_IMAGES = 256


@contextmanager
def open_source(plan: Plan, coreset: Coreset | None, world: World = ALONE) -> Iterator[ImageSource]:
    """The images of a coreset; without one real images, the ceiling. Frees the model at the end.

    The ranks of `world` each open it, rank 0 first: it builds the engine that the others find. They
    share the rendering, so all ask for the same images in the same order.
    """
    with _opened(plan, coreset, world) as own:
        source = own if world.size == 1 else SharedImages(own, world.producing)
        share, seed = plan.refresh, plan.seed
        by_model = coreset is not None and coreset.settings["method"] == "dace"
        source = Refreshed(source, share, seed) if by_model and share < 1 else source
        yield with_doped(source, coreset, plan.device)


@contextmanager
def _opened(plan: Plan, coreset: Coreset | None, world: World) -> Iterator[DealtSource]:
    if coreset is None:
        samples = plan.samples_per_class + plan.doped_samples_per_class
        yield RealImages(
            images=plan.train,
            labels_N=torch.arange(len(plan.class_names)).repeat_interleave(samples),
            size_px=plan.image_size,
            seed=plan.seed,
            device=plan.device,
            threads=world.threads,
        )
        return
    with open_coreset_source(coreset, plan.model, plan.expand, plan.device, world) as source:
        yield source


@contextmanager
def open_coreset_source(
    coreset: Coreset,
    model: ModelSource | None,
    expand: ExpandConfig | None,
    device: str,
    world: World = ALONE,
) -> Iterator[DealtSource]:
    """The images of a coreset's own method; method dace takes a model and how to use it."""
    patches_NHWC, labels_N = coreset.patches(), coreset.labels_N
    settings = coreset.settings
    method = settings["method"]
    if method == "dace":
        if model is None or expand is None:
            raise ValueError("method dace: expected a model and its settings, got none")
        expander = world.in_turn(
            lambda: Expander(
                model,
                expand,
                patches_NHWC=patches_NHWC,
                labels_N=labels_N,
                prompts_K=naming.prompts_of(coreset),
            )
        )
        try:
            yield Expansions(expander=expander, labels_N=labels_N, class_ids=coreset.class_ids)
        finally:
            expander.close()
        return
    patches_NHWC = patches_NHWC.to(device)
    if method == "rded":
        yield Mosaics(
            patches_NHWC=patches_NHWC,
            labels_N=labels_N,
            class_ids=coreset.class_ids,
            factor=settings["factor"],
            seed=settings["seed"],
        )
        return
    if method in ("t2i", "dsco"):
        varied = {key: settings[key] for key in ("variants", "seed")} if method == "t2i" else {}
        yield StoredImages(
            method=method,
            images_NHWC=patches_NHWC,
            class_ids=coreset.class_ids,
            samples_per_class=settings["samples_per_class"],
            **varied,
        )
        return
    yield UpsampledPatches(
        method=method,
        patches_NHWC=patches_NHWC,
        labels_N=labels_N,
        class_ids=coreset.class_ids,
        size_px=settings["image_size_px"],
    )


def describe_model(plan: Plan, expand: ExpandConfig) -> dict[str, Any] | None:
    """What of the model names the images, for a manifest; None when nothing runs one.

    `expand` is how it is used: the plan's `expand` or `generate`, or dsco's own.
    """
    if plan.model is None:
        return None
    return naming.describe_model(plan.model, expand, plan.prompt, plan.own_prompts)


def own_part(source: ImageSource) -> ImageSource:
    """What makes images in this process, of a source that keeps some, shares the work, or is doped
    with real ones."""
    while isinstance(source, Doped | Refreshed | SharedImages):
        source = source.source
    return source


def rendering_rate(source: ImageSource) -> float:
    """Images per second, rendered alone and fresh, after one rendering that is not counted."""
    source = own_part(source)
    samples_P = torch.arange(min(source.samples, MEASURED_IMAGES))
    source.render(samples_P, 0)
    _wait_for_gpu()
    began = time.perf_counter()
    source.render(samples_P, 0)
    _wait_for_gpu()
    return len(samples_P) / (time.perf_counter() - began)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
