"""10^7 numbers of ``kernels/noise.py`` are normal and uncorrelated, on the CPU.

Every bound is five standard errors, or p < 0.001, at a fixed seed, so no result is random. A Philox
cut to two rounds must fail the same checks.
"""

import math
from functools import partial

import pytest
import torch
from patchbloom.kernels import noise
from patchbloom.kernels.noise import Draw, normal, philox_reference

SAMPLES, ELEMENTS = 1000, 10_004
NEIGHBOURS = ["element", "pair", "lane", "group", "draw", "sample", "epoch", "seed"]


def _normals(*, seed: int = 5, draw: int = 100, first: int = 0, epoch: int = 6) -> torch.Tensor:
    return normal(seed, draw, torch.arange(first, first + SAMPLES), epoch, (ELEMENTS,))


def _neighbours(axis: str, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and their neighbours: some elements away in a sample, or one step along `axis`.

    Lanes of a Philox counter are 1 (cos, sin), 2 and 3 elements apart; counters are 4 apart.
    """
    lags = {"element": 1, "pair": 2, "lane": 3, "group": 4}
    if axis in lags:
        return base[:, : -lags[axis]], base[:, lags[axis] :]
    other = {"draw": {"draw": 101}, "sample": {"first": 1}, "epoch": {"epoch": 7}}
    return base, _normals(**other.get(axis, {"seed": 6}))


def _correlations(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Correlations of the numbers and of their squares, in standard errors."""
    root = math.sqrt(first.numel())
    plain = (first * second).mean().item() * root
    squares = ((first**2 - 1) * (second**2 - 1)).mean().item() / 2 * root
    return plain, squares


def _moments(values: torch.Tensor) -> list[float]:
    """Deviations of the first four moments from the normal's, in standard errors."""
    moments, root, power = [], math.sqrt(values.numel()), torch.ones((), dtype=torch.float64)
    for moment, variance in ((0, 1), (1, 2), (0, 15), (3, 96)):
        power = power * values.double()
        moments.append((power.mean().item() - moment) / math.sqrt(variance) * root)
    return moments


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    values = _normals()
    assert values.numel() >= 10**7
    return values


def test_moments_to_the_fourth_order(base: torch.Tensor) -> None:
    assert max(map(abs, _moments(base.flatten()))) < 5


def test_half_is_the_rounded_number_and_as_normal(base: torch.Tensor) -> None:
    half = normal(5, 100, torch.arange(SAMPLES), 6, (ELEMENTS,), dtype=torch.float16)
    assert torch.equal(half, base.half())
    assert max(map(abs, _moments(half.flatten()))) < 5


def test_kolmogorov_smirnov_against_the_normal(base: torch.Tensor) -> None:
    ordered, count = base.flatten().sort().values.double(), base.numel()
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2.0))
    ranks = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum(cdf - ranks / count, (ranks + 1) / count - cdf).max().item()
    assert distance * math.sqrt(count) < 1.95, "p < 0.001"


@pytest.mark.parametrize("axis", NEIGHBOURS)
def test_neighbours_in_every_part_of_the_name_are_uncorrelated(
    axis: str, base: torch.Tensor
) -> None:
    assert max(map(abs, _correlations(*_neighbours(axis, base)))) < 5


def test_two_rounds_of_philox_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks detect bad noise: elements of a sample are correlated, or moments wrong."""
    monkeypatch.setattr(noise, "philox_reference", partial(philox_reference, rounds=2))
    weak = _normals(draw=Draw.START, epoch=0)
    worst = [max(map(abs, _correlations(*_neighbours(axis, weak)))) for axis in NEIGHBOURS[:4]]
    assert max(*worst, *map(abs, _moments(weak.flatten()))) > 20
