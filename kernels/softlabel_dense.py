"""Kernels of softlabel.py for dense labels: its formula, over blocks of classes."""

import triton
import triton.language as tl

from .softlabel_device import (
    LOWEST,
    load_logits,
    load_normaliser,
    p_log_p,
    probability_block,
    softmax_block,
    store_normaliser,
)


@triton.jit
def dense_block(
    row_ptr,
    column,
    x,
    x_drop,
    top,
    total,
    gap,
    inverse_t,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Fold a block of a label row into its running (maximum, sum, gap).

    gap / sum is the label's expectation of its own scaled logit minus the student's; when labels
    are mixed, of minus the student's alone.
    """
    logits = load_logits(row_ptr, column, CLASSES)
    inside = column < CLASSES
    new_top, new_total, drop, scaled, power = softmax_block(logits, inside, top, total, inverse_t)
    if MIXED:
        gap = tl.exp(drop) * (gap - total * x_drop) - tl.sum(power * x, 0)
    else:
        gap = tl.exp(drop) * (gap + total * (drop - x_drop)) + tl.sum(power * (scaled - x), 0)
    return new_top, new_total, gap


@triton.jit
def mixed_p_log_p(
    a_ptr,
    b_ptr,
    a_top,
    a_log,
    b_top,
    b_log,
    weight,
    inverse_t,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of p ln p for the mixture of two label rows."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        p = weight * probability_block(a_ptr, column, a_top, a_log, inverse_t, CLASSES)
        p += (1.0 - weight) * probability_block(b_ptr, column, b_top, b_log, inverse_t, CLASSES)
        sums += p_log_p(p)
    return tl.sum(sums, 0)


@triton.jit
def softlabel_dense_kernel(
    loss_ptr,
    normalisers_ptr,
    student_ptr,
    labels_ptr,
    rows_ptr,
    weight_ptr,
    inverse_t,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program b writes the loss of image b and (maximum, log sum) of its student and labels."""
    row = tl.program_id(0).to(tl.int64)
    student = student_ptr + row * CLASSES
    normalisers = normalisers_ptr + row * (6 if MIXED else 4)
    x_top, x_total, a_top, a_total, a_gap = LOWEST, 0.0, LOWEST, 0.0, 0.0
    b_top, b_total, b_gap = LOWEST, 0.0, 0.0
    a, b = row, row
    if MIXED:
        a, b = tl.load(rows_ptr + 2 * row), tl.load(rows_ptr + 2 * row + 1)
    label_a, label_b = labels_ptr + a * CLASSES, labels_ptr + b * CLASSES
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(student, column, CLASSES)
        x_top, x_total, drop, x, _ = softmax_block(x, column < CLASSES, x_top, x_total, inverse_t)
        a_top, a_total, a_gap = dense_block(
            label_a, column, x, drop, a_top, a_total, a_gap, inverse_t, MIXED, CLASSES
        )
        if MIXED:
            b_top, b_total, b_gap = dense_block(
                label_b, column, x, drop, b_top, b_total, b_gap, inverse_t, MIXED, CLASSES
            )
    loss = tl.log(x_total)
    store_normaliser(normalisers, 0, x_top, loss)
    a_log = tl.log(a_total)
    store_normaliser(normalisers, 1, a_top, a_log)
    if MIXED:
        weight = tl.load(weight_ptr + row)
        b_log = tl.log(b_total)
        store_normaliser(normalisers, 2, b_top, b_log)
        loss += weight * (a_gap / a_total) + (1.0 - weight) * (b_gap / b_total)
        loss += mixed_p_log_p(
            label_a, label_b, a_top, a_log, b_top, b_log, weight, inverse_t, CLASSES, BLOCK
        )
    else:
        loss += a_gap / a_total - a_log
    tl.store(loss_ptr + row, loss)


@triton.jit
def softlabel_dense_grad_kernel(
    out_ptr,
    normalisers_ptr,
    student_ptr,
    labels_ptr,
    rows_ptr,
    weight_ptr,
    grad_ptr,
    grad_stride,
    inverse_t,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (image, block) writes BLOCK classes of the gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    saved = normalisers_ptr + row * (6 if MIXED else 4)
    offset = row * CLASSES
    x_top, x_log = load_normaliser(saved, 0)
    a_top, a_log = load_normaliser(saved, 1)
    q = probability_block(student_ptr + offset, column, x_top, x_log, inverse_t, CLASSES)
    if MIXED:
        weight = tl.load(weight_ptr + row)
        label_a = labels_ptr + tl.load(rows_ptr + 2 * row) * CLASSES
        label_b = labels_ptr + tl.load(rows_ptr + 2 * row + 1) * CLASSES
        b_top, b_log = load_normaliser(saved, 2)
        p = weight * probability_block(label_a, column, a_top, a_log, inverse_t, CLASSES)
        p += (1.0 - weight) * probability_block(label_b, column, b_top, b_log, inverse_t, CLASSES)
    else:
        p = probability_block(labels_ptr + offset, column, a_top, a_log, inverse_t, CLASSES)
    grad = (q - p) * (tl.load(grad_ptr + row * grad_stride) * inverse_t)
    tl.store(out_ptr + offset + column, grad.to(out_ptr.dtype.element_ty), mask=column < CLASSES)
