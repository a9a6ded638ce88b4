"""Coreset of method t2i: images of every class, generated once from pure noise and a prompt.

Generative dataset distillation (Su et al. 2024, arXiv 2408.08610): SDXL-Turbo with a prompt that
holds the class name, 1 to 4 steps, no guidance, at the model's own size; the images are resized
(bicubic, antialiased) and kept as 8-bit pixels. The paper counts generated × augmented images per
class: G images as they are, and V variants of each (variants.py), are G · (1 + V).

    RUN/t2i.partial/ROUND.safetensors      images and seconds of a round, until the coreset exists

A round is one image of each class. Round g uses the noise of (seed, sample = class index, epoch =
g) and always the same engine calls. So the first images of a class are the same, bit for bit,
however many follow, and the number of images that a budget bought gives the same images without a
budget. A resumed run reads its finished rounds, which count the seconds they took. A budget counts
the seconds of rounds alone, on rank 0's clock; loading a model or building an engine is not
generation.

Legend: K classes, G images of each, S side of stored images in pixels.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from ..run.checkpoint import read_tensors, restoring, write_checkpoint
from .method import Made, Making
from .pools import SharedImages
from .source import Expansions, ImageSource, open_expander
from .t2i import round_settings
from .whole_images import as_stored, whole_settings


def make_generated(making: Making, folder: Path) -> Made:
    """Generate as many images as the options name, or as a budget allows; ranks share the calls.

    `folder` keeps finished rounds. The manifest names the number of images, not what decided it.
    Raises ValueError for a budget too small for one image of each class, or networks that overflow.
    """
    plan, world = making.plan, making.world
    classes_K, use = torch.arange(len(plan.class_names)), plan.use["t2i"]
    with open_expander(
        plan.model, use, world, labels_N=classes_K, prompts_K=plan.prompts
    ) as expander:
        own = Expansions(expander=expander, labels_N=classes_K, class_ids=plan.train.class_ids)
        source = own if world.size == 1 else SharedImages(own, world)
        images_NHWC, seconds = generate_rounds(
            making, source, folder, round_settings(plan), together=use.batch * world.size
        )
    described = describe_rounds(images_NHWC, seconds)
    return Made(
        images_NHWC=images_NHWC,
        settings={
            **whole_settings(plan),
            "ipc": len(seconds) * (1 + plan.variants),
            "generator": plan.describe_generator("t2i"),
            "generated": len(seconds),
            "variants": plan.variants,
        },
        provenance={"generation": {"budget_s": plan.budget_seconds, **described}},
        told=described,
    )


def describe_rounds(images_NHWC: Tensor, seconds: list[float]) -> dict[str, Any]:
    """Images per class and the rate, for the stage's result. `seconds`: duration of each round."""
    total_s = sum(seconds)
    rate = len(images_NHWC) / max(total_s, 1e-9)
    described = {"generated": len(seconds), "seconds": round(total_s, 3)}
    return {**described, "images_per_s": round(rate, 3)}


def generate_rounds(
    making: Making, source: ImageSource, folder: Path, config: dict[str, Any], *, together: int
) -> tuple[Tensor, list[float]]:
    """Rounds of `source`, whose samples are the classes: as many as the plan counts or affords.

    A budget starts a round if it would end in time, were it as long as the last. Rank 0 keeps the
    rounds of this `config` in `folder`. `together`: images held at full size, a whole number of
    engine calls.

    Returns the images, uint8 [K·G, S, S, 3], class after class, in order of rounds (empty but on
    rank 0), and the seconds of each round.
    """
    plan, world, report = making.plan, making.world, making.report
    classes_K, rounds_KSSC = torch.arange(source.samples), list[Tensor]()
    seconds: list[float] = []
    found = _kept_rounds(folder, config) if world.leads else []
    known = world.once(lambda: len(found))
    while world.once(lambda: _another(seconds, plan)):
        number, began = len(seconds), time.monotonic()
        if number >= known:
            parts = classes_K.split(together)
            made = [as_stored(source.render(part, number), plan.image_size) for part in parts]
            images = torch.cat(made)
            taken_s = time.monotonic() - began
            if world.leads:
                kept = {"images": images, "seconds": torch.tensor(taken_s, dtype=torch.float64)}
                write_checkpoint(_path(folder, number), kept, {"config": config})
        else:
            images, taken_s = found[number] if found else (torch.empty(0, dtype=torch.float32), 0.0)
        rounds_KSSC.append(images)
        seconds.append(taken_s)
        if (budget_s := plan.budget_seconds) is None:
            report.progress("t2i", len(seconds), plan.generated or 1, "images per class")
        else:
            done_s, note = min(sum(seconds), budget_s), f"{len(seconds)} images per class"
            report.progress("t2i", done_s, budget_s, "s", note)
    every = (
        torch.stack(rounds_KSSC, dim=1).flatten(0, 1)
        if world.leads
        else torch.empty(0, dtype=torch.float32)
    )
    return every, seconds


def _kept_rounds(folder: Path, config: dict[str, Any]) -> list[tuple[Tensor, float]]:
    """Finished rounds of this config, up to the first gap: images, uint8 [K, S, S, 3], and seconds.

    Raises CheckpointError for a damaged file.
    """
    found: list[tuple[Tensor, float]] = []
    while (path := _path(folder, len(found))).is_file():
        tensors, metadata = read_tensors(path)
        if metadata.get("config") != config:
            break
        with restoring(path):
            found.append((tensors["images"], tensors["seconds"].item()))
    return found


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _another(seconds: list[float], plan: Plan) -> bool:
    """Whether another round follows those that took these seconds."""
    budget_s = plan.budget_seconds
    if budget_s is None:
        return len(seconds) != plan.generated
    if len(seconds) == 1 and seconds[0] > budget_s:
        raise ValueError(
            f"--budget-seconds {budget_s:g}: one image of each class takes {seconds[0]:.3g} s: "
            "give more seconds, fewer --steps or a smaller --generate-size"
        )
    return not seconds or sum(seconds) + seconds[-1] <= budget_s
