"""The rounds of method t2i: images of every class, generated once from pure noise and a prompt.

After generative dataset distillation (Su et al. 2024, arXiv 2408.08610): SDXL-Turbo from a prompt
with the class name, one step (1 to 4), no guidance, at the model's own size, then resized (bicubic,
antialiased) and kept as 8-bit pixels in the coreset. There IPC is generated × augmented: of N
images as they are and V variants of each (methods/variants.py), N · (1 + V).

    RUN/t2i.partial/ROUND.safetensors      images and seconds of a round, until it is written whole

A round is one image of each class; round g has the noise of (seed, sample = class index, epoch =
g), and always the same calls of the engine. So the first images of a class are the same, bit for
bit, however many follow, and an image that a budget paid for can be had again by its number. A
killed run makes none of its rounds again, and they count as what they took. A budget counts the
seconds of the rounds alone, on rank 0's clock: what came before, a model that is loaded or an
engine that is built, is not generation.

Legend: K classes, G images of each, B images of some classes, S side in px of what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from ..run.checkpoint import read_tensors, write_tensors
from ..run.progress import Report
from ..run.settings import settings_by_option
from ..run.world import World
from .method import Made, Making
from .shared import SharedImages
from .source import Expansions, ImageSource, open_expander
from .stored import as_stored, whole_settings


@dataclass(frozen=True)
class Generated:
    """What the model made."""

    images_NHWC: Tensor
    """uint8 [K·G, S, S, 3], class after class, in the order of the rounds; on rank 0's CPU."""
    per_class: int
    """G."""
    seconds: float
    """Of the rounds."""

    def describe(self) -> dict[str, Any]:
        """For the stage's result: how many there are of a class, and how fast they were made."""
        rate = len(self.images_NHWC) / max(self.seconds, 1e-9)
        seconds = round(self.seconds, 3)
        return {"generated": self.per_class, "seconds": seconds, "images_per_s": round(rate, 3)}


class KeptRounds:
    """The rounds that earlier sessions of a run ended, on rank 0's disk."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder, self._config = folder, config

    def read(self) -> list[tuple[Tensor, float]]:
        """The first rounds without a gap, of this config: images, uint8 [K, S, S, 3], and seconds.

        CheckpointError for a file that is damaged.
        """
        found: list[tuple[Tensor, float]] = []
        while (path := self._path(len(found))).is_file():
            tensors, metadata = read_tensors(path)
            if metadata.get("config") != self._config:
                break
            found.append((tensors["images"], tensors["seconds"].item()))
        return found

    def add(self, number: int, images_KSSC: Tensor, seconds: float) -> None:
        """Keep a round; OSError on a full disk."""
        tensors = {"images": images_KSSC, "seconds": torch.tensor(seconds, dtype=torch.float64)}
        write_tensors(self._path(number), tensors, {"config": self._config})

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"


def generate(plan: Plan, folder: Path, world: World, report: Report) -> Generated:
    """Make what the options ask for: a number of images, or as many as a budget allows.

    All ranks of `world` call it and share the calls; `folder` keeps what is done.
    ValueError: a budget in which not one image of each class was made, or networks that overflow.
    """
    with _generator(plan, world) as source:
        return generate_rounds(
            source,
            count=plan.generated,
            budget_s=plan.budget_seconds,
            size_px=plan.image_size,
            together=plan.use["t2i"].batch * world.size,
            kept=KeptRounds(folder, _round_settings(plan)),
            world=world,
            report=report,
        )


def make_generated(making: Making, folder: Path) -> Made:
    """The coreset of `generate`. What names it is the number of images, not what decided that."""
    plan, made = making.plan, generate(making.plan, folder, making.world, making.report)
    return Made(
        images_NHWC=made.images_NHWC,
        settings={
            **whole_settings(plan, "t2i"),
            "ipc": made.per_class * (1 + plan.variants),
            "generated": made.per_class,
            "variants": plan.variants,
        },
        provenance={"generation": {"budget_s": plan.budget_seconds, **made.describe()}},
        told=made.describe(),
    )


def generate_rounds(
    source: ImageSource,
    *,
    count: int | None,
    budget_s: float | None,
    size_px: int,
    together: int,
    kept: KeptRounds,
    world: World,
    report: Report,
) -> Generated:
    """Rounds of `source`, whose samples are the classes: `count`, or what fits into `budget_s`.

    One of the two is None. A budget begins a round when it would end in time, were it as long as
    the last. `together`: images that are held at their full size, a whole number of engine calls.
    Raises as `generate` does.
    """
    classes_K, rounds_KSSC, ended_s = torch.arange(source.samples), list[Tensor](), [0.0]
    found = kept.read() if world.leads else []
    known = world.once(lambda: len(found))
    while world.once(lambda: _goes_on(ended_s, count, budget_s)):
        number, began = len(ended_s) - 1, time.monotonic()
        if number >= known:
            parts = classes_K.split(together)
            images = torch.cat([as_stored(source.render(part, number), size_px) for part in parts])
            seconds = time.monotonic() - began
            if world.leads:
                kept.add(number, images, seconds)
        else:
            images, seconds = found[number] if found else (torch.empty(0), 0.0)
        rounds_KSSC.append(images)
        ended_s.append(ended_s[-1] + seconds)
        _tell(report, ended_s, count, budget_s)
    if not world.leads:
        return Generated(torch.empty(0), len(rounds_KSSC), ended_s[-1])
    images_NSSC = torch.stack(rounds_KSSC, dim=1).flatten(0, 1)
    return Generated(images_NSSC, len(rounds_KSSC), ended_s[-1])


def _goes_on(ended_s: list[float], count: int | None, budget_s: float | None) -> bool:
    if budget_s is None:
        return len(ended_s) - 1 != count
    return len(ended_s) == 1 or _fits_another(ended_s, budget_s)


def _tell(report: Report, ended_s: list[float], count: int | None, budget_s: float | None) -> None:
    made = len(ended_s) - 1
    if budget_s is None:
        report.progress("t2i", made, count or 1, "images per class")
    else:
        note = f"{made} images per class"
        report.progress("t2i", min(ended_s[-1], budget_s), budget_s, "s", note)


def _fits_another(ended_s: list[float], budget_s: float) -> bool:
    """Whether a round like the last would end in the budget; `ended_s` begins with 0."""
    if len(ended_s) == 2 and ended_s[1] > budget_s:
        raise ValueError(
            f"--budget-seconds {budget_s:g}: one image of each class takes {ended_s[1]:.3g} s: "
            "give more seconds, fewer --steps or a smaller --generate-size"
        )
    return 2 * ended_s[-1] - ended_s[-2] <= budget_s


@contextmanager
def _generator(plan: Plan, world: World) -> Iterator[ImageSource]:
    """Images of (class index, round), shared by the ranks. Frees the model at the end."""
    classes_K = torch.arange(len(plan.class_names))
    with open_expander(
        plan.model, plan.use["t2i"], world, labels_N=classes_K, prompts_K=plan.prompts
    ) as expander:
        own = Expansions(expander=expander, labels_N=classes_K, class_ids=plan.train.class_ids)
        yield own if world.size == 1 else SharedImages(own, world)


def _round_settings(plan: Plan) -> dict[str, Any]:
    """All that decides the images of a round."""
    shared = {"--seed": plan.seed, "--image-size": plan.image_size}
    return {**shared, "classes": list(plan.class_names), **_generator_settings(plan)}


def generation_settings(plan: Plan) -> dict[str, Any]:
    """All that decides how many images are generated, and which: for the stage's config."""
    kept = {"--budget-seconds": plan.budget_seconds, "--variants": plan.variants}
    return {**kept, **_generator_settings(plan)}


def _generator_settings(plan: Plan) -> dict[str, Any]:
    return settings_by_option("t2i", plan.describe_generator("t2i"))
