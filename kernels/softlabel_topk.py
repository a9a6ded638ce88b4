"""Kernels of softlabel.py for top-k labels: its formula, over blocks of classes and of codes."""

import triton
import triton.language as tl

from .softlabel_device import (
    LOWEST,
    load_logits,
    load_normaliser,
    p_log_p,
    softmax_block,
    store_normaliser,
)


@triton.jit
def kept_normaliser(kept_ptr, CLASSES: tl.constexpr, KEPT: tl.constexpr, CODES: tl.constexpr):
    """(1 / total, a class's share of the rest / total) of one coded row."""
    masses = tl.zeros([CODES], tl.float32)
    for start in range(0, KEPT, CODES):
        code = start + tl.arange(0, CODES)
        masses += tl.load(kept_ptr + code, mask=code < KEPT, other=0.0).to(tl.float32)
    mass = tl.sum(masses, 0)
    rest = tl.maximum(1.0 - mass, 0.0)  # pyright: ignore[reportOperatorIssue]
    total = mass + rest
    return 1.0 / total, rest / (CLASSES - KEPT) / total


@triton.jit
def look_up(column, kept_ptr, classes_ptr, scale, rest, KEPT: tl.constexpr):
    """(probability, whether it belongs to the rest) of each class in `column`, in one coded row."""
    probability = tl.zeros(column.shape, tl.float32) + rest
    of_rest = column >= 0
    for code in range(KEPT):
        same = column == tl.load(classes_ptr + code).to(tl.int32)
        kept = tl.load(kept_ptr + code).to(tl.float32) * scale
        probability = tl.where(same, kept, probability)
        of_rest = of_rest & (same == 0)
    return probability, of_rest


@triton.jit
def code_block(
    code,
    kept_ptr,
    classes_ptr,
    scale,
    weight,
    other_kept_ptr,
    other_classes_ptr,
    other_scale,
    other_rest,
    other_weight,
    MIXED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """(class, target, whether it belongs to the other row's rest) of a block of a row's codes."""
    column = tl.load(classes_ptr + code, mask=code < KEPT, other=0).to(tl.int32)
    target = tl.load(kept_ptr + code, mask=code < KEPT, other=0.0).to(tl.float32) * scale
    alone = column >= 0
    if MIXED:
        other, alone = look_up(
            column, other_kept_ptr, other_classes_ptr, other_scale, other_rest, KEPT
        )
        target = weight * target + other_weight * other
    return column, target, alone


@triton.jit
def code_loss(student_ptr, x_top, inverse_t, column, target, base, counted):
    """Loss that the `counted` codes add to that of a target of `base` everywhere."""
    x = tl.load(student_ptr + column, mask=counted, other=0.0).to(tl.float32)
    loss = p_log_p(target) - p_log_p(base) - (target - base) * ((x - x_top) * inverse_t)
    return tl.sum(tl.where(counted, loss, 0.0), 0)


@triton.jit
def softlabel_topk_kernel(
    loss_ptr,
    normalisers_ptr,
    student_ptr,
    labels_ptr,
    classes_ptr,
    rows_ptr,
    weight_ptr,
    inverse_t,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
):
    """Program b writes the loss of image b and the normalisers of its student and labels."""
    row = tl.program_id(0).to(tl.int64)
    student = student_ptr + row * CLASSES
    normalisers = normalisers_ptr + row * (6 if MIXED else 4)
    x_top, x_total, x_sum, before = LOWEST, 0.0, 0.0, 0.0
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(student, column, CLASSES)
        x_top, x_total, drop, x, _ = softmax_block(x, column < CLASSES, x_top, x_total, inverse_t)
        x_sum += before * drop + tl.sum(x, 0)
        before += BLOCK
    loss = tl.log(x_total)
    store_normaliser(normalisers, 0, x_top, loss)
    a, b, weight, other_weight = row, row, 1.0, 0.0
    if MIXED:
        a, b = tl.load(rows_ptr + 2 * row), tl.load(rows_ptr + 2 * row + 1)
        weight = tl.load(weight_ptr + row)
        other_weight = 1.0 - weight
    kept_a, classes_a = labels_ptr + a * KEPT, classes_ptr + a * KEPT
    kept_b, classes_b = labels_ptr + b * KEPT, classes_ptr + b * KEPT
    scale_a, rest_a = kept_normaliser(kept_a, CLASSES, KEPT, CODES)
    scale_b, rest_b = scale_a, rest_a
    store_normaliser(normalisers, 1, scale_a, rest_a)
    if MIXED:
        scale_b, rest_b = kept_normaliser(kept_b, CLASSES, KEPT, CODES)
        store_normaliser(normalisers, 2, scale_b, rest_b)
    base = weight * rest_a + other_weight * rest_b
    loss += CLASSES * p_log_p(base) - base * x_sum
    for start in range(0, KEPT, CODES):
        code = start + tl.arange(0, CODES)
        column, target, _ = code_block(
            code, kept_a, classes_a, scale_a, weight,
            kept_b, classes_b, scale_b, rest_b, other_weight, MIXED, KEPT,
        )  # fmt: skip
        loss += code_loss(student, x_top, inverse_t, column, target, base, code < KEPT)
        if MIXED:
            column, target, alone = code_block(
                code, kept_b, classes_b, scale_b, other_weight,
                kept_a, classes_a, scale_a, rest_a, weight, MIXED, KEPT,
            )  # fmt: skip
            counted = alone & (code < KEPT)
            loss += code_loss(student, x_top, inverse_t, column, target, base, counted)
    tl.store(loss_ptr + row, loss)


@triton.jit
def store_grad(out_ptr, student_ptr, column, target, mask, top, log_total, inverse_t, scale):
    """Write (q - target) scale for some classes of a row."""
    x = tl.load(student_ptr + column, mask=mask, other=0.0).to(tl.float32)
    grad = (tl.exp((x - top) * inverse_t - log_total) - target) * scale
    tl.store(out_ptr + column, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softlabel_topk_grad_kernel(
    out_ptr,
    normalisers_ptr,
    student_ptr,
    labels_ptr,
    classes_ptr,
    rows_ptr,
    weight_ptr,
    grad_ptr,
    grad_stride,
    inverse_t,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
):
    """Program (image, block) writes BLOCK classes of the gradient, those with a code twice.

    The barrier orders the two writes. A class that both rows keep gets the same bits from both.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(first + BLOCK, CLASSES)
    saved = normalisers_ptr + row * (6 if MIXED else 4)
    out, student = out_ptr + row * CLASSES, student_ptr + row * CLASSES
    a, b, weight, other_weight = row, row, 1.0, 0.0
    x_top, x_log = load_normaliser(saved, 0)
    scale_a, rest_a = load_normaliser(saved, 1)
    scale_b, rest_b = scale_a, rest_a
    if MIXED:
        a, b = tl.load(rows_ptr + 2 * row), tl.load(rows_ptr + 2 * row + 1)
        weight = tl.load(weight_ptr + row)
        other_weight = 1.0 - weight
        scale_b, rest_b = load_normaliser(saved, 2)
    kept_a, classes_a = labels_ptr + a * KEPT, classes_ptr + a * KEPT
    kept_b, classes_b = labels_ptr + b * KEPT, classes_ptr + b * KEPT
    scale = tl.load(grad_ptr + row * grad_stride) * inverse_t
    column = first + tl.arange(0, BLOCK)
    base = weight * rest_a + other_weight * rest_b
    store_grad(out, student, column, base, column < last, x_top, x_log, inverse_t, scale)
    tl.debug_barrier()
    for start in range(0, KEPT, CODES):
        code = start + tl.arange(0, CODES)
        kept_class, target, _ = code_block(
            code, kept_a, classes_a, scale_a, weight,
            kept_b, classes_b, scale_b, rest_b, other_weight, MIXED, KEPT,
        )  # fmt: skip
        mine = (code < KEPT) & (kept_class >= first) & (kept_class < last)
        store_grad(out, student, kept_class, target, mine, x_top, x_log, inverse_t, scale)
        if MIXED:
            kept_class, target, _ = code_block(
                code, kept_b, classes_b, scale_b, other_weight,
                kept_a, classes_a, scale_a, rest_a, weight, MIXED, KEPT,
            )  # fmt: skip
            mine = (code < KEPT) & (kept_class >= first) & (kept_class < last)
            store_grad(out, student, kept_class, target, mine, x_top, x_log, inverse_t, scale)
