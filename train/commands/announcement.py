"""What is said of a plan before the run begins: its data, large labels, prompts, unseen classes."""

from __future__ import annotations

from ...engine.expand.prompts import unseen_classes
from ...engine.labels.file import LabelLayout
from ..methods.registry import METHODS
from ..plan import Plan
from ..run.progress import Report

LARGE_LABELS_GIB = 1.0  # labels of a method from here on are told before the run


def announce(plan: Plan, report: Report) -> None:
    """Say how much data there is, and what of the plan its user may want to change."""
    classes = len(plan.class_names)
    report.say(
        f"data: {len(plan.train)} training and {len(plan.val)} validation images of "
        f"{classes} classes; {plan.image_size} px, patches of {plan.patch_px} px"
    )
    kept_gib = label_gib(plan)
    stores = plan.labels != "online" and plan.student.targets == "soft"
    if kept_gib >= LARGE_LABELS_GIB and stores:
        smaller = plan.codec.k is None and classes > 1
        report.say(
            f"labels: {plan.codec.name}, {kept_gib:.1f} GiB for each method, and as much again on "
            f"the disk while they are put into the coreset; "
            f"{'--codec pca keeps less, ' if smaller else ''}--labels online keeps none"
        )
    if plan.model is None:
        return
    if plan.own_prompts:
        report.say(
            f"prompts: {len(plan.own_prompts)} of {classes} classes have their own, the others "
            f"{plan.prompt!r}"
        )
    for told in (METHODS[method].announced for method in plan.methods):
        if told is not None:
            report.say(told(plan))
    unseen = unseen_classes(plan.model, plan.class_names)
    if unseen:
        report.say(
            f"warning: {plan.model.name} has never seen {len(unseen)} of the classes, "
            f"first {unseen[0]!r}: its images of them may not help; `train prior` makes a model"
        )


def label_gib(plan: Plan) -> float:
    """GiB of a method's labels as --codec keeps them, of every sample and epoch."""
    classes = len(plan.class_names)
    layout = LabelLayout(
        codec=plan.codec,
        epochs=plan.student.epochs,
        samples=classes * (plan.samples_per_class + plan.doped_samples_per_class),
        classes=classes,
    )
    return layout.bytes / 2**30
