"""KL of student logits against stored soft labels at a temperature, targets never materialised.

Formula, for the logits x of one image, temperature T, and label a (and b when mixed):

    q_c  = softmax(x / T)_c
    p_c  = softmax(t / T)_c                             dense: fp16 teacher logits t
    p_c  = kept_j / total where c = class_j, else rest / total            top-k: fp16 kept, k codes
           rest = max(1 - sum(kept), 0) / (K - k),  total = sum(kept) + rest (K - k)
    p    = w p_a + (1 - w) p_b                                                       mixed: CutMix
    loss = sum_c p_c (log p_c - log q_c),      d loss / d x_c = (q_c - p_c) / T

There is no factor T^2 (Hinton et al. 2015, section 2): the students' loss,
``softlabel(...).mean()``, has none. The top-k line is the coreset's top-k codec.

The kernels read x once. They keep running maxima of the raw logits and multiply differences by
1 / T, so neither an offset of 1e4 nor T = 0.5 costs precision; a new maximum rescales the sums,
and shifts those of x - max (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax", extended to expectations). Only log p of two mixed dense rows needs both normalisers
first: those rows are read again, usually from L2 (87 KB at K = 21,841).

Bytes per image, with x of s bytes, L = 1 label or 2 when mixed, and class codes of i bytes:

                     dense                                   top-k
    forward          s K + 2 L K (+ 4 K from L2 if L = 2)    s K + L k (2 + i + s)
    backward         2 s K + 2 L K                           2 s K + L k (2 + i + 2 s)

plus 4 + 8 (1 + L) bytes for loss and normalisers. With fp32 logits and dense labels that is 6 K
forward and 10 K backward. Eager torch moves 110 K and 71 K in the reference, which handles extreme
logits, and 78 K and 36 K in ``kl_div(log_softmax(x / T), softmax(t / T))``, which does not.

Shapes: B images; N label rows; K classes; k kept probabilities per row.
"""

import math
from typing import Any

import torch
import triton

from .launch import FLOATS, launch, require, runs_kernel
from .softlabel_dense import softlabel_dense_grad_kernel, softlabel_dense_kernel
from .softlabel_topk import softlabel_topk_grad_kernel, softlabel_topk_kernel

CODES = (torch.int16, torch.int32)
MOST_CLASSES_PER_BLOCK = 4096
MOST_CODES_PER_BLOCK = 128


def _log_softmax_reference(logits_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_BK = logits_BK.float()
    return ((logits_BK - logits_BK.amax(1, keepdim=True)) / temperature).log_softmax(1)


def target_reference(
    labels: torch.Tensor,
    classes_Nk: torch.Tensor | None,
    rows_B2: torch.Tensor | None,
    weight_B: torch.Tensor | None,
    *,
    classes: int,
    temperature: float,
) -> torch.Tensor:
    """Targets p for ``softlabel``'s arguments, fp32 [B, K], in plain torch."""
    if rows_B2 is not None and weight_B is not None:
        settings = {"classes": classes, "temperature": temperature}
        first_BK, second_BK = (
            target_reference(
                labels[rows_B],
                None if classes_Nk is None else classes_Nk[rows_B],
                None,
                None,
                **settings,
            )
            for rows_B in rows_B2.unbind(1)
        )
        return weight_B[:, None] * first_BK + (1.0 - weight_B[:, None]) * second_BK
    if classes_Nk is None:
        return _log_softmax_reference(labels, temperature).exp()
    kept_Bk = labels.float()
    mass_B1 = kept_Bk.sum(1, keepdim=True)
    rest_B1 = (1.0 - mass_B1).clamp_min(0.0)
    total_B1 = mass_B1 + rest_B1
    rest_BK = (rest_B1 / (classes - labels.shape[1]) / total_B1).expand(-1, classes)
    return rest_BK.scatter(1, classes_Nk.long(), kept_Bk / total_B1)


def softlabel_reference(
    student_BK: torch.Tensor, target_BK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(target || student at T), fp32 [B], in plain torch."""
    log_q_BK = _log_softmax_reference(student_BK, temperature)
    return (torch.xlogy(target_BK, target_BK) - target_BK * log_q_BK).sum(1)


def softlabel_grad_reference(
    grad_B: torch.Tensor, student_BK: torch.Tensor, target_BK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """d sum(grad_B loss_B) / d student_BK, fp32 [B, K], in plain torch."""
    q_BK = _log_softmax_reference(student_BK, temperature).exp()
    return (grad_B / temperature)[:, None] * (q_BK - target_BK)


def _constants(
    student_BK: torch.Tensor,
    labels: torch.Tensor,
    classes_Nk: torch.Tensor | None,
    rows_B2: torch.Tensor | None,
) -> dict[str, Any]:
    """Compile-time constants of the kernels; K is one, so that rows of even K load as vectors."""
    classes = student_BK.shape[1]
    block = min(triton.next_power_of_2(classes), MOST_CLASSES_PER_BLOCK)
    constants = {"MIXED": rows_B2 is not None, "CLASSES": classes, "BLOCK": block}
    if classes_Nk is not None:
        kept = labels.shape[1]
        codes = min(triton.next_power_of_2(kept), MOST_CODES_PER_BLOCK)
        constants |= {"KEPT": kept, "CODES": codes}
    return constants | {"num_warps": max(1, min(8, block // 256))}


def _normalisers(student_BK: torch.Tensor, rows_B2: torch.Tensor | None) -> torch.Tensor:
    """Two numbers per softmax for the backward kernel; none when the reference runs."""
    softmaxes = 2 if rows_B2 is None else 3
    shape = (len(student_BK), softmaxes if runs_kernel(student_BK) else 0, 2)
    return student_BK.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("patchbloom::softlabel", mutates_args=())
def _softlabel(
    student_BK: torch.Tensor,
    labels: torch.Tensor,
    classes_Nk: torch.Tensor | None,
    rows_B2: torch.Tensor | None,
    weight_B: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [B], normalisers for the backward kernel), both fp32."""
    names = (labels, classes_Nk, rows_B2, weight_B)
    normalisers = _normalisers(student_BK, rows_B2)
    if not runs_kernel(student_BK):
        classes = student_BK.shape[1]
        target_BK = target_reference(*names, classes=classes, temperature=temperature)
        return softlabel_reference(student_BK, target_BK, temperature), normalisers
    loss_B = student_BK.new_empty(len(student_BK), dtype=torch.float32)
    kernel = softlabel_dense_kernel if classes_Nk is None else softlabel_topk_kernel
    launch(
        kernel,
        (len(student_BK),),
        loss_B,
        normalisers,
        student_BK,
        labels,
        *(() if classes_Nk is None else (classes_Nk,)),
        rows_B2,
        weight_B,
        1.0 / temperature,
        **_constants(student_BK, labels, classes_Nk, rows_B2),
    )
    return loss_B, normalisers


@_softlabel.register_fake
def _(student_BK, labels, classes_Nk, rows_B2, weight_B, temperature):
    loss_B = student_BK.new_empty(len(student_BK), dtype=torch.float32)
    return loss_B, _normalisers(student_BK, rows_B2)


@torch.library.custom_op("patchbloom::softlabel_grad", mutates_args=())
def _softlabel_grad(
    grad_B: torch.Tensor,
    normalisers: torch.Tensor,
    student_BK: torch.Tensor,
    labels: torch.Tensor,
    classes_Nk: torch.Tensor | None,
    rows_B2: torch.Tensor | None,
    weight_B: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Gradient [B, K] in the student's dtype; ``grad_B`` has any stride, as sum() expands it."""
    names = (labels, classes_Nk, rows_B2, weight_B)
    classes = student_BK.shape[1]
    if not runs_kernel(student_BK):
        target_BK = target_reference(*names, classes=classes, temperature=temperature)
        grad_BK = softlabel_grad_reference(grad_B, student_BK, target_BK, temperature)
        return grad_BK.to(student_BK.dtype)
    grad_BK = torch.empty_like(student_BK)
    kernel = softlabel_dense_grad_kernel if classes_Nk is None else softlabel_topk_grad_kernel
    constants = _constants(student_BK, labels, classes_Nk, rows_B2)
    launch(
        kernel,
        (len(student_BK), triton.cdiv(classes, constants["BLOCK"])),
        grad_BK,
        normalisers,
        student_BK,
        labels,
        *(() if classes_Nk is None else (classes_Nk,)),
        rows_B2,
        weight_B,
        grad_B,
        grad_B.stride(0),
        1.0 / temperature,
        **constants,
    )
    return grad_BK


@_softlabel_grad.register_fake
def _(grad_B, normalisers, student_BK, labels, classes_Nk, rows_B2, weight_B, temperature):
    return torch.empty_like(student_BK)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)  # normalisers have none; zeros would cost a launch


def _backward(
    ctx: Any, grad_B: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    grad_BK = _softlabel_grad(grad_B, *ctx.saved_tensors, ctx.temperature)
    return grad_BK, None, None, None, None, None


_softlabel.register_autograd(_backward, setup_context=_setup_context)


def softlabel(
    student_BK: torch.Tensor,
    labels: torch.Tensor,
    classes_Nk: torch.Tensor | None = None,
    *,
    temperature: float,
    rows_B2: torch.Tensor | None = None,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(label || student) of each image at a temperature: fp32 [B], differentiable.

    ``student_BK`` holds logits in fp32, fp16 or bf16. ``labels`` are fp16: teacher logits [N, K];
    or, with int16 or int32 ``classes_Nk``, probabilities [N, k] at this temperature, k < K, each
    class once per row. Image b learns from row b, and N = B. With ``rows_B2`` (int64) and
    ``weight_B`` (fp32, in [0, 1]) it learns from w times row rows_B2[b, 0] plus 1 - w times row
    rows_B2[b, 1]. Logits must be finite, classes and rows in range (not checked: that would need a
    sync). Mixing top-k labels takes k^2 steps to look up the classes of one row in the other.
    Labels and weights get no gradient. Raises TypeError or ValueError when an argument does not
    fit.
    """
    require("student_BK", student_BK, dtype=FLOATS, shape=("B", "K"))
    pictures, classes = student_BK.shape
    if classes < 1:
        raise ValueError("student_BK: expected at least one class, got none")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if (rows_B2 is None) != (weight_B is None):
        raise ValueError("rows_B2, weight_B: expected both (mixed labels) or neither")
    rows: int | str = pictures
    if rows_B2 is not None and weight_B is not None:
        require("rows_B2", rows_B2, dtype=torch.int64, shape=(pictures, 2), like=student_BK)
        require("weight_B", weight_B, dtype=torch.float32, shape=(pictures,), like=student_BK)
        rows = "N"
    if classes_Nk is None:
        require("labels", labels, dtype=torch.float16, shape=(rows, classes), like=student_BK)
    else:
        require("labels", labels, dtype=torch.float16, shape=(rows, "k"), like=student_BK)
        if not 1 <= labels.shape[1] < classes:
            raise ValueError(
                f"labels: expected 1 <= k < {classes} classes, got k = {labels.shape[1]}"
            )
        require("classes_Nk", classes_Nk, dtype=CODES, shape=labels.shape, like=student_BK)
        if classes_Nk.dtype == torch.int16 and classes > 2**15:
            raise TypeError(f"classes_Nk: expected int32 for {classes} classes, got int16")
    names = (labels, classes_Nk, rows_B2, weight_B)
    return _softlabel(student_BK, *names, float(temperature))[0]
