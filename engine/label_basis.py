"""Principal components of a teacher's answers, and the codes of eight bits that stand for them.

An answer is its logits l less their mean over the classes, which no softmax sees. Of fitted ones,

    m          their mean                                                       [K]
    v_j, c_j   the directions of largest variance, orthonormal, and (l - m) · v_j
    s_j        HEADROOM · the largest |c_j| / 127

A basis is m and the k rows s_j v_j; the code of an answer is round(c_j / s_j), kept within ±127,
and it says l' = m + sum_j code_j s_j v_j. The error is what lies outside the k directions, and at
most s_j / 2 in each of them. With k = K - 1 nothing lies outside. (Pearson 1901, Hotelling 1933.)

Legend: M fitted answers, B coded ones, K classes, k components.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CODE = 127
MISSING = -128
"""What a recording holds in place of a code that is not there yet."""
HEADROOM = 1.25
"""An answer may lie so much farther from the mean than any fitted one before it is clipped."""


def fit_basis(logits_MK: Tensor, k: int) -> Tensor:
    """The mean and k scaled principal components of some answers: fp32 [1 + k, K], on the CPU.

    Of finite logits. The same on one machine at one number of threads; a component's largest number
    is positive. Where the answers have fewer directions than k, the rest are zeros.
    """
    centred_MK = _centred(logits_MK)
    mean_K = centred_MK.mean(0)
    _, lengths, rows_JK = torch.linalg.svd(centred_MK - mean_K, full_matrices=False)
    spans = lengths > 1e-9 * centred_MK.norm()
    rows_JK = rows_JK[:k][spans[:k]]
    peaks_J1 = rows_JK.gather(1, rows_JK.abs().argmax(1, keepdim=True))
    rows_JK = rows_JK * peaks_J1.sign()
    reach_J = ((centred_MK - mean_K) @ rows_JK.T).abs().amax(0)
    basis = torch.zeros(1 + k, logits_MK.shape[1], dtype=torch.float64)
    basis[0] = mean_K
    basis[1 : 1 + len(rows_JK)] = rows_JK * (HEADROOM / MOST_CODE * reach_J)[:, None]
    return basis.float()


def encode_in_basis(logits_BK: Tensor, basis: Tensor) -> Tensor:
    """The codes of finite logits: int8 [B, k] in -127..127, on the CPU.

    In fp64, so that what a library does with a batch turns no code.
    """
    mean_K, rows_kK = basis[0].double(), basis[1:].double()
    squared_k = rows_kK.square().sum(1)
    along_Bk = (_centred(logits_BK) - mean_K) @ rows_kK.T
    codes_Bk = along_Bk / squared_k.masked_fill(squared_k == 0, 1.0)
    return codes_Bk.round().clamp(-MOST_CODE, MOST_CODE).to(torch.int8)


def decode_in_basis(codes_Bk: Tensor, basis: Tensor) -> Tensor:
    """The logits that codes say, less their mean over the classes: fp16 [B, K], on their device."""
    rows = basis.to(codes_Bk.device)
    return torch.addmm(rows[0], codes_Bk.float(), rows[1:]).to(torch.float16)


def _centred(logits: Tensor) -> Tensor:
    logits = logits.to("cpu", torch.float64)
    return logits - logits.mean(1, keepdim=True)
