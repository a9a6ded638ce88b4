"""The kernels as torch operators: their fake implementations, and torch.compile.

``fullgraph=True`` raises at a graph break, so a compiled case proves that Dynamo also traces the
public function's checks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from patchbloom.kernels.geglu import geglu_op
from patchbloom.kernels.group_norm import group_norm_op
from patchbloom.kernels.latents import start_state, start_state_into
from patchbloom.kernels.mosaic import mosaic, mosaic_op
from patchbloom.kernels.noise import Draw, noise_into, normal, uniform
from patchbloom.kernels.pixels import upsample_patches, upsample_patches_op
from patchbloom.kernels.sampler import (
    euler_ancestral_step,
    euler_ancestral_step_into,
    euler_ancestral_step_op,
    euler_ancestral_step_reference,
)
from patchbloom.kernels.student_input import (
    student_input,
    student_input_backward,
    student_input_op,
)
from patchbloom.kernels.table_step import (
    euler_ancestral_table_step,
    euler_ancestral_table_step_into,
    step_table,
)

MOMENTS = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SEED = 2**64 - 5
SAMPLES = torch.tensor([3, 2**32 - 1, 7])


def _latents() -> tuple[torch.Tensor, ...]:
    return torch.randn(6, 4, 3, 5).split(3)


def _views() -> tuple[torch.Tensor, ...]:
    """Images, boxes, flips, partners, pasted."""
    images = torch.rand(3, 3, 9, 11) * 2.4 - 1.2
    boxes = torch.tensor([[0, 0, 9, 11], [3, 4, 2.5, 5], [8, 10, 1, 1]])
    pasted = torch.tensor([[0, 0, 3, 3], [2, -1, 9, 4], [9, 9, 1, 1]])
    return images, boxes, torch.tensor([False, True, True]), torch.tensor([2, 0, 0]), pasted


def _whole_bank() -> tuple[torch.Tensor, ...]:
    return torch.tensor([5, 0, 2]), SAMPLES, torch.zeros(3).long(), torch.full((3,), 6)


def _mosaic() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(9, 4, 4, 3).half(), torch.randperm(8).view(2, 4)


def _image() -> torch.Tensor:
    return torch.randn(2, 4, 3, 5).half().contiguous(memory_format=torch.channels_last)


def _table() -> tuple[torch.Tensor, ...]:
    columns = [14.6, 0.7], [2.2, 0.0], [2.184, 0.0], [0.307, 1.0]
    return step_table(*columns, device="cpu"), torch.tensor([1]), torch.tensor([4])


def _operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    state, eps = _latents()
    bank, outs = torch.randn(6, 4, 3, 5), (torch.empty(3, 4, 3, 5), torch.empty(3, 4, 3, 5))
    images, *named = _views()
    ours = images.requires_grad_(), *named
    patches = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    state, eps = state.clone(), eps.clone()  # not views: opcheck would test those too
    start = (*outs, bank, *_whole_bank(), -5, 1, 2.5, True, 0.25, torch.tensor([0.0, 0.4, 1.0]))
    step = (*outs, state.clone(), eps, SAMPLES, 2.0, 1.0, 0.5, 0.3, -5, 2, 1)
    return {
        "noise": (noise_into, (torch.empty(3, 5), SAMPLES, -5, 1, 2, True)),
        "start_state": (start_state_into, start),
        "start_state, uniform weights": (start_state_into, (*start[:-1], None)),
        "step": (euler_ancestral_step_into, step),
        "step, functional": (
            euler_ancestral_step_op,
            (state.requires_grad_(), eps.half().requires_grad_(), *step[4:]),
        ),
        "table_step": (
            euler_ancestral_table_step_into,
            (*outs, state, eps, SAMPLES, *_table(), -5),
        ),
        "upsample": (upsample_patches_op, (patches, 8, torch.float16)),
        "student_input": (student_input_op, (*ours, 7, *MOMENTS, torch.float32)),
        "student_input, no CutMix": (
            student_input_op,
            (*ours[:3], None, None, 7, *MOMENTS, torch.float16),
        ),
        "student_input_backward": (
            student_input_backward,
            (torch.randn(3, 3, 7, 7), images.detach(), *named, MOMENTS[1]),
        ),
        "mosaic": (mosaic_op, (*_mosaic(), 2)),
        "group_norm": (
            group_norm_op,
            (_image(), 2, torch.rand(4).half(), torch.rand(4).half(), 1e-5, True),
        ),
        "geglu": (geglu_op, (torch.randn(2, 3, 6).half(),)),
    }


@pytest.mark.parametrize("name", _operators())
def test_operators_keep_their_promises(name: str) -> None:
    """opcheck tests the schema, fake, autograd registration and traced backward."""
    operator, arguments = _operators()[name]
    torch.library.opcheck(operator, arguments)


Data = tuple[torch.Tensor, ...]


def _samples(epoch: int, bank: torch.Tensor, *named: torch.Tensor) -> Data:
    """Noise, start states and both steps, the table step in place."""
    rows, table = named[:4], named[4:]
    sigmas = {"sigma": 2.0, "sigma_down": 1.0, "sigma_up": 0.5, "next_scale": 0.3}
    names = {"seed": SEED, "epoch": epoch}
    mixed = {"sigma": 2.5, "mixup": True, "model_scale": 0.25}
    quantiles_Q = bank.new_tensor([0.0, 0.4, 1.0])
    first, planes = start_state(bank, *rows, **names, **mixed, quantiles_Q=quantiles_Q)
    _, nhwc = start_state(
        bank, *rows, **names, sigma=1.5, mixup=False, model_scale=0.5, channels_last=True
    )
    state, eps = euler_ancestral_step(first, planes, rows[1], **sigmas, step=1, **names)
    euler_ancestral_table_step(state, eps, rows[1], *table, seed=SEED, out=(state, eps))
    noise = normal(SEED, Draw.POSTERIOR, rows[1], epoch, (4, 3, 5), dtype=torch.float16)
    return nhwc, state, eps, noise, uniform(SEED, Draw.FLIP, rows[1], epoch, 5)


def _pictures(size_px: int, *named: torch.Tensor) -> Data:
    images, boxes, flips, partners, pasted, patches, rows = named
    inputs = images, boxes, flips, size_px + 4, *MOMENTS
    mixed = student_input(*inputs, cutmix=(partners, pasted), dtype=torch.float16)
    upsampled = upsample_patches((patches * 255).byte(), size_px + 4)
    return student_input(*inputs), mixed, mosaic(patches, rows, 2), upsampled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("run", [_samples, _pictures])
def test_compile_sees_one_graph(run: Callable[..., Data], backend: str) -> None:
    of_samples = torch.randn(6, 4, 3, 5), *_whole_bank(), *_table()
    data = of_samples if run is _samples else (*_views(), *_mosaic())
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for number in (0, 3, 4):  # the second number recompiles with a symbolic int
        for actual, expected in zip(compiled(number, *data), run(number, *data), strict=True):
            assert torch.equal(actual, expected)
            assert actual.stride() == expected.stride()


def test_compile_sees_the_gradient() -> None:
    torch.compiler.reset()
    images, boxes, flips, partners, pasted = _views()

    def loss(images: torch.Tensor) -> torch.Tensor:
        cutmix = partners, pasted
        return student_input(images, boxes, flips, 7, *MOMENTS, cutmix=cutmix).square().sum()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ours = images.clone().requires_grad_()
        run(ours).backward()
        gradients.append(ours.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("result", [0, 1])
def test_a_step_passes_gradients_to_state_and_eps(result: int, dtype: torch.dtype) -> None:
    """Backward from one result alone: the other's gradient is None."""
    state, eps = _latents()
    weights, tolerance = torch.randn(3, 4, 3, 5), 1e-6 if dtype == torch.float32 else 2e-3
    sigmas = {"sigma": 2.0, "sigma_down": 0.5, "sigma_up": 0.5, "next_scale": 0.3}
    compiled = torch.compile(euler_ancestral_step, fullgraph=True, backend="aot_eager")
    found = []
    for run in (euler_ancestral_step, compiled, euler_ancestral_step_reference):
        ours = state.clone().requires_grad_(), eps.to(dtype).requires_grad_()
        results = run(*ours, SAMPLES, **sigmas, seed=1, step=2, epoch=3)
        (results[result].float() * weights).sum().backward()
        found.append([tensor.grad for tensor in ours])
    for actual in found[:2]:
        for ours, theirs in zip(actual, found[2], strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert found[2][1].abs().sum() > 0
