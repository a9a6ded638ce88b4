"""Device code of softlabel.py: its formula, over blocks of classes and of top-k codes.

Running values are (maximum, sum of exponentials) of raw logits; stored "normalisers" are the
maximum and the log of the sum for a row of logits, 1 / total and a class's share of the rest for a
row of codes. Offsets of rows are int64.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: below any logit, and finite, as 0 times infinity is NaN."""


@triton.jit
def load_logits(row_ptr, column, CLASSES: tl.constexpr):
    """Logits of a row in fp32, -inf beyond its end."""
    return tl.load(row_ptr + column, mask=column < CLASSES, other=-float("inf")).to(tl.float32)


@triton.jit
def softmax_block(logits, inside, top, total, inverse_t):
    """A block into a running (maximum, sum of exponentials).

    Also what the maximum fell behind by, and the block's scaled logits (0 outside) with their
    exponentials.
    """
    new_top = tl.maximum(top, tl.max(logits, 0))
    drop = (top - new_top) * inverse_t
    scaled = (logits - new_top) * inverse_t
    power = tl.exp(scaled)
    total = total * tl.exp(drop) + tl.sum(power, 0)
    return new_top, total, drop, tl.where(inside, scaled, 0.0), power


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
    """A block of a label row into its running (maximum, sum, gap).

    gap / sum is the mean over the label of its own scaled logit less the student's; of minus the
    student's alone where labels are mixed.
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
    """sum of p ln p over two mixed label rows."""
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
    """Program b writes the loss of picture b and (maximum, log sum) of its student and labels."""
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
    """Program (picture, block) writes BLOCK classes of the gradient."""
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
    """(probability, whether it is of the rest) of each class in `column` by one coded row."""
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
    """(class, target, whether the other row leaves it to its rest) of some codes of a row."""
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
    """What the codes that are `counted` add to the loss of a target of `base` everywhere."""
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
    """Program b writes the loss of picture b and the normalisers of its student and labels."""
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
    """Write (q - target) scale of some classes of a row."""
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
    """Program (picture, block) writes BLOCK classes of the gradient, those with a code twice.

    The barrier puts the second write after the first. A class that both rows keep gets the same
    bits from both.
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
