"""Open what renders a method's images: patches, with or without the model, or real images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset
from ...engine.expand.expander import Expander
from ...engine.expand.prompts import class_prompts
from ...engine.expand.schedule import make_schedule
from ...export.models import (
    ModelSource,
    resolve_vae_precision,
    weights_bytes,
    weights_sha256,
)
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
        named = coreset.manifest["model"]
        ids, own = coreset.class_ids, named.get("prompts")
        prompts_K = class_prompts(coreset.class_names, named["prompt"], class_ids=ids, own=own)
        expander = world.in_turn(
            lambda: Expander(
                model,
                expand,
                patches_NHWC=patches_NHWC,
                labels_N=labels_N,
                prompts_K=prompts_K,
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
    model = plan.model
    if model is None:
        return None
    schedule = make_schedule(
        model.scheduler_config(), steps=expand.steps, rho=expand.rho, start=expand.start
    )
    from_patch = expand.start == "image"
    return {
        "name": model.name,
        "revision": model.revision,
        "weights_sha256": weights_sha256(model),
        "weights_bytes": weights_bytes(model),
        "vae": model.vae_name or "model's own",
        "scheduler": model.scheduler_config().get("_class_name"),
        "prompt": plan.prompt,
        **({"prompts": plan.own_prompts} if plan.own_prompts else {}),
        "start": expand.start,
        "steps": expand.steps,
        "rho": expand.rho if from_patch else None,
        "evals": schedule.evals,
        "sigmas": list(schedule.sigmas),
        **expand.describe_mixup(),
        "posterior": expand.posterior,
        "conditioning_px": expand.conditioning_px or expand.size_px,
        "precision": expand.precision,
        "vae_precision": resolve_vae_precision(model, expand.precision, expand.vae_precision),
    }


def own_part(source: ImageSource) -> ImageSource:
    """What makes images in this process, of a source that keeps some, shares the work, or is doped
    with real ones."""
    while isinstance(source, Doped | Refreshed | SharedImages):
        source = source.source
    return source
