"""Errors that the gate of expansion in bench/pictures.py accepts and refuses."""

from __future__ import annotations

from typing import Any

import pictures
import pytest


def errors_of(same: float, timestep: float, prompt: float, max_abs: float = 2e-6) -> dict:
    cases = {"same": same, "wrong_timestep": timestep, "wrong_prompt": prompt}
    return {case: {"relative_l2": error, "max_abs": max_abs} for case, error in cases.items()}


@pytest.mark.parametrize(
    ("precision", "errors"),
    [
        ("fp32", errors_of(1e-6, 0.12, 0.26)),
        ("bf16", errors_of(0.0141, 0.0393, 0.0555)),  # random weights, measured
        ("bf16", errors_of(0.0472, 0.123, 0.220)),  # sdxl-tiny
        ("fp16", errors_of(0.0, 0.12, 0.26)),
    ],
)
def test_right_pictures_pass(precision: str, errors: dict[str, dict[str, float]]) -> None:
    pictures.check_errors("eager", errors, precision)


NAN = float("nan")
NOT_DIFFUSERS, BLIND = "pictures are not diffusers'", "wrong prompts or timesteps pass too"


@pytest.mark.parametrize(
    ("precision", "errors", "said"),
    [
        ("fp32", errors_of(2e-4, 0.3, 0.5), NOT_DIFFUSERS),
        ("fp32", errors_of(1e-6, 0.3, 0.5, max_abs=2e-4), NOT_DIFFUSERS),
        ("fp32", errors_of(NAN, 0.3, 0.5, max_abs=NAN), NOT_DIFFUSERS),
        ("fp32", errors_of(2e-6, 0.3, 9e-5), BLIND),
        ("bf16", errors_of(0.071, 0.5, 0.5), "at most 0.07, of wrong ones 2 times it"),
        ("bf16", errors_of(NAN, 0.5, 0.5), NOT_DIFFUSERS),
        ("bf16", errors_of(0.04, 0.079, 0.5), BLIND),
        ("fp16", errors_of(0.03, 0.5, 0.5), NOT_DIFFUSERS),
        ("fp16", errors_of(0.0, 0.0, 0.0), BLIND),
    ],
)
def test_other_pictures_and_a_blind_gate_do_not(
    precision: str, errors: dict[str, dict[str, float]], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        pictures.check_errors("eager", errors, precision)


def test_the_bound_is_of_the_coarser_side() -> None:
    assert pictures.coarser("fp32", "fp16") == pictures.coarser("fp16", "fp32") == "fp16"
    assert pictures.coarser("bf16", "fp16") == "bf16"


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("compile", ("compile", "fp16", True)),
        ("compile-launched", ("compile", "fp16", False)),
        ("eager-launched-bf16", ("eager", "bf16", False)),
    ],
)
def test_a_name_says_what_is_opened(
    name: str, opened: tuple[str, str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "Expander", lambda _, config, **__: config)
    coreset = pictures.make_coreset(classes=1, patches_per_class=1, side_px=8, seed=0)
    model: Any = None
    config: Any = pictures.open_expander(name, model, coreset, device="cuda", size_px=16)
    assert (config.backend, config.precision, config.cuda_graph) == opened
