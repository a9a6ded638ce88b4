"""The name of a generated image: all settings that decide its pixels, written and read here.

A generated image is a function of its class's patches and prompt, of these fields, and of (sample,
epoch). Manifests record the fields, so that a student elsewhere renders the very images that the
teacher labelled. Three functions write them, each without what is recorded beside them:

    describe_source      labels.settings.source: compared field by field before labels are used
    describe_model       model: with the prompts; size and seed are in the coreset's settings
    describe_generator   settings.generator: the model of images that are stored, not rendered

`named_model`, `prompts_of` and `expand_config` read `model` back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...export.documents import check_fields
from ...export.models import ModelSource, resolve_vae_precision, weights_bytes, weights_sha256
from ..config import ExpandConfig, parse_mixup_weight
from ..coreset.coreset import Coreset
from ..errors import CoresetError
from .prompts import class_prompts
from .schedule import make_schedule

WHERE_THE_MODEL_LIES = ("model", "revision", "vae")
"""Fields of a source that may differ: weights_sha256 identifies the model."""
PRECISIONS = ("precision", "vae_precision")
AGAIN = "make the coreset and its labels again with this version of patchbloom"
CONFIGURED = ("start", "steps", "rho", "mixup", "posterior", "conditioning_px", *PRECISIONS)
"""Fields of ExpandConfig that `model` of every manifest has."""
RECORDED_BESIDE_THE_MODEL = ("timesteps", "upsampling", "size_px", "seed")
UNUSED_BY_STORED_IMAGES = ("rho", "mixup", "mixup_weight", "posterior", "weights_bytes")


def _all_fields(model: ModelSource, config: ExpandConfig, **prompts: Any) -> dict[str, Any]:
    """Every field, as plain JSON without paths."""
    scheduler = model.scheduler_config()
    schedule = make_schedule(scheduler, steps=config.steps, rho=config.rho, start=config.start)
    return {
        "name": model.name,
        "revision": model.revision,
        "weights_sha256": weights_sha256(model),
        "weights_bytes": weights_bytes(model),
        "vae": (model.vae_name or "model's own") + ", tiny decoder" * model.has_tiny_decoder,
        "scheduler": scheduler.get("_class_name"),
        **prompts,
        "start": config.start,
        "steps": config.steps,
        "rho": config.rho if config.start == "image" else None,
        "evals": schedule.evals,
        "timesteps": list(schedule.timesteps),
        "sigmas": list(schedule.sigmas),
        **describe_mixup(config),
        "posterior": config.posterior,
        "upsampling": "bicubic",
        "size_px": config.size_px,
        "conditioning_px": config.conditioning_px or config.size_px,
        "seed": config.seed,
        "precision": config.precision,
        "vae_precision": resolve_vae_precision(model, config.precision, config.vae_precision),
    }


def describe_mixup(config: ExpandConfig) -> dict[str, Any]:
    """`mixup`, and `mixup_weight` in its one spelling ("0.5", "beta:0.2").

    A uniform weight is not written: coresets from before this setting keep their hashes.
    """
    mixup = config.mixup and config.start == "image"
    law, value = parse_mixup_weight(config.mixup_weight)
    if not mixup or (law, value) == ("beta", 1):
        return {"mixup": mixup}
    number = str(value).removesuffix(".0")
    return {"mixup": True, "mixup_weight": f"beta:{number}" if law == "beta" else number}


def describe_source(model: ModelSource, config: ExpandConfig) -> dict[str, Any]:
    """Source of the images that labels belong to: all fields but prompts and `weights_bytes`."""
    fields = _all_fields(model, config)
    return {"model": fields.pop("name"), **_without(fields, "weights_bytes")}


def describe_model(
    model: ModelSource, config: ExpandConfig, prompt: str, own_prompts: Mapping[str, str]
) -> dict[str, Any]:
    """`model` of a manifest. `prompt` is the template; `own_prompts` replace it, by class id."""
    prompts = {"prompt": prompt, **({"prompts": own_prompts} if own_prompts else {})}
    return _without(_all_fields(model, config, **prompts), *RECORDED_BESIDE_THE_MODEL)


def describe_generator(
    model: ModelSource, config: ExpandConfig, prompt: str, own_prompts: Mapping[str, str]
) -> dict[str, Any]:
    """`generator` in a manifest's settings."""
    fields = describe_model(model, config, prompt, own_prompts)
    return {**_without(fields, *UNUSED_BY_STORED_IMAGES), "generate_size": config.size_px}


def named_model(coreset: Coreset) -> dict[str, Any]:
    """`model` of the manifest. Raises CoresetError when it lacks a field that names the images."""
    named = coreset.manifest["model"] or {}
    required = ("name", "weights_sha256", "prompt", *CONFIGURED)
    missing = [field for field in required if field not in named]
    if missing:
        raise CoresetError(
            f"{coreset.folder}: expected {missing[0]} in the model of its manifest, got none: "
            f"{AGAIN}"
        )
    set_fields = {name: value for name, value in named.items() if value is not None}
    check_fields(set_fields, ExpandConfig, f"{coreset.folder}: model", CoresetError, AGAIN)
    return named


def prompts_of(coreset: Coreset) -> tuple[str, ...]:
    """The model's prompt for each class of the coreset."""
    named = coreset.manifest["model"]
    ids, own = coreset.class_ids, named.get("prompts")
    return class_prompts(coreset.class_names, named["prompt"], class_ids=ids, own=own)


def expand_config(
    named: Mapping[str, Any], *, size_px: int, seed: int, **machine: Any
) -> ExpandConfig:
    """The settings that `named` records, with `size_px` and `seed` from the coreset's settings.

    `machine` says where and how it runs, and may replace recorded fields. Fields that are absent or
    null keep their defaults: they have no effect on these images.
    """
    recorded = {
        field: named[field]
        for field in (*CONFIGURED, "mixup_weight")
        if named.get(field) is not None
    }
    return ExpandConfig(**{**recorded, "size_px": size_px, "seed": seed, **machine})


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
