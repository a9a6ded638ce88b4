"""The Triton kernels against their references: in Triton's interpreter, and on a GPU if any.

Each case calls the public launchers on a device and compares with the reference on the CPU. Fresh
memory is filled with NaN (255 in uint8), so that unwritten numbers show. The interpreter is chosen
before ``import triton``, so the cases run in their own process: this file is also that program
(``TRITON_INTERPRET=1 python tests/test_kernels_triton.py``).
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import Case, interpret, run_case
from patchbloom.kernels.latents import start_state, start_state_reference
from patchbloom.kernels.mosaic import mosaic, mosaic_reference
from patchbloom.kernels.noise import (
    normal,
    normal_reference,
    philox_block,
    philox_reference,
    uniform,
    uniform_reference,
    unit_of,
    unit_reference,
)
from patchbloom.kernels.pixels import upsample_patches, upsample_patches_reference
from patchbloom.kernels.sampler import euler_ancestral_step, euler_ancestral_step_reference
from patchbloom.kernels.student_input import student_input, student_input_reference
from patchbloom.kernels.table_step import euler_ancestral_table_step, step_table

CASES: dict[str, Case] = {}
SEED, EPOCH = 2**64 - 5, 2**32 - 1
SAMPLES = torch.tensor([0, 3, 2**31, 2**32 - 1, 17])
HALF = {"rtol": 1e-3, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}
NOISE = {"rtol": 0.0, "atol": 2e-6}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def close(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.cpu(), expected.to(actual.dtype), rtol=rtol, atol=atol)


def draws(count: int, *shape: int) -> torch.Tensor:
    """Test data, the same in every process."""
    return normal_reference(77, 0, torch.arange(count), 0, shape)


@triton.jit
def words_kernel(words_ptr, units_ptr, name_ptr, ROUNDS: tl.constexpr):
    """Store the four Philox words, and their uniforms, of the counter and key in name_ptr[0:6]."""
    c0 = tl.load(name_ptr + tl.arange(0, 1))
    c1, c2, c3 = tl.load(name_ptr + 1), tl.load(name_ptr + 2), tl.load(name_ptr + 3)
    key_0, key_1 = tl.load(name_ptr + 4), tl.load(name_ptr + 5)
    w0, w1, w2, w3 = philox_block(c0, c1, c2, c3, key_0, key_1, ROUNDS)
    lane = tl.arange(0, 1)
    tl.store(words_ptr + lane, w0.to(tl.int64))
    tl.store(words_ptr + 1 + lane, w1.to(tl.int64))
    tl.store(words_ptr + 2 + lane, w2.to(tl.int64))
    tl.store(words_ptr + 3 + lane, w3.to(tl.int64))
    tl.store(units_ptr + lane, unit_of(w0))
    tl.store(units_ptr + 1 + lane, unit_of(w1))
    tl.store(units_ptr + 2 + lane, unit_of(w2))
    tl.store(units_ptr + 3 + lane, unit_of(w3))


@triton.jit
def units_kernel(units_ptr, words_ptr, COUNT: tl.constexpr):
    """Store the uniforms of given words."""
    lane = tl.arange(0, COUNT)
    tl.store(units_ptr + lane, unit_of(tl.load(words_ptr + lane).to(tl.uint32)))


def check_known_answers(device: str, rounds: int) -> None:
    """Check ``rounds`` rounds on the device against Random123's vectors for Philox 4x32-10."""
    known = [
        ("00000000 00000000 00000000 00000000 00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]  # fmt: skip
    for name, answer in known:
        name_words = torch.tensor([int(word, 16) for word in name.split()], device=device)
        expected = torch.tensor([int(word, 16) for word in answer.split()])
        words = torch.full((4,), -1, device=device)
        units = torch.full((4,), torch.nan, device=device)
        words_kernel[(1,)](words, units, name_words, ROUNDS=rounds)  # pyright: ignore
        close(words, expected, **EXACT)
        close(units, unit_reference(expected), **EXACT)


@case
def philox_known_answers(device: str) -> None:
    check_known_answers(device, 10)


@case
def nine_rounds_fail_the_known_answers(device: str) -> None:
    with pytest.raises(AssertionError):
        check_known_answers(device, 9)


@case
def uniforms_of_edge_words(device: str) -> None:
    edges = [0, 1, 2**24 + 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    words = torch.tensor(edges)
    units = torch.full((8,), torch.nan, device=device)
    units_kernel[(1,)](units, words.to(device), COUNT=8)  # pyright: ignore
    close(units, unit_reference(words), **EXACT)


@case
def uniforms_are_the_reference_bit_for_bit(device: str) -> None:
    for count in (1, 5, 1029):
        actual = uniform(SEED, 67, SAMPLES.to(device), EPOCH, count)
        close(actual, uniform_reference(SEED, 67, SAMPLES, EPOCH, count), **EXACT)
    words = philox_reference(1, torch.arange(1), 1, torch.tensor([[1]]), 1)
    expected = unit_reference(torch.stack(words, -1)).reshape(1, 4)
    close(uniform(1, 1, torch.tensor([1], device=device), 1, 4), expected, **EXACT)


@case
def normals_of_odd_shapes(device: str) -> None:
    for shape in ((1,), (3, 5, 7), (4, 16, 17), (2, 512)):
        expected = normal_reference(SEED, 3, SAMPLES, EPOCH, shape)
        close(normal(SEED, 3, SAMPLES.to(device), EPOCH, shape), expected, **NOISE)
        half = normal(SEED, 3, SAMPLES.to(device), EPOCH, shape, dtype=torch.float16)
        close(half, expected, **HALF)
    assert normal(1, 0, SAMPLES[:0].to(device), 0, (5,)).shape == (0, 5)


@case
def normals_ignore_their_neighbours(device: str) -> None:
    together = normal(4, 0, SAMPLES.to(device), 2, (3, 5, 7))
    order = torch.tensor([4, 0, 3], device=device)
    close(normal(4, 0, SAMPLES.to(device)[order], 2, (3, 5, 7)), together[order].cpu(), **EXACT)


@case
def start_states(device: str) -> None:
    rows = torch.tensor([8, 0, 3, 3, 5])
    first, count = torch.tensor([6, 0, 3, 3, 3]), torch.tensor([3, 3, 3, 3, 1])
    names = (rows, SAMPLES, first, count)
    settings = {"seed": SEED, "epoch": EPOCH, "sigma": 1.7, "model_scale": 0.51}
    for dtype in (torch.float32, torch.float16):
        for shape in ((3, 5, 7), (4, 16, 16)):
            bank = draws(9, *shape).to(dtype)
            for mixup in (False, True):
                expected = start_state_reference(bank, *names, mixup=mixup, **settings)
                state, model_input = start_state(
                    *(tensor.to(device) for tensor in (bank, *names)),
                    mixup=mixup,
                    dtype=dtype,
                    **settings,
                )
                close(state, expected[0], rtol=1e-6, atol=5e-6)
                assert model_input.dtype == dtype
                close(model_input, expected[1], **HALF)
                nhwc_state, nhwc = start_state(
                    *(tensor.to(device) for tensor in (bank, *names)),
                    mixup=mixup,
                    dtype=dtype,
                    channels_last=True,
                    **settings,
                )
                assert nhwc.is_contiguous(memory_format=torch.channels_last)
                close(nhwc_state, state.cpu(), **EXACT)
                close(nhwc, model_input.cpu(), **EXACT)


@case
def mixup_weights_are_the_reference_bit_for_bit(device: str) -> None:
    """With bank (1, 0), where row 1 is row 0's class, and no noise, the state is gamma."""
    bank = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    samples = torch.cat((SAMPLES, torch.arange(100, 160)))
    zeros = torch.zeros_like(samples)
    names = bank, zeros, samples, zeros + 1, zeros + 1
    settings: dict[str, Any] = {"seed": SEED, "epoch": EPOCH, "sigma": 0.0, "model_scale": 1.0}
    gammas = []
    curved = torch.linspace(0, 1, 4097) ** 3
    for quantiles in (None, torch.tensor([0.0, 1.0]), curved, curved[::4096] * 0 + 0.3):
        ours = None if quantiles is None else quantiles.to(device)
        state, _ = start_state(
            *(tensor.to(device) for tensor in names), mixup=True, quantiles_Q=ours, **settings
        )
        expected = start_state_reference(*names, mixup=True, quantiles_Q=quantiles, **settings)
        close(state, expected[0], **EXACT)
        gammas.append(expected[0].flatten())
    close(gammas[1], gammas[0], **EXACT)
    close(gammas[2], gammas[0] ** 3, rtol=0.0, atol=1e-7)
    close(gammas[3], torch.full_like(gammas[0], 0.3), **EXACT)


@case
def euler_steps(device: str) -> None:
    settings = {"sigma": 1.6, "sigma_down": 0.4, "next_scale": 0.7, "seed": 6, "epoch": 2}
    for shape in ((3, 5, 7), (4, 16, 16)):
        state, eps = draws(10, *shape).split(5)
        for dtype in (torch.float32, torch.float16):
            for sigma_up in (0.0, 0.8):
                more = {"sigma_up": sigma_up, "step": 3, **settings}
                expected = euler_ancestral_step_reference(state, eps.to(dtype), SAMPLES, **more)
                ours = [state.to(device, copy=True), eps.to(device, dtype), SAMPLES.to(device)]
                actual = euler_ancestral_step(*ours, **more)
                close(actual[0], expected[0], rtol=1e-6, atol=5e-6)
                assert actual[1].dtype == dtype
                close(actual[1], expected[1], **HALF)
                euler_ancestral_step(*ours, **more, out=(ours[0], actual[1]))
                close(ours[0], actual[0].cpu(), **EXACT)


def schedule() -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Three steps, the last without noise, as a CPU table and as scalars."""
    columns = [14.6, 3.1, 0.7], [2.2, 0.3, 0.0], [2.184, 0.632, 0.0], [0.307, 0.819, 1.0]
    names = ("sigma", "sigma_down", "sigma_up", "next_scale")
    rows = zip(*columns, strict=True)
    scalars: list[dict[str, float]] = [dict(zip(names, row, strict=True)) for row in rows]
    return step_table(*columns, device="cpu"), scalars


@case
def table_steps_are_the_scalar_steps_bit_for_bit(device: str) -> None:
    table, scalars = schedule()
    epoch = torch.tensor([EPOCH], device=device)
    for shape in ((3, 5, 7), (4, 16, 16)):
        state, eps = (part.to(device) for part in draws(10, *shape).split(5))
        for dtype in (torch.float32, torch.float16):
            for step, sigmas in enumerate(scalars):
                ours = state, eps.to(dtype), SAMPLES.to(device)
                expected = euler_ancestral_step(*ours, **sigmas, seed=SEED, step=step, epoch=EPOCH)
                number = torch.tensor([step], device=device)
                named = table.to(device), number, epoch
                actual = euler_ancestral_table_step(*ours, *named, seed=SEED)
                close(actual[0], expected[0].cpu(), **EXACT)
                close(actual[1], expected[1].cpu(), **EXACT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("whole", [True, False], ids=["all steps", "one step"])
def test_one_graph_steps_through_a_schedule_at_any_epoch(whole: bool) -> None:
    """One capture, of all steps or of one to replay; eps = input / 3 replaces a network."""
    table, scalars = schedule()
    start = draws(5, 4, 16, 16).cuda()
    samples, steps = SAMPLES.cuda(), torch.arange(len(scalars), device="cuda")
    epoch, step = torch.zeros(1, dtype=torch.int64, device="cuda"), steps[:1].clone()
    buffers, table = (start.clone(), start.clone()), table.cuda()

    def advance(number: torch.Tensor) -> None:
        eps = buffers[1] / 3
        named = table, number, epoch
        euler_ancestral_table_step(buffers[0], eps, samples, *named, seed=SEED, out=buffers)

    def capture() -> None:
        for number in steps.split(1) if whole else [step]:
            advance(number)
        step.add_(1)

    capture()  # compiles the kernel, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capture()
    for at in (3, 4):
        for buffer in buffers:
            buffer.copy_(start)
        epoch.fill_(at)
        step.zero_()
        for _ in range(1 if whole else len(scalars)):
            graph.replay()
        state = model_input = start
        for number, sigmas in enumerate(scalars):
            state, model_input = euler_ancestral_step(
                state, model_input / 3, samples, **sigmas, seed=SEED, step=number, epoch=at
            )
        close(buffers[0], state.cpu(), **EXACT)
        close(buffers[1], model_input.cpu(), **EXACT)


@case
def upsampled_patches(device: str) -> None:
    for height, width, size in ((13, 13, 29), (8, 8, 8), (1, 1, 4), (9, 6, 5)):
        patches = (draws(2, height, width, 3) * 90 + 128).clamp(0, 255).byte()
        expected = upsample_patches_reference(patches, size)
        actual = upsample_patches(patches.to(device), size)
        close(actual, expected, rtol=0.0, atol=1e-5)
        half = upsample_patches(patches.to(device), size, dtype=torch.float16)
        close(half, expected, rtol=1e-3, atol=1e-4)


@case
def student_inputs(device: str) -> None:
    images = draws(4, 3, 33, 47) * 0.8
    boxes = torch.tensor([[0, 0, 33, 47], [3, 4, 20, 10], [10.25, 30.5, 5.5, 9], [32, 46, 1, 1]])
    flips = torch.tensor([False, True, True, False])
    moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for size in (7, 24):
        expected = student_input_reference(images, boxes, flips, size, *moments)
        ours = images.to(device), boxes.to(device), flips.to(device)
        actual = student_input(*ours, size, *moments)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        close(actual, expected, rtol=0.0, atol=1e-3)
        half = student_input(ours[0].half(), *ours[1:], size, *moments, dtype=torch.float16)
        close(half, expected, rtol=1e-3, atol=1e-2)
        # Boxes: all, inside, over two edges, empty. Pasted pixels equal the partner's bit for bit.
        boxes_4 = torch.tensor([[0, 0, 24, 24], [2, 3, 4, 2], [-4, 5, 9, 30], [5, 5, 0, 9]])
        partners = torch.tensor([3, 0, 1, 2])
        inside = torch.zeros(4, 1, size, size, dtype=torch.bool)
        for row, (top, left, high, wide) in enumerate(boxes_4.tolist()):
            inside[row, :, max(top, 0) : top + high, max(left, 0) : left + wide] = True
        cutmix = partners.to(device), boxes_4.to(device)
        mixed = student_input(*ours, size, *moments, cutmix=cutmix)
        pasted = torch.where(inside, actual.cpu()[partners], actual.cpu())
        close(mixed, pasted, **EXACT)
        reference = student_input_reference(
            images, boxes, flips, size, *moments, cutmix=(partners, boxes_4)
        )
        close(mixed, reference, rtol=0.0, atol=1e-3)


@case
def mosaics(device: str) -> None:
    patches = (draws(11, 5, 5, 3) * 90 + 128).clamp(0, 255).byte()
    for r, rows in ((1, [[10], [0]]), (2, [[0, 1, 2, 3], [10, 4, 4, 7]]), (3, [[*range(9)]])):
        chosen = torch.tensor(rows)
        for pixels in (patches, patches.half() / 255):
            actual = mosaic(pixels.to(device), chosen.to(device), r)
            close(actual, mosaic_reference(pixels, chosen, r), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    if interpreted[name] is not None:
        pytest.fail(str(interpreted[name]), pytrace=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    run_case(CASES[name], "cuda")


if __name__ == "__main__":
    interpret(CASES)
