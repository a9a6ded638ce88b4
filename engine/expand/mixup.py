"""Quantiles of the mixup weight gamma, which turn a uniform draw into gamma (kernels/latents.py).

A draw from Beta(a, a) is gamma = 1 / (1 + e^-s), where s has the density

    f(s) = c (2 cosh(s / 2))^(-2 a)

which is smooth and even, unlike gamma's own, which is infinite at 0 and 1 for a < 1. A trapezoid
rule over s < 0 gives the distribution function in float64, interpolation inverts it, and symmetry
gives the other half. The kernel interpolates linearly between knots: the distribution function of
its draws is exact at the knots, and off by at most 2^-12 between them. For a > 1 the outermost
knots are not 0 and 1 but the values that keep the mean of their intervals: otherwise a narrow
distribution would get tails that reach 0 and 1, and 1.5 times its variance at a = 1000. Knots agree
to 1e-7 on all machines.

Legend: Q knots, at u = 0, 1 / (Q - 1), ..., 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..config import parse_mixup_weight

KNOTS = 4097
GRID_STEPS = 2**17
"""Knots for a = 0.5 are then off by 3e-9; fp32 rounds them by 3e-8."""


def mixup_quantiles(weight: str) -> Tensor | None:
    """Quantiles of --mixup-weight: ascending fp32 [Q] in [0, 1], on the CPU; None: uniform gamma.

    Raises ValueError as parse_mixup_weight does.
    """
    law, value = parse_mixup_weight(weight)
    if law == "fixed":
        return torch.full((2,), value, dtype=torch.float32)
    return None if value == 1 else torch.from_numpy(beta_quantiles(value)).float()


def beta_quantiles(a: float) -> np.ndarray:
    """Quantiles of Beta(a, a), float64 [KNOTS], for a in [LEAST_BETA, MOST_BETA]."""
    # f falls as e^(a s) far from 0, and as e^(-a s² / 4) near 0: to e^-40 of its peak at the end.
    s = np.linspace(-40 / a - 13 / math.sqrt(a), 0, GRID_STEPS + 1)
    odds = np.exp(s)
    density = np.exp(a * (s - 2 * np.log1p(odds) + 2 * math.log(2)))
    below, moment = _integral(density), _integral(density * odds / (1 + odds))
    mass = 2 * below[-1]
    u = np.arange(1, KNOTS // 2) / (KNOTS - 1)
    odds = np.exp(np.interp(u, below / mass, s))
    lower = odds / (1 + odds)
    outermost_mean = np.interp(u[0], below / mass, moment / mass) / u[0]
    first = max(0.0, 2 * outermost_mean - lower[0])
    return np.concatenate(([first], lower, [0.5], 1 - lower[::-1], [1 - first]))


def _integral(values: np.ndarray) -> np.ndarray:
    """The integral from the first point to each, in units of half a step."""
    return np.append(0.0, np.cumsum(values[1:] + values[:-1]))
