"""Students, views and images of a coreset, rebuilt from its manifest alone.

    settings, model             the images: method, seed, sizes; weights, steps, rho, mixup, …
    labels.settings.source      the images that were labelled; compared with these, key by key
    labels.settings.views       crops, flips, CutMix and its pools
    labels.settings.student     the recipe: network, batch, learning rate, …
    labels                      epochs, temperature, codec

A manifest that lacks a requested part is refused: a label belongs to one view of one image.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from ...engine.builds.cards import card_here, most_per_call
from ...engine.builds.needs import engine_needs
from ...engine.config import ExpandConfig
from ...engine.coreset.coreset import Coreset
from ...engine.errors import CoresetError
from ...engine.expand.backends import require_backend, resolve_device
from ...engine.expand.naming import (
    AGAIN,
    PRECISIONS,
    WHERE_THE_MODEL_LIES,
    expand_config,
    named_model,
)
from ...engine.labels.stored import SoftLabels
from ...export.config import BackendName, DeviceName, EngineSpec
from ...export.documents import check_document, check_fields
from ...export.hashes import forget_hashes
from ...export.models import ModelError, ModelSource, Unavailable, find_model, weights_sha256
from ..batching import CPU_ENGINE_BATCH, engine_batch_for, grouping, together_in_engine
from ..config import RECIPES, Recipe, StudentConfig, pool_size, usual_precision, usual_recipe
from ..coreset_options import RenderOptions
from ..labels.targets import StoredLabels
from ..methods.open import open_coreset_source
from ..methods.registry import method_of
from ..methods.source import ImageSource, Machine
from ..plugins import is_function
from ..run.world import ALONE
from ..teacher.given import load_teacher
from ..teacher.teacher import Teacher


def require_soft_labels(coreset: Coreset) -> SoftLabels:
    """The stored labels. Raises CoresetError when there are none."""
    stored = coreset.soft_labels()
    if stored is None:
        raise CoresetError(
            f"{coreset.folder} holds no soft labels: expected those of `train labels` or of a run "
            "with --labels record; make them where the teacher is, or train students on the "
            f"classes alone with `train student --coreset {shlex.quote(str(coreset.folder))} "
            "--targets hard --out DIR`"
        )
    return stored


def view_config(coreset: Coreset, *, device: DeviceName) -> StudentConfig:
    """The views and pools of the stored labels, for any network and batch.

    Raises CoresetError when the manifest does not describe the views.
    """
    labels = require_soft_labels(coreset)
    views = _views(coreset, labels)
    recipe = labels.settings.get("student", {})
    # batch 1: the recorded pool is kept as it is, already rounded down to whole batches.
    return _config(coreset, labels, {**recipe, **views, "batch": 1, "device": device})


def default_views(coreset: Coreset, *, device: DeviceName) -> StudentConfig:
    """`view_config`, or without stored labels the views of the recipe for images of this size."""
    if coreset.soft_labels() is not None:
        return view_config(coreset, device=device)
    recipe = RECIPES[usual_recipe(coreset.settings["image_size_px"])]
    return unlabelled_config(coreset, recipe, device=resolve_device(device))


def unlabelled_config(
    coreset: Coreset,
    recipe: Recipe,
    *,
    factor: int | None = None,
    network: str | None = None,
    device: DeviceName,
) -> StudentConfig:
    """The recipe, filled in as the run of a coreset without labels would.

    `factor` is that of the run, which only coresets of whole images do not record. Raises
    ValueError for one that cannot be.
    """
    settings, classes = coreset.settings, len(coreset.class_ids)
    size_px = settings["image_size_px"]
    if "samples_per_class" in settings:  # views of whole images
        factor = factor or recipe.factor_for(size_px)
    elif factor is None:
        factor = int(settings["factor"])
    elif factor != settings["factor"]:
        raise ValueError(
            f"--factor {factor}: the patches of {coreset.folder} have factor "
            f"{settings['factor']}: leave it out"
        )
    each = coreset.samples_per_class
    ipc, rest = divmod(each, factor**2)
    if rest:
        raise ValueError(
            f"--factor {factor}: expected one whose square divides {each}, the images of a class "
            f"that students of {coreset.folder} see in an epoch: give the --factor of its run"
        )
    student = recipe.student_for(ipc=ipc, factor=factor, classes=classes, network=network)
    return replace(
        student.at(usual_precision(device)),
        size_px=size_px,
        group=grouping(classes, each + coreset.doped_samples_per_class, student) or 1,
        seed=settings["seed"],
        device=device,
    )


def student_config(coreset: Coreset, *, device: DeviceName, **changes: Any) -> StudentConfig:
    """The recipe of the coreset's own students with `changes`; None changes nothing.

    Raises CoresetError for a manifest without a recipe; ValueError for more epochs than have
    labels, or for a batch that would change the pools from which CutMix draws partners.
    """
    labels = require_soft_labels(coreset)
    views = _views(coreset, labels)
    recipe = labels.settings.get("student")
    if recipe is None:
        raise CoresetError(
            f"{coreset.folder}: expected the students' recipe (network, batch, learning rate, …) "
            f"in labels.settings.student of its manifest, got none: {AGAIN}"
        )
    changes = {name: value for name, value in changes.items() if value is not None}
    epochs, batch = changes.get("epochs", labels.epochs), changes.get("batch", recipe["batch"])
    if epochs > labels.epochs:
        raise ValueError(f"--epochs {epochs}: expected {labels.epochs} at most, which have labels")
    if views["cutmix"] and views["pool"] % batch:
        raise ValueError(
            f"--batch {batch}: expected a divisor of {views['pool']}, the samples among which "
            "CutMix drew the partners that the labels are of"
        )
    kept_pool = {"pool": views["pool"]} if views["cutmix"] and batch != recipe["batch"] else {}
    return _config(coreset, labels, {**views, **recipe, **kept_pool, **changes, "device": device})


def _views(coreset: Coreset, labels: SoftLabels) -> dict[str, Any]:
    views = labels.settings.get("views")
    if views is None or "source" not in labels.settings:
        raise CoresetError(
            f"{coreset.folder}: expected what its labels are of in labels.settings.source and "
            f".views of its manifest, got {sorted(labels.settings) or 'nothing'}: {AGAIN}"
        )
    recipe = labels.settings.get("student", {})
    check_fields({**recipe, **views}, StudentConfig, str(coreset.folder), CoresetError, AGAIN)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in views.items()}


def _config(coreset: Coreset, labels: SoftLabels, settings: dict[str, Any]) -> StudentConfig:
    known = {"epochs": labels.epochs, "temperature": labels.temperature}
    try:
        return StudentConfig(**{**known, **settings})
    except TypeError as error:
        raise CoresetError(
            f"{coreset.folder}: its manifest holds settings of another version of patchbloom "
            f"({error}): {AGAIN}"
        ) from None


def fitting_labels(
    coreset: Coreset, source: ImageSource, config: StudentConfig, options: RenderOptions
) -> StoredLabels:
    """The stored labels. Raises CoresetError unless they belong to these images and views.

    A precision requested in `options` may differ from that of the labelled images.
    """
    asked = PRECISIONS if options.precision or options.vae_precision else ()
    return StoredLabels(
        require_soft_labels(coreset), source, config, but_for=(*WHERE_THE_MODEL_LIES, *asked)
    )


def load_recorded_teacher(coreset: Coreset, spec: str | nn.Module, device: DeviceName) -> Teacher:
    """The teacher that `spec` names, with the architecture and image size in the manifest.

    A module, or a function's, is for images of the coreset's size.
    Need not be the teacher that made the labels. Raises the errors of load_teacher.
    """
    named = coreset.manifest["teacher"] or {}
    network, size_px = named.get("architecture"), coreset.settings["image_size_px"]
    if isinstance(spec, str) and not is_function(spec):
        size_px = named.get("size_px")
    if network is not None and is_function(network):  # a manifest must not choose code to run
        network = None
    return load_teacher(spec, coreset.class_ids, network=network, size_px=size_px, device=device)


def open_recorded_source(
    coreset: Coreset, options: RenderOptions, backend: BackendName, config: StudentConfig
) -> AbstractContextManager[ImageSource]:
    """The images that the manifest names; leaving the context frees the model.

    Raises ModelError when there is no model of that name or it has other weights, Unavailable when
    this machine lacks something.
    """
    if options.verify:
        forget_hashes()
    device = resolve_device(options.device)
    if method_of(coreset).model != "rendered":
        return open_coreset_source(coreset, Machine(device=device, world=ALONE))
    refresh = _recorded_refresh(coreset)
    precision = options.precision or named_model(coreset)["precision"]
    try:
        require_backend(backend, precision, device, options.trt_library)
    except Unavailable as error:
        raise Unavailable(
            f"the images of {coreset.folder} are made in {precision}: {error}; another "
            "--precision makes slightly other images, `train verify` tells how much it matters"
        ) from None
    model = _recorded_model(coreset, options.model)
    expand = _expand_config(coreset, model, options, backend, config, refresh)
    machine = Machine(device=device, world=ALONE, model=model, expand=expand)
    return open_coreset_source(coreset, machine, refresh)


def _recorded_refresh(coreset: Coreset) -> float:
    labels = coreset.manifest["labels"] or {"settings": {}}
    refresh = labels["settings"].get("source", {}).get("refresh", 1.0)
    share = Annotated[float, Field(gt=0, le=1)]
    check_document(refresh, f"{coreset.folder}: refresh", CoresetError, AGAIN, share)
    return refresh


def _recorded_model(coreset: Coreset, given: str | None) -> ModelSource:
    named = named_model(coreset)
    try:
        model = find_model(given or named["name"])
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"{error}; {coreset.folder} was made with its weights, sha256 "
            f"{named['weights_sha256'][:16]}…: give the folder that holds them with --model"
        ) from None
    found = weights_sha256(model)
    if found != named["weights_sha256"]:
        raise ModelError(
            f"model {given or named['name']}: expected the weights that {coreset.folder} was made "
            f"with, sha256 {named['weights_sha256'][:16]}…, got {found[:16]}…: give the folder "
            "that holds those with --model"
        )
    return model


def _expand_config(
    coreset: Coreset,
    model: ModelSource,
    options: RenderOptions,
    backend: BackendName,
    config: StudentConfig,
    refresh: float,
) -> ExpandConfig:
    named, device = named_model(coreset), resolve_device(options.device)
    size_px = coreset.settings["image_size_px"]
    samples = len(coreset.labels_N) + len(coreset.class_ids) * coreset.doped_samples_per_class
    group = None if samples <= pool_size(config) else config.group
    precision = options.precision or named["precision"]
    recorded_vae = named["vae_precision"] if options.precision is None else "auto"
    vae = options.vae_precision or recorded_vae
    networks = {"size_px": size_px, "precision": precision, "vae_precision": vae}
    batch, most = options.engine_batch, CPU_ENGINE_BATCH
    if batch is None and device == "cuda":
        spec = EngineSpec(**networks, device="cuda")
        most = most_per_call(engine_needs(model, spec, "eager"), card_here())
    batch = batch or engine_batch_for(samples, config, refresh, most)
    return expand_config(
        named,
        **networks,
        seed=coreset.settings["seed"],
        batch=batch,
        images_per_prompt=together_in_engine(group, batch, refresh),
        backend=backend,
        trt_library=options.trt_library,
        cuda_graph=options.cuda_graph,
        device=device,
        bundles=options.bundles and options.bundles.expanduser(),
    )
