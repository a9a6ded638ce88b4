"""Principal components of a teacher's answers, and the 8-bit codes that stand for the answers.

An answer is its logits l less their mean over the classes, which no softmax sees. The answers that
a basis is fitted to give

    m          their mean                                                       [K]
    v_j, c_j   the directions of largest variance, orthonormal, and (l - m) · v_j
    s_j        HEADROOM · the largest |c_j| / 127

A basis is m and the k rows s_j v_j. The code of an answer is round(c_j / s_j), clamped to ±127,
and decodes to l' = m + sum_j code_j s_j v_j. The error is the part outside the k directions, and at
most s_j / 2 in each of them. With k = K - 1 nothing lies outside. (Pearson 1901, Hotelling 1933.)

Legend: M fitted answers, B coded ones, R rows at a time, K classes, k components.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CODE = 127
HEADROOM = 1.25
"""Clipping starts at this multiple of the fitted answers' largest distance from the mean."""
ANSWERS_PER_COMPONENT = 32
TESTED = 8
"""One answer in this many is held out of the fit, to measure the basis on it."""
ROWS = 512
"""Answers processed at a time in fp64: 90 MB at 21,841 classes."""


def fitted_answers(k: int) -> int:
    """Number of answers to fit a basis of k components to, as far as there are as many."""
    return k * ANSWERS_PER_COMPONENT


def spread_out(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spread over their order."""
    count = min(most, len(rows))
    return rows[torch.arange(count) * len(rows) // max(count, 1)]


def fit_basis(logits_MK: Tensor, k: int) -> Tensor:
    """The mean and k scaled principal components of finite logits: fp32 [1 + k, K], on the CPU.

    Uses the smaller of the two products of the answers with themselves, [M, M] or [K, K], in fp64.
    Components with less than 1e-12 of the variance, and those beyond the rank of the answers, are
    zeros. Deterministic on one machine at one number of threads; a component's largest number is
    positive.
    """
    data_MK = _centred(logits_MK)
    mean_K = data_MK.mean(0)
    data_MK -= mean_K
    rows_JK = _directions(data_MK, k)
    peaks_J1 = rows_JK.gather(1, rows_JK.abs().argmax(1, keepdim=True))
    rows_JK = rows_JK * peaks_J1.sign()
    reach_J = (data_MK @ rows_JK.T).abs().amax(0)
    basis = torch.zeros(1 + k, logits_MK.shape[1], dtype=torch.float64)
    basis[0] = mean_K
    basis[1 : 1 + len(rows_JK)] = rows_JK * (HEADROOM / MOST_CODE * reach_J)[:, None]
    return basis.float()


def fit_and_test(logits_MK: Tensor, k: int) -> tuple[Tensor, str]:
    """A basis, and a report on answers that it was not fitted to; "" when there are none."""
    tested_M = torch.arange(1, 1 + len(logits_MK)) % TESTED == 0
    basis = fit_basis(logits_MK[~tested_M], k)
    if not bool(tested_M.any()):
        return basis, ""
    kept = share_kept(logits_MK[tested_M], basis)
    return basis, (
        f"{k} components keep {100 * kept:.1f} % of the variance of {int(tested_M.sum())} answers "
        "that they were not fitted to"
    )


def _directions(data_MK: Tensor, k: int) -> Tensor:
    """Orthonormal directions, largest variance first: [J, K], J at most k."""
    answers, classes = data_MK.shape
    product = data_MK @ data_MK.T if answers < classes else data_MK.T @ data_MK
    variances, vectors = torch.linalg.eigh(product)
    held = variances.flip(0)[:k] > 1e-12 * variances.clamp_min(0).sum()
    vectors = vectors.flip(1)[:, :k][:, held]
    rows_JK = vectors.T @ data_MK if answers < classes else vectors.T
    return rows_JK / rows_JK.norm(dim=1, keepdim=True)


def share_kept(logits_BK: Tensor, basis: Tensor) -> float:
    """Share of the answers' variance around the basis's mean that their codes keep, at most 1.

    Clipping counts as loss; the share is negative when the codes are worse than the mean alone.
    """
    data_BK = _centred(logits_BK)
    decoded_BK = decode_in_basis(encode_in_basis(logits_BK, basis), basis).double()
    spread = float((data_BK - basis[0]).square().sum())
    return 1 - float((decoded_BK - data_BK).square().sum()) / spread if spread else 1.0


def encode_in_basis(logits_BK: Tensor, basis: Tensor) -> Tensor:
    """The codes of finite logits: int8 [B, k] in -127..127, on the CPU.

    Computed in fp64, so that no code depends on how a library handles a batch.
    """
    mean_K, rows_kK = basis[0].double(), basis[1:].double()
    squared_k = rows_kK.square().sum(1)
    squared_k.masked_fill_(squared_k == 0, 1.0)
    codes_Bk = torch.empty(len(logits_BK), len(rows_kK), dtype=torch.int8)
    for into, some_RK in zip(codes_Bk.split(ROWS), logits_BK.split(ROWS), strict=True):
        along_Rk = (_centred(some_RK) - mean_K) @ rows_kK.T
        into.copy_((along_Rk / squared_k).round().clamp(-MOST_CODE, MOST_CODE))
    return codes_Bk


def decode_in_basis(codes_Bk: Tensor, basis: Tensor) -> Tensor:
    """Logits of codes, with mean 0 over the classes: fp16 [B, K], on the codes' device.

    Computed in fp64: a row has the same bits in a batch of any size. Clamped to fp16's range.
    """
    basis = basis.to(codes_Bk.device, torch.float64)
    most = torch.finfo(torch.float16).max
    logits_BK = codes_Bk.new_empty(len(codes_Bk), basis.shape[1], dtype=torch.float16)
    for into, some_Rk in zip(logits_BK.split(ROWS), codes_Bk.split(ROWS), strict=True):
        into.copy_(torch.addmm(basis[0], some_Rk.double(), basis[1:]).clamp_(-most, most))
    return logits_BK


def _centred(logits: Tensor) -> Tensor:
    logits = logits.to("cpu", torch.float64)
    return logits - logits.mean(1, keepdim=True)
