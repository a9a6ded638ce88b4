"""Codec pca's basis: the variance it keeps, its error, and codes that no batch size changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patchbloom.engine.labels.basis import (
    HEADROOM,
    MOST_CODE,
    ROWS,
    decode_in_basis,
    encode_in_basis,
    fit_basis,
    share_kept,
    spread_out,
)


def answers(count: int, classes: int, rank: int, seed: int = 0, scale: float = 5.0) -> torch.Tensor:
    """fp16 logits [count, classes]: a mean plus `rank` directions of decreasing variance."""
    draw = torch.Generator().manual_seed(seed)
    weights = scale * torch.randn(count, rank, generator=draw) / torch.arange(1, rank + 1)
    directions = torch.linalg.qr(torch.randn(classes, rank, generator=draw)).Q.T
    return (weights @ directions + torch.randn(classes, generator=draw)).half()


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits.double() - logits.double().mean(1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(2, 40),
    scale=st.sampled_from([0.0, 0.1, 30.0]),
    offset=st.sampled_from([0.0, -500.0]),
    seed=st.integers(0, 99),
)
def test_all_components_give_an_answer_back(
    classes: int, scale: float, offset: float, seed: int
) -> None:
    """Up to a constant added to all logits, and half a quantisation step per component."""
    logits = answers(50, classes, classes - 1, seed, scale) + offset
    basis = fit_basis(logits, classes - 1)
    codes = encode_in_basis(logits, basis)
    assert codes.dtype == torch.int8
    assert basis.dtype == torch.float32
    assert int(codes.min()) >= -MOST_CODE
    decoded = decode_in_basis(codes, basis)
    assert decoded.dtype == torch.float16
    half_steps = basis[1:].double().square().sum(1).sqrt() / 2
    rounding = 2**-11 * float(decoded.abs().max()) * classes**0.5
    error = (decoded.double() - centred(logits)).norm(dim=1)
    assert float(error.max()) <= float(half_steps.norm()) + rounding + 1e-4


@pytest.mark.parametrize("k", [1, 3, 8])
def test_components_are_those_of_largest_variance(k: int) -> None:
    logits = answers(300, 50, 12)
    data = centred(logits) - centred(logits).mean(0)
    rows = fit_basis(logits, k)[1:].double()
    lengths = rows.norm(dim=1)
    directions = rows / lengths[:, None]
    torch.testing.assert_close(directions @ directions.T, torch.eye(k).double(), rtol=0, atol=1e-6)
    variance, vectors = torch.linalg.eigh(data.T @ data)
    overlap = (directions @ vectors.flip(1)[:, :k]).abs()
    torch.testing.assert_close(overlap, torch.eye(k).double(), rtol=0, atol=1e-3)
    kept = (data @ directions.T).square().sum(0)
    torch.testing.assert_close(kept, variance.flip(0)[:k])
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())
    steps = (data @ directions.T).abs().amax(0) / lengths
    torch.testing.assert_close(steps, torch.full((k,), 127 / HEADROOM).double())


def test_answers_that_were_not_fitted_lose_little_and_far_ones_are_clipped() -> None:
    fitted, others = answers(700, 200, 60).split([500, 200])
    basis = fit_basis(fitted, 40)
    decoded = decode_in_basis(encode_in_basis(others, basis), basis).double()
    lost = (decoded - centred(others)).square().sum() / centred(others).square().sum()
    assert float(lost) < 0.02
    far = basis[0] + 1000 * basis[1]
    assert encode_in_basis(far[None], basis)[0].tolist() == [127] + 39 * [0]
    data = centred(others) - basis[0].double()
    kept = 1 - float((decoded - centred(others)).square().sum() / data.square().sum())
    assert share_kept(others, basis) == pytest.approx(kept, abs=1e-4)


def test_answers_of_fewer_directions_than_components() -> None:
    logits = answers(3, 20, 2)
    basis = fit_basis(logits, 10)
    assert not basis[3:].any()
    decoded = decode_in_basis(encode_in_basis(logits, basis), basis)
    torch.testing.assert_close(decoded.double(), centred(logits), rtol=0, atol=0.05)


def test_a_batch_of_any_size_has_the_same_codes_and_logits() -> None:
    logits = answers(2 * ROWS + 7, 1000, 60)
    basis = fit_basis(logits, 40)
    codes = encode_in_basis(logits, basis)
    alone = torch.cat([encode_in_basis(rows, basis) for rows in logits.split(3)])
    assert torch.equal(codes, alone)
    decoded = decode_in_basis(codes, basis)
    assert torch.equal(decoded, torch.cat([decode_in_basis(row, basis) for row in codes.split(1)]))
    assert torch.equal(fit_basis(logits, 40), basis)


def test_logits_at_the_end_of_fp16_stay_finite() -> None:
    logits = torch.full((4, 3), -60000.0).half()
    logits[range(4), [0, 1, 2, 0]] = 60000.0
    basis = fit_basis(logits, 2)
    assert bool(decode_in_basis(encode_in_basis(logits, basis), basis).isfinite().all())


@pytest.mark.parametrize(
    ("have", "most", "rows"), [(7, 3, [0, 2, 4]), (3, 7, [0, 1, 2]), (0, 4, [])]
)
def test_answers_are_taken_evenly(have: int, most: int, rows: list[int]) -> None:
    assert spread_out(torch.arange(have)[:, None], most)[:, 0].tolist() == rows
