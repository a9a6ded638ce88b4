"""The soft-label kernels against their references: in Triton's interpreter, and on a GPU if any.

Like test_kernels_triton.py: each case runs the public operation and its backward pass on a device,
on poisoned memory, and compares with the reference on the CPU. This file is also the program that
the interpreter runs (``TRITON_INTERPRET=1 python tests/test_softlabel_triton.py``).
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, interpret, run_case
from patchbloom.kernels.softlabel import (
    softlabel,
    softlabel_grad_reference,
    softlabel_reference,
)
from softlabel_cases import Given, given

CASES: dict[str, Case] = {}
GRAD = torch.tensor([1.0, -2.0, 0.25])


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def check(device: str, case: Given, dtype: torch.dtype = torch.float32) -> None:
    """Compare loss and gradient of kernels and reference, on the same (rounded) logits.

    The gradient's bound is relative to its largest entry: near the target, entries cancel.
    """
    student = case.student.to(dtype)
    target = case.target()
    expected = softlabel_reference(student, target, case.temperature)
    expected_grad = softlabel_grad_reference(GRAD, student, target, case.temperature)

    ours = student.to(device, copy=True).requires_grad_()
    loss = case.to(device).loss(ours)
    loss.backward(GRAD.to(device))
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(loss.detach().cpu(), expected, rtol=3e-6, atol=5e-6)
    epsilon = torch.finfo(dtype).eps
    bound = expected_grad.abs().amax().item() * 1e-5 + 1e-9
    tiny = torch.finfo(dtype).smallest_normal * epsilon if dtype != torch.float32 else 0.0
    torch.testing.assert_close(
        ours.grad.cpu().float(), expected_grad, rtol=max(epsilon, 1e-5), atol=bound + tiny
    )


def check_both(device: str, classes: int, kept: int, temperature: float) -> None:
    for mixed in (False, True):
        case = given(classes, kept, temperature, mixed)
        for dtype in (torch.float32, torch.float16):
            check(device, case, dtype)


@case
def fresh_memory_is_poisoned(device: str) -> None:
    student = torch.zeros(2, 3, device=device)
    assert bool(student.new_empty(5).isnan().all())
    assert bool(torch.empty_like(student).isnan().all())


@case
def dense_labels(device: str) -> None:
    for classes in (1, 2, 1000, 1001):
        check_both(device, classes, 0, 4.0)


@case
def dense_labels_of_many_classes(device: str) -> None:
    check_both(device, 21841, 0, 4.0)


@case
def coded_labels(device: str) -> None:
    for classes, kept in ((2, 1), (5, 2), (7, 6), (1000, 10), (1001, 17)):
        check_both(device, classes, kept, 4.0)


@case
def coded_labels_of_many_classes(device: str) -> None:
    check_both(device, 21841, 12, 1.0)


@case
def more_codes_than_a_block(device: str) -> None:
    check_both(device, 401, 150, 4.0)


@case
def wide_class_codes(device: str) -> None:
    narrow = given(1001, 5, 4.0, True)
    assert narrow.classes is not None
    check(device, replace(narrow, classes=narrow.classes.int()))
    columns = torch.tensor([[40000, 7], [39999, 2**15], [0, 1]], dtype=torch.int32)
    check(device, replace(given(40001, 2, 4.0, False), classes=columns))


@case
def temperatures(device: str) -> None:
    for temperature in (0.5, 1.0, 20.0):
        for kept in (0, 10):
            check_both(device, 1001, kept, temperature)


@case
def large_logits(device: str) -> None:
    slope = torch.linspace(-1e4, 1e4, 5001)
    for temperature in (0.5, 20.0):
        for kept in (0, 3):
            for mixed in (False, True):
                case = given(5001, kept, temperature, mixed)
                rising = slope.expand(3, -1).contiguous()
                for student in (rising, rising.flip(1), case.student + 1e4, case.student - 1e4):
                    check(device, replace(case, student=student))
                labels = case.labels if kept else (case.labels + slope).half()
                check(device, replace(case, student=rising, labels=labels))


@case
def equal_logits_cost_nothing(device: str) -> None:
    """The student equals the teacher up to an offset, which softmax ignores."""
    labels = given(1001, 0, 0.5, False).labels
    student = (labels.float() + 8192.0).to(device).requires_grad_()
    loss = softlabel(student, labels.to(device), temperature=0.5)
    exact = (labels.double() / 0.5).softmax(1)
    rounded = (student.detach().cpu().double() / 0.5).log_softmax(1)
    expected = (torch.xlogy(exact, exact) - exact * rounded).sum(1)
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=0.0, atol=2e-6)


@case
def gradients_of_a_sum(device: str) -> None:
    """sum() passes the kernel an expanded gradient: one number with stride 0."""
    for kept in (0, 10):
        case = given(1001, kept, 4.0, True)
        ours = case.student.to(device, copy=True).requires_grad_()
        case.to(device).loss(ours).sum().div(3.0).backward()
        expected = softlabel_grad_reference(
            torch.full((3,), 1 / 3), case.student, case.target(), case.temperature
        )
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), expected, rtol=1e-5, atol=1e-7)


@case
def nan_logits_show(device: str) -> None:
    for kept in (0, 10):
        case = given(1001, kept, 4.0, False).to(device)
        student = case.student.clone()
        student[1, 500] = torch.nan
        assert case.loss(student).isnan().tolist() == [False, True, False]


@case
def no_pictures(device: str) -> None:
    student = torch.zeros(0, 7, device=device, requires_grad=True)
    labels = torch.zeros(0, 7, dtype=torch.float16, device=device)
    softlabel(student, labels, temperature=1.0).sum().backward()
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    if interpreted[name] is not None:
        pytest.fail(str(interpreted[name]), pytrace=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    run_case(CASES[name], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept", [0, 10])
def test_bf16_logits_on_the_gpu(kept: int) -> None:
    """Not in the interpreter: its bf16 casts truncate."""
    for mixed in (False, True):
        check("cuda", given(1001, kept, 4.0, mixed), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept", [0, 12])
def test_no_dense_target_is_ever_on_the_gpu(kept: int) -> None:
    """Forward and backward allocate the gradient and less than a tenth of [B, K] more."""
    case = given(21841, kept, 4.0, True).to("cuda")
    assert case.rows is not None
    assert case.weight is not None
    many = replace(case, rows=case.rows.repeat(20, 1), weight=case.weight.repeat(20))
    student = case.student.repeat(20, 1).requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(many.loss(student).sum(), student)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * student.numel() * student.itemsize


if __name__ == "__main__":
    interpret(CASES)
