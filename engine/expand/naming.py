"""The fields that name the images of a model, as manifests hold them: written here and read here.

`_named` has every field. Three views of it are written, each without what its neighbours say:

    a source's description      who asks for labels of it compares all of it
    `model` of a manifest       beside the coreset's settings, with the prompts
    `generator` in settings     the same for images that were made once, and are stored

`named_model`, `prompts_of` and `expand_config` read them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...export.models import ModelSource, resolve_vae_precision, weights_bytes, weights_sha256
from ..config import ExpandConfig, parse_mixup_weight
from ..coreset.coreset import Coreset
from ..errors import CoresetError
from .prompts import class_prompts
from .schedule import make_schedule

UPSAMPLING = "bicubic"
WHERE_THE_MODEL_LIES = ("model", "revision", "vae")
"""Fields of a source that may differ: the model's identity is its weights_sha256."""
PRECISIONS = ("precision", "vae_precision")
AGAIN = "make the coreset and its labels again with this version of patchbloom"
_BESIDE_THE_SETTINGS = ("timesteps", "upsampling", "size_px", "seed")
_NO_PART_IN_STORED_IMAGES = ("rho", "mixup", "mixup_weight", "posterior", "weights_bytes")
_CONFIGURED = (
    *("start", "steps", "rho", "mixup", "posterior", "conditioning_px"),
    *PRECISIONS,
)
"""Fields of ExpandConfig that every manifest has."""


def _named(model: ModelSource, config: ExpandConfig, **prompts: Any) -> dict[str, Any]:
    """All fields; plain JSON without paths."""
    scheduler = model.scheduler_config()
    schedule = make_schedule(scheduler, steps=config.steps, rho=config.rho, start=config.start)
    return {
        "name": model.name,
        "revision": model.revision,
        "weights_sha256": weights_sha256(model),
        "weights_bytes": weights_bytes(model),
        "vae": model.vae_name or "model's own",
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
        "upsampling": UPSAMPLING,
        "size_px": config.size_px,
        "conditioning_px": config.conditioning_px or config.size_px,
        "seed": config.seed,
        "precision": config.precision,
        "vae_precision": resolve_vae_precision(model, config.precision, config.vae_precision),
    }


def describe_mixup(config: ExpandConfig) -> dict[str, Any]:
    """`mixup`, and `mixup_weight` in one spelling.

    A uniform weight is left out, so that coresets made before there was a choice keep their names.
    """
    mixup = config.mixup and config.start == "image"
    law, value = parse_mixup_weight(config.mixup_weight)
    if not mixup or (law, value) == ("beta", 1):
        return {"mixup": mixup}
    number = str(value).removesuffix(".0")
    return {"mixup": True, "mixup_weight": f"beta:{number}" if law == "beta" else number}


def describe_source(model: ModelSource, config: ExpandConfig) -> dict[str, Any]:
    """The fields that name the images of a source; labels are of these."""
    named = _named(model, config)
    return {"model": named.pop("name"), **_without(named, "weights_bytes")}


def describe_model(
    model: ModelSource, config: ExpandConfig, prompt: str, own_prompts: Mapping[str, str]
) -> dict[str, Any]:
    """`model` of a manifest: `prompt` is the template, `own_prompts` those of classes by id."""
    prompts = {"prompt": prompt, **({"prompts": own_prompts} if own_prompts else {})}
    return _without(_named(model, config, **prompts), *_BESIDE_THE_SETTINGS)


def describe_generator(
    model: ModelSource, config: ExpandConfig, prompt: str, own_prompts: Mapping[str, str]
) -> dict[str, Any]:
    """`generator` in a manifest's settings."""
    described = describe_model(model, config, prompt, own_prompts)
    return {**_without(described, *_NO_PART_IN_STORED_IMAGES), "generate_size": config.size_px}


def named_model(coreset: Coreset) -> dict[str, Any]:
    """The manifest's model; CoresetError for one that does not name the images."""
    named = coreset.manifest["model"] or {}
    required = ("name", "weights_sha256", "prompt", *_CONFIGURED)
    missing = [field for field in required if field not in named]
    if missing:
        raise CoresetError(
            f"{coreset.folder}: expected {missing[0]} in the model of its manifest, got none: "
            f"{AGAIN}"
        )
    return named


def prompts_of(coreset: Coreset) -> tuple[str, ...]:
    """The model's prompt for each class of the coreset."""
    named = coreset.manifest["model"]
    ids, own = coreset.class_ids, named.get("prompts")
    return class_prompts(coreset.class_names, named["prompt"], class_ids=ids, own=own)


def expand_config(
    named: Mapping[str, Any], *, size_px: int, seed: int, **here: Any
) -> ExpandConfig:
    """The settings that a manifest's `model` or `generator` names; `here` are the machine's own.

    `size_px` and `seed` are those of the coreset's settings. What is not named has no part in the
    images, or its default.
    """
    fields = (*_CONFIGURED, "mixup_weight")
    told = {field: named[field] for field in fields if named.get(field) is not None}
    sizes = {"size_px": named.get("generate_size", size_px), "seed": seed}
    return ExpandConfig(**{**sizes, **told, **here})


def _without(named: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {field: value for field, value in named.items() if field not in fields}
