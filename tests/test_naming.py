"""A manifest's entry for a model restores the settings that it was written from."""

from __future__ import annotations

from dataclasses import fields

import pytest
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.naming import (
    describe_generator,
    describe_model,
    describe_source,
    expand_config,
)
from patchbloom.export.models import find_model

MODEL = find_model("sdxl-tiny")
ROLES = {"size_px": 32, "seed": 7, "batch": 4, "backend": "eager", "device": "cpu"}
CONFIGS = {
    "dace": {},
    "sampled": {"posterior": "sample", "conditioning_px": 64, "precision": "bf16", "rho": 1.0},
    "weighted": {"mixup_weight": "beta:0.50", "steps": 3, "vae_precision": "fp32"},
    "fixed": {"mixup_weight": "0.25", "rho": 0.5, "steps": 4},
    "no mixup": {"mixup": False},
    "noise": {"start": "noise", "mixup": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_manifest_gives_back_the_settings(name: str) -> None:
    config = ExpandConfig(**ROLES, **CONFIGS[name])  # type: ignore[arg-type]
    named = describe_model(MODEL, config, "a {name}", {})
    read = expand_config(named, **ROLES)  # type: ignore[arg-type]
    assert describe_source(MODEL, read) == describe_source(MODEL, config)
    spelled = {"mixup_weight", "conditioning_px", "vae_precision"}  # normalised or filled in
    for field in {each.name for each in fields(ExpandConfig)} - spelled:
        assert getattr(read, field) == getattr(config, field), field


def test_what_the_machine_has_otherwise_is_taken_over() -> None:
    named = describe_model(MODEL, ExpandConfig(**ROLES), "a {name}", {"7": "x"})  # type: ignore[arg-type]
    assert named["prompts"] == {"7": "x"}
    read = expand_config(named, size_px=32, seed=7, precision="bf16", vae_precision="auto")
    assert describe_source(MODEL, read)["vae_precision"] == "bf16"


def test_a_generator_gives_back_the_settings() -> None:
    config = ExpandConfig(
        size_px=64, seed=7, steps=2, start="noise", mixup=False, vae_precision="fp32"
    )
    named = describe_generator(MODEL, config, "a {name}", {})
    assert not named.keys() & {"rho", "mixup", "posterior", "seed"}
    read = expand_config(named, size_px=named["generate_size"], seed=7)
    assert describe_source(MODEL, read) == describe_source(MODEL, config)
