"""Checks before anything trains: sizes, networks, images per class, the compiler.

Each raises ValueError, or Unavailable for what the machine lacks: one line that names the option,
what was found and a way out.
"""

from __future__ import annotations

import numpy as np
import torch

from ...engine.builds.needs import check_disk, engine_needs
from ...engine.errors import reason
from ...engine.expand.backends import bundles_of, choose_backend, resolve_device
from ...engine.expand.prompts import check_prompts
from ...engine.expand.schedule import make_schedule
from ...export.bundle import find_bundles
from ...export.config import UNBUILT, EngineSpec
from ...export.machine import cxx_compiler
from ...export.models import ModelSource, Unavailable
from ..config import is_brought, naming_option
from ..methods.registry import METHODS
from ..networks import build_network
from ..plan import Plan
from ..plugins import is_function, load_function
from ..teacher.given import imagenet_columns, load_teacher


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
    """Build the network for images of `size_px`, and run it on the meta device; a function's on
    the CPU, as it may read numbers.

    `shown_px`: side of the images it sees; default: `size_px`. Raises ValueError, naming `option`.
    """
    shown_px = shown_px or size_px
    place = torch.device("cpu" if is_function(name) else "meta")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), naming_option(option, name), place:
        network = build_network(name, classes, size_px)
        try:
            answer = network(torch.zeros(2, 3, shown_px, shown_px, dtype=torch.float32))
        except Exception as error:  # others' networks may raise anything
            why = str(error).split("\n")[0] or "it is made for one size"
            if not isinstance(error, RuntimeError | AssertionError):
                if not is_brought(name):
                    raise
                why = reason(error)
            ways = ("a larger --image-size", "another --scoring")
            raise ValueError(
                f"cannot take images of {shown_px} px ({why}): give {ways[shown_px != size_px]} or "
                "another network"
            ) from None
        found = [*answer.shape] if isinstance(answer, torch.Tensor) else type(answer).__name__
        if found != [2, classes]:
            raise ValueError(f"expected logits [2, {classes}] of two images, got {found}")


def check_plan(plan: Plan) -> None:
    """Raises ValueError for sizes, images, prompts or networks that do not fit, Unavailable for a
    missing compiler or a folder that cannot hold an engine."""
    for method in plan.methods:
        option = METHODS[method].sized_by
        if option is not None and plan.model is not None:
            size_px, factor = plan.use[method].size_px, plan.model.vae_factor()
            if size_px % factor:
                raise ValueError(
                    f"{option} {size_px}: expected a multiple of {factor}, by which the VAE of "
                    f"{plan.model.name} makes images smaller"
                )
    if plan.image_size % plan.factor:
        raise ValueError(
            f"--factor {plan.factor}: expected a divisor of the image size, {plan.image_size} px: "
            "patches are image size / factor wide"
        )
    check_images_per_class(plan)
    if plan.model is not None:
        _check_model(plan, plan.model)
    if plan.student.compile:
        check_compiler()
    source, network, classes = plan.teacher_source, plan.teacher.network, len(plan.class_names)
    if is_function(plan.select):
        with naming_option("--select", plan.select):
            load_function(plan.select)
    if source is not None and is_function(source):
        load_teacher(source, plan.train.class_ids, size_px=plan.image_size, device=plan.device)
    elif source is not None and is_brought(source):
        imagenet_columns(source, plan.train.class_ids)
    check_network("--teacher", network, classes, plan.image_size)
    check_network("--student", plan.student.network, classes, plan.image_size)
    if plan.scoring == "native" and source is None:
        check_network("--teacher", network, classes, plan.image_size, shown_px=plan.patch_px)


def _check_model(plan: Plan, model: ModelSource) -> None:
    check_prompts(model, plan.prompts)
    for use in plan.use.values():
        make_schedule(model.scheduler_config(), steps=use.steps, rho=use.rho, start=use.start)
        spec = EngineSpec(
            size_px=use.size_px,
            batch=use.batch,
            precision=use.precision,
            vae_precision=use.vae_precision,
            device=resolve_device(use.device),
        )
        backend = choose_backend(spec) if use.backend == "auto" else use.backend
        bundles = bundles_of(use)
        if backend not in UNBUILT and not find_bundles(bundles):  # one there may be the one needed
            check_disk(engine_needs(model, spec, backend), bundles)


def check_images_per_class(plan: Plan) -> None:
    """Raises ValueError when a class has fewer images than a method or --dope takes."""
    counts = np.bincount(plan.train.labels, minlength=len(plan.class_names))
    fewest = int(counts.argmin())
    found = f"class {plan.train.class_ids[fewest]!r} has {counts[fewest]} training images, but "
    takes = {METHODS[method].takes for method in plan.methods}
    if "patches" in takes and counts[fewest] < (needed := plan.samples_per_class):
        raise ValueError(
            f"{found}ipc · factor² = {needed} patches are wanted, one of each image: give a "
            "smaller --ipc or --factor, or more images"
        )
    if "images" in takes and counts[fewest] < plan.ipc:
        raise ValueError(
            f"{found}--ipc = {plan.ipc} whole images are wanted: give a smaller one, or more images"
        )
    if counts[fewest] < plan.dope:
        raise ValueError(f"{found}--dope {plan.dope} asks for more: give a smaller one")
