"""Device code shared by dense and top-k soft labels: a row's softmax and its normalisers.

Running values are (maximum, sum of exponentials) of raw logits. Stored normalisers are (maximum,
log of the sum) for a row of logits, and (1 / total, a class's share of the rest) for a row of
codes. Row offsets are int64.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Initial running maximum: below any logit, and finite, because 0 times infinity is NaN."""


@triton.jit
def load_logits(row_ptr, column, CLASSES: tl.constexpr):
    """A row's logits in fp32, -inf beyond its end."""
    return tl.load(row_ptr + column, mask=column < CLASSES, other=-float("inf")).to(tl.float32)


@triton.jit
def softmax_block(logits, inside, top, total, inverse_t):
    """Fold a block into a running (maximum, sum of exponentials).

    Also returns (old - new maximum) / T, and the block's scaled logits (0 outside) with their
    exponentials.
    """
    new_top = tl.maximum(top, tl.max(logits, 0))
    drop = (top - new_top) * inverse_t
    scaled = (logits - new_top) * inverse_t
    power = tl.exp(scaled)
    total = total * tl.exp(drop) + tl.sum(power, 0)
    return new_top, total, drop, tl.where(inside, scaled, 0.0), power


@triton.jit
def p_log_p(p):
    """p ln p, 0 at 0."""
    return p * tl.log(tl.maximum(p, 2e-38))


@triton.jit
def store_normaliser(normalisers_ptr, index, first, second):
    tl.store(normalisers_ptr + 2 * index, first)
    tl.store(normalisers_ptr + 2 * index + 1, second)


@triton.jit
def load_normaliser(normalisers_ptr, index):
    return tl.load(normalisers_ptr + 2 * index), tl.load(normalisers_ptr + 2 * index + 1)


@triton.jit
def probability_block(row_ptr, column, top, log_total, inverse_t, CLASSES: tl.constexpr):
    """softmax(row / T) of a block, from the row's (maximum, log sum)."""
    return tl.exp((load_logits(row_ptr, column, CLASSES) - top) * inverse_t - log_total)
