"""Settings of a run's stages under the options that decide them. Torch-free."""

from __future__ import annotations

from typing import Any

OPTION_OF = {
    "teacher.network": "--teacher",
    "teacher.epochs": "--teacher-epochs",
    "teacher.size_px": "--image-size",
    "teacher.seed": "--seed",
    "teacher.device": "--device",
    "student.network": "--student",
    "student.epochs": "--epochs",
    "student.batch": "--batch",
    "student.learning_rate": "--learning-rate",
    "student.final_lr_fraction": "--final-lr-fraction",
    "student.cutmix": "--cutmix",
    "student.weight_decay": "--weight-decay",
    "student.views": "--student-precision",
    "student.precision": "--student-precision",
    "student.compile": "--student-compile",
    "student.targets": "--targets",
    "student.size_px": "--image-size",
    "student.seed": "--seed",
    "student.device": "--device",
    "dsco.name": "--model",
    "dsco.prompt": "--prompt",
    "dsco.prompts": "--prompts",
    "dsco.steps": "--steps",
    "dsco.precision": "--precision",
    "dsco.vae_precision": "--vae-precision",
    "model.name": "--model",
    "model.prompt": "--prompt",
    "model.prompts": "--prompts",
    "model.start": "--start",
    "model.steps": "--steps",
    "model.rho": "--rho",
    "model.mixup": "--mixup",
    "model.mixup_weight": "--mixup-weight",
    "model.precision": "--precision",
    "model.vae_precision": "--vae-precision",
    "t2i.name": "--model",
    "t2i.prompt": "--prompt",
    "t2i.prompts": "--prompts",
    "t2i.steps": "t2i's --steps",
    "t2i.generate_size": "--generate-size",
    "t2i.precision": "--precision",
    "t2i.vae_precision": "--vae-precision",
}
"""Settings that an option decides; the others follow from --recipe and from these."""
LEFT_OUT = {"--mixup-weight": "uniform"}
"""What a setting is where a config leaves it out (naming.describe_mixup)."""


def settings_by_option(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under the option that decides them, or else under `part.name`."""
    return {OPTION_OF.get(f"{part}.{name}", f"{part}.{name}"): v for name, v in settings.items()}
