"""--mixup-weight: the accepted values, and the distribution of the drawn weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from patchbloom.engine.config import ExpandConfig, parse_mixup_weight
from patchbloom.engine.expand.mixup import KNOTS, beta_quantiles, mixup_quantiles
from patchbloom.engine.expand.naming import describe_mixup
from patchbloom.kernels.latents import start_state

DRAWS = 200_000


def drawn(weight: str) -> torch.Tensor:
    """Gammas, ascending: a latent of one mixed with the zero that is its class, without noise."""
    samples = torch.arange(DRAWS)
    zeros, ones = torch.zeros_like(samples), torch.ones_like(samples)
    state, _ = start_state(
        torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), zeros, samples, ones, ones,
        seed=5, epoch=2, sigma=0.0, mixup=True, model_scale=1.0,
        quantiles_Q=mixup_quantiles(weight),
    )  # fmt: skip
    return state.flatten().double().sort().values


def distance(gammas: torch.Tensor, below: torch.Tensor) -> float:
    """Kolmogorov-Smirnov statistic; 1.95 is p = 0.001."""
    ranks = torch.arange(len(gammas), dtype=torch.float64) / len(gammas)
    gap = torch.maximum(below - ranks, ranks + 1 / len(gammas) - below).max().item()
    return gap * math.sqrt(len(gammas))


def test_closed_forms_and_symmetry_hold() -> None:
    u = np.arange(KNOTS) / (KNOTS - 1)
    np.testing.assert_allclose(beta_quantiles(1.0), u, atol=1e-8)
    np.testing.assert_allclose(beta_quantiles(0.5), np.sin(np.pi * u / 2) ** 2, atol=1e-8)
    inner = beta_quantiles(3.0)[1:-1]
    np.testing.assert_allclose(6 * inner**5 - 15 * inner**4 + 10 * inner**3, u[1:-1], atol=1e-8)
    for a in (0.001, 0.2, 7.0, 1000.0):
        quantiles = beta_quantiles(a)
        assert np.all(np.diff(quantiles) >= 0)
        np.testing.assert_allclose(quantiles, 1 - quantiles[::-1], rtol=0, atol=1e-15)
        left, right = quantiles[:-1] - 0.5, quantiles[1:] - 0.5
        variance = np.mean(left**2 + left * right + right**2) / 3  # linear between knots
        assert variance * 4 * (2 * a + 1) == pytest.approx(1, abs=1e-4)


def test_drawn_weights_are_betas() -> None:
    laws = {
        "uniform": lambda x: x,
        "beta:0.5": lambda x: x.sqrt().asin() * 2 / math.pi,
        "beta:2": lambda x: 3 * x**2 - 2 * x**3,
    }
    gammas = {weight: drawn(weight) for weight in laws}
    for weight, below in laws.items():
        assert distance(gammas[weight], below(gammas[weight])) < 1.95
        assert all(
            distance(other, below(other)) > 10 for name, other in gammas.items() if name != weight
        )


def test_drawn_weights_follow_torchs_beta() -> None:
    torch.manual_seed(1)
    ours, a = drawn("beta:0.2"), torch.tensor(0.2, dtype=torch.float64)
    theirs = torch.distributions.Beta(a, a).sample((DRAWS,)).sort().values
    # Only the lower half: in the upper, fp32 rounds one in thirty to 1.
    low, others = ours[ours < 0.5], theirs[theirs < 0.5]
    below = torch.searchsorted(others, low).double() / len(others)
    assert distance(low, below) < 1.95 * math.sqrt(2)
    assert len(low) / DRAWS == pytest.approx(0.5, abs=0.005)
    assert (ours - 0.5).square().mean().item() * 4 * 1.4 == pytest.approx(1, abs=0.01)


def test_a_fixed_weight_is_the_same_for_all() -> None:
    for weight in ("0", "0.3", "1"):
        assert torch.equal(drawn(weight).float(), torch.full((DRAWS,), float(weight)))


@pytest.mark.parametrize(
    "weight",
    [*("", "gauss", "-0.1", "1.01", "nan", "beta", "beta:", "beta:0", "beta:-1", "beta:nan"),
     *("beta:inf", "beta:uniform", "0.5:beta", "beta:beta:1")],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(weight: str) -> None:
    with pytest.raises(ValueError, match=r"^--mixup-weight .*: expected uniform, a number from 0"):
        ExpandConfig(size_px=32, mixup_weight=weight)


def test_one_weight_has_one_name() -> None:
    def named(weight: str, **settings: object) -> dict[str, object]:
        return describe_mixup(ExpandConfig(size_px=32, mixup_weight=weight, **settings))  # type: ignore[arg-type]

    assert parse_mixup_weight("uniform") == parse_mixup_weight("beta:1.0") == ("beta", 1)
    assert named("uniform") == named("beta:1") == {"mixup": True}, "as older coresets have it"
    assert named("beta:2.0") == named("beta:2") == {"mixup": True, "mixup_weight": "beta:2"}
    assert named("1e-1") == {"mixup": True, "mixup_weight": "0.1"}
    assert named("-0.0") == named("0") == {"mixup": True, "mixup_weight": "0"}
    assert named("0.1", mixup=False) == named("0.1", start="noise") == {"mixup": False}
    for weight in ("beta:2", "0.1", "0"):
        assert named(str(named(weight)["mixup_weight"])) == named(weight), "it is read again"
