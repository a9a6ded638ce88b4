"""Stage settings, named by the options that decide them. Torch-free."""

from __future__ import annotations

from typing import Any

_SAME_NAME = {
    "teacher": "seed device",
    "student": "epochs batch learning_rate final_lr_fraction weight_decay cutmix targets seed "
    "device",
    "dsco": "prompt prompts steps precision vae_precision",
    "model": "prompt prompts start steps rho mixup mixup_weight precision vae_precision",
    "t2i": "prompt prompts generate_size precision vae_precision",
}
"""Settings whose option has their own name, by part."""
_OTHER_NAME = {
    "teacher.network": "--teacher",
    "teacher.epochs": "--teacher-epochs",
    "teacher.precision": "--teacher-precision",
    "teacher.size_px": "--image-size",
    "student.network": "--student",
    "student.views": "--student-precision",
    "student.precision": "--student-precision",
    "student.compile": "--student-compile",
    "student.size_px": "--image-size",
    "dsco.name": "--model",
    "model.name": "--model",
    "t2i.name": "--model",
    "t2i.steps": "t2i's --steps",
}
LEFT_OUT = {"--mixup-weight": "uniform", "--teacher-precision": "fp32"}
"""Value of a setting that a config omits."""


def settings_by_option(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Name each setting by its option, or `part.name` when no option decides it."""
    options = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAME[part].split()}
    return {
        options.get(name) or _OTHER_NAME.get(f"{part}.{name}", f"{part}.{name}"): value
        for name, value in settings.items()
    }
