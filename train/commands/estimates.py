"""The time that a run will take here: rates measured for seconds, times the work of its plan.

Work is counted in images: training steps of students and teacher, the teacher's labels and scores,
validation, and the model's renderings. Decoding, views and checkpoints are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch.nn.functional import cross_entropy

from ...export.config import EIGHT_BITS
from ...export.models import rest_precision
from ..config import StudentPrecision
from ..methods.registry import METHODS
from ..methods.source import open_expander
from ..networks import adamw, autocast, build_network
from ..plan import Plan
from ..run.world import ALONE

MEASURED_S = 1.0  # after one call to warm up; a slower call is measured once


def teacher_seconds(plan: Plan) -> float:
    """Training the plan's teacher, and its accuracy."""
    config = plan.teacher
    net = (config.network, len(plan.class_names), plan.image_size, config.batch, plan.device)
    learning_s = len(plan.train) * config.epochs * _image_s(*net, "fp32")
    return learning_s + len(plan.val) * _image_s(*net)


def run_seconds(plan: Plan) -> float:
    """Coreset and students of a run of one method, with a teacher that exists and is measured.

    On a CPU each student computes in one thread, as many at a time as there are cores.
    """
    (method,), student, on_cpu = plan.methods, plan.student, plan.device == "cpu"
    takes, model = METHODS[method].takes, METHODS[method].model
    shape = (len(plan.class_names), plan.image_size, student.batch, plan.device)
    learner, asked_s = (student.network, *shape), _image_s(plan.teacher.network, *shape)
    together = min(plan.seeds, torch.get_num_threads()) if on_cpu else 1
    each_s = plan.seeds * _image_s(*learner, student.precision, on_cpu) / together
    each_s += asked_s if student.targets == "soft" else 0.0
    each_s += _rendered_s(plan) if model == "rendered" else 0.0
    scored = 0 if takes is None or method == "random" else len(plan.train)
    if takes == "patches":
        most = plan.recipe.pool_per_class * len(plan.class_names)
        scored = min(scored, most) * plan.recipe.crops
    asked = scored + len(plan.val)
    validated_s = plan.seeds * len(plan.val) * _image_s(*learner)
    return plan.samples * student.epochs * each_s + asked * asked_s + validated_s


@cache
def _image_s(
    network: str,
    classes: int,
    size_px: int,
    batch: int,
    device: str,
    learns: StudentPrecision | None = None,
    one_thread: bool = False,
) -> float:
    """Seconds per image of an answer, or of a training step in precision `learns`."""
    net = build_network(network, classes, size_px).to(device).train(learns is not None)
    optimizer = adamw(net, 1e-3, 0.0)
    shape = (batch, 3, size_px, size_px)
    inputs_BCHW = torch.randn(shape, device=device, dtype=torch.float32)
    labels_B = torch.randint(classes, (batch,), device=device, dtype=torch.int64)

    def call() -> float:
        with autocast(torch.device(device), learns or "fp32"), torch.set_grad_enabled(bool(learns)):
            loss = cross_entropy(net(inputs_BCHW), labels_B)
        if learns:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if one_thread else threads)
    try:
        return _seconds(call) / batch
    finally:
        torch.set_num_threads(threads)


def _rendered_s(plan: Plan) -> float:
    """Seconds per image that the run's own engine expands; it is built if it is not stored.

    As many evaluations from noise alone stand for those of patches, whose encoding is done once,
    and those of the other layers' precision for eight bits, whose engine waits for a coreset.
    """
    use, classes = plan.use[plan.methods[0]], len(plan.class_names)
    evals = use.steps if use.start == "noise" else int(use.steps * use.rho)
    alike = replace(use, start="noise", mixup=False, steps=evals)
    if use.precision in EIGHT_BITS:
        rest = rest_precision(use.precision, plan.device)
        alike = replace(alike, precision=rest, vae_precision="auto")
    labels_N = torch.arange(classes).repeat_interleave(plan.samples // classes)
    with open_expander(
        *(plan.model, alike, ALONE), labels_N=labels_N, prompts_K=plan.prompts
    ) as expander:
        shown_N = torch.arange(min(use.batch, len(labels_N)))
        return _seconds(lambda: float(expander.expand(shown_N, 0).sum())) / len(shown_N)


def _seconds(call: Callable[[], float]) -> float:
    """Mean seconds of a call that waits for the device."""
    call()
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < MEASURED_S:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls
