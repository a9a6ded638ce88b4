"""Options of bench_scale.py, and the requests that it sends to scale_points.py, point by point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from patchbloom.export.config import DeviceName, Weights

Part = Literal["expansion", "coreset", "scoring", "labels", "ranks"]
Point = dict[str, Any]
PARTS: tuple[Part, ...] = ("expansion", "coreset", "scoring", "labels", "ranks")
AXES = {
    "expansion": "batch",
    "coreset": "classes",
    "scoring": "images",
    "labels": "epochs",
    "ranks": "world",
}
CROPS = 5
"""Crops per image in scoring."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How cost grows."""

    parts: tuple[Part, ...] = PARTS
    """Parts to run."""
    quick: bool = False
    """Few and small points, overriding the counts below."""
    data: Path | None = None
    """For scoring: an ImageFolder with train/, or a plain one. Default: generated images of 64 px,
    whose rate says nothing about ImageNet. If it has fewer images than a point, they are listed
    repeatedly, and the row says so."""
    model: str = "sdxl-tiny"
    """Name or folder of a model; also for labels and ranks."""
    weights: Weights = "pretrained"
    """`random`, for expansion and coreset: the architecture only."""
    backend: str = "eager"
    """Backend of the expander and of labels: eager, ort, inductor or trt; append -bf16, -fp16 or
    -fp32 for another precision than the device's usual one (fp32 on the CPU, fp16 on a GPU)."""
    device: DeviceName = "auto"
    """`auto`: cuda if available; ranks are measured on the CPU."""
    size: int = 64
    """Image size in px; patches and crops are half as large."""
    batches: tuple[int, ...] = (1, 4, 16, 32, 64)
    classes: tuple[int, ...] = (10, 1000, 10_000)
    cached_prompts: int = 64
    """Prompts whose keys and values fit the cache in the part coreset."""
    images: tuple[int, ...] = (1000, 3000, 9000)
    epochs: tuple[int, ...] = (1, 8, 64)
    worlds: tuple[int, ...] = (1, 2)
    teacher: str = "convnet-d3-w8"
    """Teacher network: untrained for scoring, trained for one epoch for labels and ranks."""
    expanded: int = 128
    """Images per timed pass of expansion and coreset."""
    shapes_per_class: int = 100
    """Generated training images per class, for labels and ranks."""
    threads: int = 2
    """Threads per process; ranks have one each."""
    rounds: int = 5
    """Timed rounds of expansion, coreset, scoring and labels; ranks are timed once."""
    json: bool = False
    """Print every row as one line."""
    record: bool = True
    """Append the rows to bench/results/."""

    def sized(self) -> Options:
        """These options, or their quick form."""
        if not self.quick:
            return self
        return replace(
            self,
            batches=(1, 8),
            classes=(10, 200),
            images=(100, 300),
            epochs=(1, 2),
            worlds=(1, 2),
            expanded=32,
            shapes_per_class=20,
            rounds=1,
        )


def settings_of(options: Options, part: str) -> dict[str, Any]:
    """Settings that the points of a part share, for its row; only those that apply to the part.

    The backend's name includes its precision.
    """
    drawn = {"data": "generated", "generated": True, "threads": options.threads}
    given = {
        "data": "generated" if options.data is None else options.data.name,
        "generated": options.data is None,
    }
    made = {"model": options.model, "weights": options.weights, "size_px": options.size} | {
        "backend": options.backend,
        "precision": options.backend.partition("-")[2],
        "expanded": options.expanded,
        "rounds": options.rounds,
    }
    trained = {
        "teacher": options.teacher,
        "shapes_per_class": options.shapes_per_class,
        "weights": "pretrained",
    }
    if part == "expansion":
        return made | drawn
    if part == "coreset":
        return made | drawn | {"cached_prompts": options.cached_prompts}
    if part == "scoring":
        scored = {"size_px": options.size, "teacher": options.teacher, "crops": CROPS}
        return scored | drawn | given | {"rounds": options.rounds}
    labelled = {key: made[key] for key in ("model", "size_px", "backend", "precision", "rounds")}
    if part == "labels":
        return labelled | trained | drawn
    alone = {"backend": "eager", "precision": "fp32", "threads": 1, "rounds": 1}
    return labelled | trained | drawn | alone | {"epochs": options.epochs[-1]}


def points_of(options: Options, part: str, device: str) -> list[Point]:
    """Arguments of each child process; the backend's name includes its precision."""
    expander = {
        "model": options.model,
        "weights": options.weights,
        "backend": options.backend,
        "device": device,
        "size_px": options.size,
    }
    shared = {"expander": expander, "images": options.expanded, "rounds": options.rounds}
    if part == "expansion":
        return [shared | {"classes": 10, "batch": batch} for batch in options.batches]
    if part == "coreset":
        room = {"batch": 32, "cached_prompts": options.cached_prompts}
        return [shared | room | {"classes": count} for count in options.classes]
    if part == "scoring":
        asked = {
            "data": options.data and str(options.data.expanduser()),
            "size_px": options.size,
            "crops": CROPS,
            "batch": 64,
            "teacher": options.teacher,
            "device": device,
            "threads": options.threads,
            "rounds": options.rounds,
        }
        return [asked | {"images": count} for count in options.images]
    asked = {
        "model": options.model,
        "backend": options.backend,
        "size_px": options.size,
        "teacher": options.teacher,
        "device": device,
        "shapes_per_class": options.shapes_per_class,
        "rounds": options.rounds,
    }
    return [asked | {"epochs": count} for count in options.epochs]
