"""The manifest's entry of the model that expands a coreset's patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from patchbloom.engine.config import TEMPLATE, ExpandConfig, usual_px
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.engine.expand.naming import describe_model
from patchbloom.export.models import find_model
from patchbloom.train.coreset_options import check_names


def model_entry(
    model: str | Path,
    *,
    size_px: int | None = None,
    prompt: str = TEMPLATE,
    prompts: Mapping[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """`model` of a coreset that one builds by hand, for `write_coreset`; plain JSON without paths.

    It names the images that students see. model: sdxl-tiny, sdxl-turbo, or a folder in diffusers'
    SDXL layout. size_px: side of the images, as `image_size_px` of the settings; default: the
    model's usual one. prompt: the template; prompts replace it, by class id. changes: other fields
    of engine.config.ExpandConfig, as steps, rho, mixup, mixup_weight, start and precision; default
    as `train` on this machine. The settings of such a coreset name the method dace.

    Raises ValueError or OSError, one clear line, for a model, field or value that does not fit.

    >>> entry = patchbloom.model_entry("sdxl-tiny", rho=0.4)
    >>> entry["name"], entry["steps"], entry["evals"]
    ('sdxl-tiny', 5, 2)
    """
    check_names(changes, [field.name for field in fields(ExpandConfig)], "model_entry: field")
    source, on_cuda = find_model(model), resolve_device(changes.get("device", "auto")) == "cuda"
    default = {"size_px": size_px or usual_px(source.trained_px())}
    config = ExpandConfig(**{"precision": "fp16" if on_cuda else "fp32", **default, **changes})
    return describe_model(source, config, prompt, dict(prompts or {}))
