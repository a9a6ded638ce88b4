"""bench/pictures.py: which errors pass the gate of expansion, and which stop it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
        yield importlib.import_module("pictures")


def errors_of(key: str, same: float, timestep: float, prompt: float) -> dict[str, dict[str, float]]:
    cases = {"same": same, "wrong_timestep": timestep, "wrong_prompt": prompt}
    return {case: {key: error} for case, error in cases.items()}


@pytest.mark.parametrize(
    ("precision", "errors"),
    [
        ("fp32", errors_of("max_abs", 2e-6, 0.3, 0.5)),
        ("bf16", errors_of("psnr_db", 52.3, 43.4, 40.4)),  # random weights, measured
        ("fp16", errors_of("psnr_db", float("inf"), 43.4, 40.4)),
    ],
)
def test_right_pictures_pass(
    pictures: ModuleType, precision: str, errors: dict[str, dict[str, float]]
) -> None:
    pictures.check_errors("eager", errors, precision)


@pytest.mark.parametrize(
    ("precision", "errors", "said"),
    [
        ("fp32", errors_of("max_abs", 2e-4, 0.3, 0.5), "pictures are not diffusers'"),
        ("fp32", errors_of("max_abs", float("nan"), 0.3, 0.5), "pictures are not diffusers'"),
        ("fp32", errors_of("max_abs", 2e-6, 0.3, 9e-5), "wrong prompts or timesteps pass too"),
        ("bf16", errors_of("psnr_db", 39.9, 10.0, 10.0), "at least 40 dB, and 6 dB less"),
        ("bf16", errors_of("psnr_db", float("nan"), 10.0, 10.0), "pictures are not diffusers'"),
        ("bf16", errors_of("psnr_db", 52.3, 46.4, 40.4), "wrong prompts or timesteps pass too"),
        ("fp16", errors_of("psnr_db", *[float("inf")] * 3), "wrong prompts or timesteps pass too"),
    ],
)
def test_other_pictures_and_a_blind_gate_do_not(
    pictures: ModuleType, precision: str, errors: dict[str, dict[str, float]], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        pictures.check_errors("eager", errors, precision)
