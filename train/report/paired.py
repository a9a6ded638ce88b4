"""Test and interval of paired differences that scatter symmetrically about their mean. Torch-free.

Sign-flip test: if nothing differs, d_1 … d_n are as likely with any signs. p is the share of the
2^n choices whose mean is as far from 0 as the one found, so p >= 2 / 2^n.
Interval: the sorted means of the 2^n - 1 non-empty subsets cut the line into 2^n parts that hold
the true difference equally often (Hartigan 1969, Using Subsample Values as Typical Values).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_EXACT = 14  # differences; of more, subsets are drawn at random
TAIL = 0.025  # of a 95 % interval, on each side


def flip_signs(differences: Sequence[float]) -> dict[str, float]:
    """Describe one or more paired differences: mean, low, high, coverage, p, least_p.

    [low, high] holds the true difference with probability `coverage`: from n = 6 on 0.95 or a
    little more, below 1 - 2 / 2^n. `p` is two-sided; no n differences give less than `least_p`.
    """
    d_n, n = np.array(differences, np.float64), len(differences)
    if n <= MOST_EXACT:
        subsets_Sn = np.arange(1, 2**n)[:, None] >> np.arange(n) & 1
    else:
        subsets_Sn = np.random.default_rng(0).integers(0, 2, (2**MOST_EXACT - 1, n))
        subsets_Sn[~subsets_Sn.any(axis=1)] = 1
    sums_S, total = subsets_Sn @ d_n, d_n.sum()
    choices = len(sums_S) + 1  # the empty subset flips no sign
    as_far = 1 + np.count_nonzero(abs(total - 2 * sums_S) > abs(total) - 1e-9)
    means_S = np.sort(sums_S / subsets_Sn.sum(axis=1))
    k = max(1, int(TAIL * choices))
    return {
        "difference": float(d_n.mean()),
        "low": float(means_S[k - 1]),
        "high": float(means_S[-k]),
        "coverage": 1 - 2 * k / choices,
        "p": float(as_far / choices),
        "least_p": (2 if n <= MOST_EXACT else 1) / choices,
    }
