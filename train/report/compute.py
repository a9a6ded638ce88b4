"""The cost of each method's accuracy, in numbers that any machine shares.

student_samples   views that one student learns from: epochs · samples
teacher_queries   images that the teacher answers: crops scored, or images whose features it
                  gives, plus one answer per view with soft targets; the answers to fit a
                  label codec and to compare candidates are not counted
generator_tflop   10^12 operations of the diffusion model for all images, by their arithmetic:
                  engine/expand/image_work.py; its encoder and prompts are not counted
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...engine.expand.image_work import count_image_work
from ..methods.registry import METHODS
from ..plan import Plan


def method_compute(plan: Plan, method: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """The three numbers of a method; `made`: its evals, its number of images, its settings."""
    views = plan.student.epochs * plan.samples
    answers = views if plan.student.targets == "soft" else 0
    return {
        "student_samples": views,
        "teacher_queries": answers + _looked_at(plan, made["settings"]),
        "generator_tflop": _generator_tflop(plan, method, made),
    }


def _looked_at(plan: Plan, settings: Mapping[str, Any]) -> int:
    if METHODS[settings["method"]].takes == "images":
        return len(plan.train)
    if settings.get("pool_per_class") is None:
        return 0
    counts_K = np.minimum(np.bincount(plan.train.labels), settings["pool_per_class"])
    return settings["crops"] * int(counts_K.sum())


def _generator_tflop(plan: Plan, method: str, made: Mapping[str, Any]) -> float:
    when = METHODS[method].model
    if when is None or plan.model is None:
        return 0.0
    images = made["images"]
    if when == "rendered":
        images = plan.student.epochs * plan.samples * plan.refresh
    size_px = plan.use[method].size_px
    work = count_image_work(plan.model, size_px=size_px, evals=made["evals"])
    return images * work.flops / 1e12
