"""The soft-label loss on the CPU: formula and gradient against torch in fp64, and refusals.

``test_softlabel_triton.py`` compares the Triton kernels with the same references.
"""

import pytest
import torch
from patchbloom.engine.labels.codecs import decode_topk, encode_topk
from patchbloom.kernels.softlabel import softlabel, softlabel_reference, target_reference
from softlabel_cases import Given, given
from torch.nn.functional import kl_div, log_softmax

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
SIZES = ((1, 0), (2, 0), (2, 1), (5, 2), (1000, 10), (1001, 499), (21841, 64))
"""(K, k); k = 0: dense labels."""


def exact_targets(case: Given) -> torch.Tensor:
    """fp64 [B, K] from the definition; coded labels go one image and one class at a time."""
    rows = []
    classes = case.student.shape[1]
    for row in range(len(case.labels)):
        label = case.labels[row].double()
        if case.classes is None:
            rows.append((label / case.temperature).softmax(0))
            continue
        rest = max(1.0 - label.sum().item(), 0.0)
        full = torch.full((classes,), rest / (classes - len(label)), dtype=torch.float64)
        for kept, column in zip(label.tolist(), case.classes[row].tolist(), strict=True):
            full[column] = kept
        rows.append(full / full.sum())
    table = torch.stack(rows)
    if case.rows is None or case.weight is None:
        return table
    weight = case.weight.double()[:, None]
    return weight * table[case.rows[:, 0]] + (1 - weight) * table[case.rows[:, 1]]


def exact_loss(student: torch.Tensor, case: Given) -> torch.Tensor:
    scores = log_softmax(student / case.temperature, dim=1)
    return kl_div(scores, exact_targets(case), reduction="none").sum(1)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("classes", "kept"), SIZES)
def test_loss_and_gradient_are_torchs_in_fp64(classes, kept, temperature, mixed) -> None:
    case = given(classes, kept, temperature, mixed)
    student = case.student.double().requires_grad_()
    expected = exact_loss(student, case)
    weights = torch.tensor([1.0, -2.0, 0.25])
    (expected * weights).sum().backward()

    ours = case.student.clone().requires_grad_()
    loss = case.loss(ours)
    (loss * weights).sum().backward()
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=3e-6)
    assert student.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), student.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 10])
def test_half_logits_get_a_half_gradient(dtype, kept) -> None:
    case = given(1001, kept, 4.0, True)
    rounded = case.student.to(dtype)
    half, full = rounded.clone().requires_grad_(), rounded.float().requires_grad_()
    loss = case.loss(half)
    torch.testing.assert_close(loss, case.loss(full), rtol=0.0, atol=0.0)
    (loss.sum() * 512).backward()
    (case.loss(full).sum() * 512).backward()
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=0.0, atol=0.0)


def test_the_mean_is_the_students_loss() -> None:
    """kl_div(log_softmax(logits / T), softmax(teacher / T)), batchmean, no T^2."""
    case = given(1000, 0, 20.0, False)
    logits = case.student.clone().requires_grad_()
    scores = log_softmax(logits / 20.0, dim=1)
    expected = kl_div(scores, (case.labels.float() / 20.0).softmax(1), reduction="batchmean")
    expected.backward()
    ours = case.student.clone().requires_grad_()
    loss = case.loss(ours).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(ours.grad, logits.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("classes", "k"), [(5, 2), (1000, 10), (1001, 499)])
def test_top_k_labels_mean_what_the_coreset_stores(classes, k) -> None:
    logits = given(classes, 0, 1.0, False).labels
    probabilities, columns = encode_topk(logits, k=k, temperature=4.0)
    target = target_reference(probabilities, columns, None, None, classes=classes, temperature=4.0)
    torch.testing.assert_close(
        target, decode_topk(probabilities, columns, classes), rtol=1e-6, atol=1e-9
    )


def test_probabilities_that_round_above_one_are_normalised() -> None:
    kept = torch.tensor([[0.75, 0.2505]], dtype=torch.float16)
    columns = torch.tensor([[3, 1]], dtype=torch.int16)
    target = target_reference(kept, columns, None, None, classes=6, temperature=1.0)
    assert target[0, [0, 2, 4, 5]].tolist() == [0.0] * 4
    torch.testing.assert_close(target.sum(1), torch.ones(1))
    assert bool(softlabel(torch.zeros(1, 6), kept, columns, temperature=1.0).isfinite())


@pytest.mark.parametrize("kept", [0, 3])
def test_mixing_takes_the_rows_and_weights_it_is_given(kept) -> None:
    case = given(11, kept, 2.0, True)
    assert case.rows is not None
    assert case.weight is not None
    student = case.student[:1].expand(3, -1).contiguous()
    for weight, column in ((1.0, 0), (0.0, 1)):
        weights = torch.full((3,), weight)
        mixed = softlabel(
            student, case.labels, case.classes, temperature=2.0, rows_B2=case.rows, weight_B=weights
        )
        rows = case.rows[:, column]
        classes = None if case.classes is None else case.classes[rows]
        alone = softlabel(student, case.labels[rows], classes, temperature=2.0)
        torch.testing.assert_close(mixed, alone, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("temperature", [0.5, 20.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits_stay_finite(offset, temperature, kept, mixed) -> None:
    case = given(1001, kept, temperature, mixed)
    spread = case.student * 0 + torch.linspace(-1e4, 1e4, 1001)
    for student in (spread, spread.flip(1), case.student + offset):
        logits = student.clone().requires_grad_()
        loss = case.loss(logits)
        loss.sum().backward()
        torch.testing.assert_close(
            loss.double(), exact_loss(student.double(), case), rtol=1e-5, atol=1e-5
        )
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())


def test_one_class_costs_nothing() -> None:
    case = given(1, 0, 0.5, False)
    assert case.loss(case.student).tolist() == [0.0] * 3


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kept", [0, 3])
def test_torch_compile_sees_through(kept, mixed) -> None:
    case = given(11, kept, 4.0, mixed)

    def step(logits: torch.Tensor) -> torch.Tensor:
        return case.loss(logits * 2.0).mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits = case.student.clone().requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kept", [0, 3])
def test_the_registration_holds_to_torchs_rules(kept, mixed) -> None:
    """opcheck tests schema, fake implementation, autograd and AOT dispatch."""
    case = given(11, kept, 4.0, mixed)
    names = (case.labels, case.classes, case.rows, case.weight, 4.0)
    student = case.student.clone().requires_grad_()
    torch.library.opcheck(torch.ops.patchbloom.softlabel.default, (student, *names))
    _, normalisers = torch.ops.patchbloom.softlabel(case.student, *names)
    grad = torch.ones(3)
    torch.library.opcheck(
        torch.ops.patchbloom.softlabel_grad.default,
        (grad, normalisers, case.student, *names),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_labels_and_weights_get_no_gradient() -> None:
    case = given(11, 0, 4.0, True)
    labels = case.labels.clone().requires_grad_()
    student = case.student.clone().requires_grad_()
    loss = softlabel(student, labels, temperature=4.0, rows_B2=case.rows, weight_B=case.weight)
    loss.sum().backward()
    assert labels.grad is None


def test_no_pictures_have_no_loss() -> None:
    student = torch.zeros(0, 7, requires_grad=True)
    loss = softlabel(student, torch.zeros(0, 7, dtype=torch.float16), temperature=1.0)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert student.grad is not None


def test_the_reference_is_zero_only_at_the_label() -> None:
    student = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    target = (student / 3.0).softmax(1)
    torch.testing.assert_close(
        softlabel_reference(student, target, 3.0), torch.zeros(4), rtol=0.0, atol=1e-6
    )
    assert bool((softlabel_reference(student, target.roll(1, 1), 3.0) > 1e-3).all())


STUDENT = torch.zeros(3, 8)
DENSE = torch.zeros(3, 8, dtype=torch.float16)
KEPT = torch.full((3, 2), 0.25, dtype=torch.float16)
COLUMNS = torch.tensor([[0, 1]] * 3, dtype=torch.int16)
MIX = {"rows_B2": torch.zeros(3, 2, dtype=torch.int64), "weight_B": torch.ones(3)}


@pytest.mark.parametrize(
    ("error", "message", "arguments", "settings"),
    [
        (TypeError, "student_BK: expected float32", (STUDENT.double(), DENSE), {}),
        (ValueError, r"student_BK: expected shape \[B, K\]", (STUDENT[0], DENSE), {}),
        (ValueError, "expected a contiguous", (STUDENT.repeat(1, 2)[:, 8:], DENSE), {}),
        (ValueError, "at least one class", (STUDENT[:, :0], DENSE[:, :0]), {}),
        (TypeError, "labels: expected float16", (STUDENT, DENSE.float()), {}),
        (ValueError, r"labels: expected shape \[3, 8\]", (STUDENT, DENSE[:2]), {}),
        (ValueError, r"labels: expected shape \[N, 8\]", (STUDENT, DENSE[:, :7].clone()), MIX),
        (ValueError, r"labels: expected shape \[3, k\]", (STUDENT, KEPT[:2], COLUMNS[:2]), {}),
        (ValueError, r"1 <= k < 8 classes, got k = 8", (STUDENT, DENSE, COLUMNS), {}),
        (ValueError, r"got k = 0", (STUDENT, KEPT[:, :0], COLUMNS[:, :0]), {}),
        (TypeError, "classes_Nk: expected int16 or int32", (STUDENT, KEPT, COLUMNS.long()), {}),
        (ValueError, r"classes_Nk: expected shape \[3, 2\]", (STUDENT, KEPT, COLUMNS[:2]), {}),
        (ValueError, "expected both", (STUDENT, DENSE), {"rows_B2": MIX["rows_B2"]}),
        (ValueError, "expected both", (STUDENT, DENSE), {"weight_B": MIX["weight_B"]}),
        (TypeError, "rows_B2: expected int64", (STUDENT, DENSE),
         {**MIX, "rows_B2": MIX["rows_B2"].int()}),
        (ValueError, r"rows_B2: expected shape \[3, 2\]", (STUDENT, DENSE),
         {**MIX, "rows_B2": MIX["rows_B2"][:2]}),
        (TypeError, "weight_B: expected float32", (STUDENT, DENSE),
         {**MIX, "weight_B": MIX["weight_B"].half()}),
        (ValueError, "temperature: expected a number above 0", (STUDENT, DENSE),
         {"temperature": 0.0}),
        (ValueError, "temperature: expected", (STUDENT, DENSE), {"temperature": float("nan")}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(error, message, arguments, settings) -> None:
    with pytest.raises(error, match=message):
        softlabel(*arguments, **{"temperature": 4.0, **settings})


def test_more_classes_than_int16_counts_need_int32() -> None:
    student = torch.zeros(3, 2**15 + 1)
    with pytest.raises(TypeError, match="classes_Nk: expected int32 for 32769 classes"):
        softlabel(student, KEPT, COLUMNS, temperature=1.0)
    columns = torch.tensor([[2**15, 1]] * 3, dtype=torch.int32)
    assert softlabel(student, KEPT, columns, temperature=1.0).shape == (3,)
