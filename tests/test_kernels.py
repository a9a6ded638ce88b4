"""Formulas of the kernels: their torch and numpy references, on the CPU.

``test_kernels_triton.py`` compares the Triton kernels with these references.
"""

import math

import numpy as np
import pytest
import torch
from patchbloom.kernels.latents import start_state
from patchbloom.kernels.mosaic import mosaic
from patchbloom.kernels.noise import (
    Draw,
    normal,
    philox_reference,
    uniform,
    uniform_numpy,
    unit_numpy,
    unit_reference,
)
from patchbloom.kernels.pixels import upsample_patches
from patchbloom.kernels.sampler import euler_ancestral_step
from patchbloom.kernels.student_input import student_input, student_input_reference
from patchbloom.kernels.table_step import euler_ancestral_table_step, step_table
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import normalize, resized_crop

# rounds, counter, key, output: Random123 1.14, tests/kat_vectors, "philox4x32".
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
EDGE_WORDS = [0, 1, 2**24 + 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _philox(array, counter: list[int], key: list[int], rounds: int) -> list[int]:
    group, draw, sample, epoch = counter
    seed = key[0] | key[1] << 32
    words = philox_reference(seed, array([group]), draw, array([sample]), epoch, rounds=rounds)
    return [int(word[0]) for word in words]


@pytest.mark.parametrize("array", [torch.tensor, np.array])
@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(array, rounds, counter, key, expected):
    assert _philox(array, _words(counter), _words(key), rounds) == _words(expected)


@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_nine_rounds_fail_the_known_answers(array):
    for rounds, counter, key, expected in KNOWN_ANSWERS:
        assert _philox(array, _words(counter), _words(key), rounds - 1) != _words(expected)


def test_draws_are_frozen():
    """Stored artefacts depend on these values."""
    assert {draw.name: draw.value for draw in Draw} == {
        "START": 0, "POSTERIOR": 1, "MIXUP_PARTNER": 2, "MIXUP_WEIGHT": 3, "SCORING_CROP": 4,
        "STUDENT_CROP": 5, "FLIP": 6, "CUTMIX": 7, "ORDER": 8, "PATCH_SHUFFLE": 9,
        "TEACHER_CROP": 10, "SELECTION": 11, "PRIOR": 12, "REFRESH": 13, "AUGMENTATION": 14,
        "LATIN": 15, "FEATURES": 16, "NOISED": 17, "CEILING": 18, "ANCESTRAL": 64,
    }  # fmt: skip


def test_uniforms_stay_inside_the_open_interval():
    of_torch = unit_reference(torch.tensor(EDGE_WORDS)).numpy()
    of_numpy = unit_numpy(np.array(EDGE_WORDS))
    np.testing.assert_array_equal(of_torch, of_numpy)
    assert of_torch[0] == 2.0**-33
    assert of_torch[-1] == of_torch[-2] == 1.0 - 2.0**-24
    assert of_torch[-3] == 1.0 - 2.0**-24, "2^32 - 129 rounds to 2^32 - 256"


def test_torch_and_numpy_agree():
    seed, epoch = 2**64 - 3, 2**32 - 1
    samples = torch.tensor([0, 5, 2**31, 2**32 - 1])
    for count in (1, 2, 3, 4, 5, 1023):
        of_torch = uniform(seed, Draw.FLIP, samples, epoch, count)
        of_numpy = uniform_numpy(seed, Draw.FLIP, samples.numpy(), epoch, count)
        np.testing.assert_array_equal(of_torch.numpy(), of_numpy)


def test_normals_follow_box_muller():
    """Compare with float64 from the same words, in the documented lane order."""
    words = philox_reference(9, np.arange(1000), Draw.PRIOR, np.array([[4]]), 2)
    u0, u1, u2, u3 = (unit_numpy(word[0]).astype(np.float64) for word in words)
    radius, angle = np.sqrt(-2 * np.log(u0)), 2 * np.pi * u1
    second_radius, second_angle = np.sqrt(-2 * np.log(u2)), 2 * np.pi * u3
    lanes = radius * np.cos(angle), radius * np.sin(angle)
    more = second_radius * np.cos(second_angle), second_radius * np.sin(second_angle)
    expected = np.stack((*lanes, *more), axis=-1).reshape(-1)
    actual = normal(9, Draw.PRIOR, torch.tensor([4]), 2, (4000,))[0].numpy()
    assert np.abs(actual - expected).max() <= 2e-6


def test_a_number_ignores_its_neighbours():
    samples = torch.tensor([3, 900, 17, 2**32 - 1, 0, 41, 42])
    together = normal(1, Draw.START, samples, 7, (4, 5, 7))
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(normal(1, Draw.START, samples[order], 7, (4, 5, 7)), together[order])
    for row, sample in enumerate(samples):
        assert torch.equal(normal(1, Draw.START, sample[None], 7, (4, 5, 7))[0], together[row])
    longer = normal(1, Draw.START, samples, 7, (200,))
    assert torch.equal(longer[:, :140], together.flatten(1))
    assert normal(1, Draw.START, samples, 7, (3, 5, 7)).is_contiguous()
    many = normal(1, Draw.START, torch.arange(1000), 7, (4, 5, 7))
    assert torch.equal(many[17], together[2])


def test_every_part_of_the_name_counts():
    base = {"seed": 1, "draw": 2, "sample": 3, "epoch": 4}
    names = [base]
    names += [{**base, part: value + 1} for part, value in base.items()]
    names += [{**base, "seed": 1 + 2**32}]
    drawn = [
        normal(n["seed"], n["draw"], torch.tensor([n["sample"]]), n["epoch"], (64,)) for n in names
    ]
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert (first - second).abs().mean() > 0.5


def test_normal_writes_into_out_and_casts():
    samples = torch.arange(3)
    out = torch.full((3, 5), math.nan, dtype=torch.float16)
    assert normal(1, 0, samples, 0, (5,), out=out) is out
    assert torch.equal(out, normal(1, 0, samples, 0, (5,)).half())
    assert normal(1, 0, samples, 0, (5,), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert normal(1, 0, samples[:0], 0, (5,)).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"epoch": 2**32}, ValueError, "epoch"),
        ({"draw": -1}, ValueError, "draw"),
        ({"samples_B": torch.arange(3, dtype=torch.int32)}, TypeError, "expected int64, got int32"),
        ({"samples_B": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"expected shape \[B\]"),
        ({"samples_B": torch.arange(6)[::2]}, ValueError, "contiguous"),
        ({"out": torch.empty(3, 6)}, ValueError, r"out: expected shape \[3, 5\], got \[3, 6\]"),
        ({"out": torch.empty(3, 5, dtype=torch.int64)}, TypeError, "out: expected float32"),
        ({"out": torch.empty(3, 5, device="meta")}, ValueError, "expected on cpu, got meta"),
    ],
)
def test_normal_refuses_what_it_cannot_read(change, error, message):
    good = {"seed": 0, "draw": 0, "samples_B": torch.arange(3), "epoch": 0, "shape": (5,)}
    with pytest.raises(error, match=message):
        normal(**{**good, **change})


def test_start_state_without_mixup_is_image_plus_noise():
    bank = torch.randn(6, 4, 3, 5).half()
    rows, samples = torch.tensor([5, 0, 0]), torch.tensor([50, 1, 2])
    nothing = torch.zeros_like(rows)
    state, model_input = start_state(
        bank, rows, samples, nothing, nothing + 6,
        seed=3, epoch=4, sigma=2.5, mixup=False, model_scale=0.25, dtype=torch.float16,
    )  # fmt: skip
    expected = bank[rows].float() + 2.5 * normal(3, Draw.START, samples, 4, (4, 3, 5))
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model_input, (expected * 0.25).half())


def test_start_state_writes_either_layout():
    """channels_last changes the model input's strides, not its values; ``out`` sets its own."""
    bank, rows = torch.randn(6, 4, 3, 5), torch.tensor([5, 0, 2])
    whole = torch.zeros_like(rows), torch.full_like(rows, 6)
    settings = {"seed": 3, "epoch": 4, "sigma": 2.5, "mixup": True, "model_scale": 0.25}
    for dtype in (torch.float32, torch.float16):
        ours = bank.to(dtype), rows, rows, *whole
        state, planes = start_state(*ours, **settings, dtype=dtype)
        nhwc_state, nhwc = start_state(*ours, **settings, dtype=dtype, channels_last=True)
        assert planes.is_contiguous()
        assert nhwc.is_contiguous(memory_format=torch.channels_last)
        assert nhwc_state.is_contiguous()
        assert torch.equal(nhwc_state, state)
        assert torch.equal(nhwc, planes)
        buffers = torch.full_like(state, math.nan), torch.full_like(nhwc, math.nan)
        start_state(*ours, **settings, out=buffers)
        assert torch.equal(buffers[1], planes)
    with pytest.raises(ValueError, match=r"out\[1\]: expected a contiguous tensor"):
        start_state(*ours, **settings, out=(state, planes.transpose(2, 3).contiguous().mT))


def test_mixup_stays_in_the_class_and_is_uniform():
    """Without noise, a bank whose latents are row numbers reveals partner and weight."""
    batch, count = 4000, 7
    bank = torch.stack((torch.arange(30.0), torch.ones(30)), dim=1)[:, :, None, None]
    bank = torch.cat((bank, bank**2), dim=1)
    samples = torch.arange(batch)
    first = torch.full_like(samples, 11)
    row = torch.full_like(samples, 14)
    state, _ = start_state(
        bank, row, samples, first, torch.full_like(samples, count),
        seed=8, epoch=1, sigma=0.0, mixup=True, model_scale=1.0,
    )  # fmt: skip
    gamma = uniform_numpy(8, Draw.MIXUP_WEIGHT, samples.numpy(), 1, 1)[:, 0].astype(np.float64)
    partner = (state[:, 0, 0, 0].double().numpy() - gamma * 14) / (1 - gamma)
    clear = gamma < 0.99
    rows = np.rint(partner[clear])
    np.testing.assert_allclose(partner[clear], rows, atol=1e-2)
    assert set(rows) == set(range(11, 11 + count))
    counts = np.unique(rows, return_counts=True)[1]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 22.5, "chi-square, p < 0.001"
    assert abs(gamma.mean() - 0.5) < 5 * math.sqrt(1 / 12 / batch)
    expected = gamma * 14**2 + (1 - gamma) * np.rint(partner) ** 2
    np.testing.assert_allclose(state[clear, 2, 0, 0].numpy(), expected[clear], rtol=1e-5)


@pytest.mark.parametrize(
    ("quantiles", "error", "message"),
    [
        (torch.tensor([0.5]), ValueError, "quantiles_Q: expected 2 knots or more, got 1"),
        (torch.tensor([0, 1]), TypeError, "quantiles_Q: expected float32, got int64"),
        (torch.ones(2, 2), ValueError, r"quantiles_Q: expected shape \[Q\]"),
    ],
)
def test_start_state_refuses_a_table_that_is_none(quantiles, error, message):
    rows = torch.arange(3)
    with pytest.raises(error, match=message):
        start_state(
            torch.ones(3, 4, 2, 2), rows, rows, rows, rows,
            seed=1, epoch=0, sigma=0.0, mixup=True, model_scale=1.0, quantiles_Q=quantiles,
        )  # fmt: skip


def test_mixup_in_a_class_of_one_changes_nothing():
    bank = torch.randn(3, 4, 2, 2)
    rows = torch.arange(3)
    ones = torch.ones_like(rows)
    state, _ = start_state(
        bank, rows, rows, rows, ones, seed=1, epoch=0, sigma=0.0, mixup=True, model_scale=1.0
    )
    torch.testing.assert_close(state, bank)


def test_sampler_takes_the_steps_of_diffusers(monkeypatch):
    """A whole schedule of SDXL-Turbo, with our noise in both."""
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as theirs

    scheduler = theirs.EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    samples, shape = torch.tensor([9, 4]), (4, 3, 5)
    state = normal(1, Draw.START, samples, 0, shape) * scheduler.init_noise_sigma
    their_state, sigmas = state.clone(), scheduler.sigmas.double()
    for step, timestep in enumerate(scheduler.timesteps):
        sigma, following = sigmas[step].item(), sigmas[step + 1].item()
        up = math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
        down = math.sqrt(following**2 - up**2)
        eps = normal(2, 200 + step, samples, 0, shape)
        noise = normal(1, Draw.ANCESTRAL + step, samples, 3, shape)
        monkeypatch.setattr(theirs, "randn_tensor", lambda *_, noise=noise, **__: noise)
        scheduler.scale_model_input(their_state, timestep)
        their_state = scheduler.step(eps, timestep, their_state, return_dict=False)[0]
        scale = 1 / math.sqrt(following**2 + 1)
        state, model_input = euler_ancestral_step(
            state, eps, samples, sigma=sigma, sigma_down=down, sigma_up=up, next_scale=scale,
            seed=1, step=step, epoch=3,
        )  # fmt: skip
        torch.testing.assert_close(state, their_state, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(model_input, their_state * scale, rtol=1e-6, atol=1e-5)


def test_sampler_steps_in_place():
    state, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    step = {"sigma": 2.0, "sigma_down": 1.0, "sigma_up": 0.5, "next_scale": 0.3}
    names = {"samples_B": torch.arange(2), "seed": 1, "step": 0, "epoch": 0}
    expected = euler_ancestral_step(state, eps, **step, **names)
    buffers = state, torch.full_like(eps, math.nan)
    euler_ancestral_step(state, eps, **step, **names, out=buffers)
    assert torch.equal(state, expected[0])
    assert torch.equal(buffers[1], expected[1])
    with pytest.raises(TypeError, match="state_BCHW: expected float32, got float16"):
        euler_ancestral_step(state.half(), eps, **step, **names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_table_steps_are_the_scalar_steps_bit_for_bit(dtype):
    """Every step of a schedule from one table, in place; the last draws no noise."""
    columns = [14.6, 3.1, 0.7], [2.2, 0.3, 0.0], [2.184, 0.632, 0.0], [0.307, 0.819, 1.0]
    table = step_table(*columns, device="cpu")
    samples, seed, epoch = torch.tensor([3, 2**32 - 1]), 2**64 - 5, 2**32 - 1
    state = torch.randn(2, 4, 3, 5)
    state[0, 0, 0, 0] = -0.0
    buffers = state.clone(), torch.full_like(state, math.nan, dtype=dtype)
    names = ("sigma", "sigma_down", "sigma_up", "next_scale")
    for step, row in enumerate(zip(*columns, strict=True)):
        eps = torch.randn(2, 4, 3, 5).to(dtype)
        sigmas = dict(zip(names, row, strict=True))
        state, model_input = euler_ancestral_step(
            state, eps, samples, **sigmas, seed=seed, step=step, epoch=epoch
        )
        named = table, torch.tensor([step]), torch.tensor([epoch])
        euler_ancestral_table_step(buffers[0], eps, samples, *named, seed=seed, out=buffers)
        assert torch.equal(buffers[0].view(torch.int32), state.view(torch.int32))
        assert torch.equal(buffers[1], model_input)
    with pytest.raises(ValueError, match=r"step_1: expected shape \[1\], got \[\]"):
        euler_ancestral_table_step(
            state, eps, samples, table, torch.tensor(0), torch.tensor([0]), seed=seed
        )
    with pytest.raises(ValueError, match="zip"):
        step_table([1.0, 2.0], *columns[1:], device="cpu")


@pytest.mark.parametrize(("side_px", "size_px"), [(32, 64), (13, 29), (8, 8), (1, 4), (20, 7)])
def test_upsample_is_torch_interpolate(side_px, size_px):
    patches = torch.randint(0, 256, (2, side_px, side_px, 3), dtype=torch.uint8)
    unit = patches.permute(0, 3, 1, 2).double() / 127.5 - 1.0
    expected = interpolate(unit, size=(size_px, size_px), mode="bicubic").clamp(-1.0, 1.0)
    actual = upsample_patches(patches, size_px)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    assert upsample_patches(patches, size_px, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("size_px", [7, 24, 64])
def test_student_input_is_torchvision(size_px):
    images = torch.rand(6, 3, 33, 47) * 2.4 - 1.2
    boxes = torch.tensor(
        [
            [0, 0, 33, 47],
            [3, 4, 20, 10],
            [10, 30, 5, 17],
            [32, 46, 1, 1],
            [0, 0, 7, 47],
            [9, 9, 24, 24],
        ]
    )
    flips = torch.tensor([False, True, False, True, True, False])
    actual = student_input(images, boxes.float(), flips, size_px, IMAGENET_MEAN, IMAGENET_STD)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    for index, (top, left, height, width) in enumerate(boxes.tolist()):
        unit = (images[index].clamp(-1, 1) + 1) / 2
        crop = resized_crop(unit, top, left, height, width, [size_px, size_px], antialias=False)
        if flips[index]:
            crop = crop.flip(-1)
        expected = normalize(crop, list(IMAGENET_MEAN), list(IMAGENET_STD))
        torch.testing.assert_close(actual[index], expected, rtol=0, atol=1e-3)


PASTED = [
    [0, 0, 24, 24], [3, 5, 7, 2], [-4, 20, 9, 30], [23, 23, 1, 1], [5, 5, 0, 9], [30, 0, 4, 4],
]  # fmt: skip
"""(top, left, height, width) in 24 x 24 px: all, inside, over two edges, corner, empty, outside."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cutmix_is_pasting_views(dtype):
    images = (torch.rand(6, 3, 33, 47) * 2.4 - 1.2).to(dtype)
    boxes = torch.tensor([[0, 0, 33, 47], [3, 4, 20, 10], [10, 30, 5, 17]]).repeat(2, 1).float()
    flips = torch.tensor([False, True, False, True, True, False])
    partners = torch.tensor([3, 0, 5, 1, 2, 0])
    named = images, boxes, flips, 24, IMAGENET_MEAN, IMAGENET_STD
    expected = student_input(*named, dtype=dtype)
    alone = expected.clone()
    for row, (top, left, height, width) in enumerate(PASTED):
        down = slice(max(top, 0), max(top + height, 0))
        right = slice(max(left, 0), max(left + width, 0))
        expected[row, :, down, right] = alone[partners[row], :, down, right]
    actual = student_input(*named, cutmix=(partners, torch.tensor(PASTED)), dtype=dtype)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, alone)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="pasted_B4: expected int64, got float32"):
        student_input(*named, cutmix=(partners, torch.tensor(PASTED).float()))


@pytest.mark.parametrize("mixed", [False, True])
def test_student_input_passes_gradients_to_the_images(mixed):
    images = torch.rand(6, 3, 9, 11) * 2.4 - 1.2
    boxes = torch.tensor([[0, 0, 9, 11], [3, 4, 2.5, 5], [8, 10, 1, 1]]).repeat(2, 1)
    flips = torch.tensor([False, True, False, True, True, False])
    cutmix = (torch.tensor([3, 0, 5, 1, 2, 0]), torch.tensor(PASTED)) if mixed else None
    weights = torch.randn(6, 3, 24, 24)
    found = []
    for run in (student_input, student_input_reference):
        ours = images.clone().requires_grad_()
        views = run(ours, boxes, flips, 24, IMAGENET_MEAN, IMAGENET_STD, cutmix=cutmix)
        (views * weights).sum().backward()
        found.append(ours.grad)
    assert (found[1] != 0).any()
    assert (found[1] == 0).any(), "a clamped value passes nothing"
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_student_input_refuses_a_wrong_normalisation():
    images, boxes = torch.zeros(1, 3, 4, 4), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(ValueError, match="expected 3 numbers each, got 1 and 3"):
        student_input(images, boxes, torch.tensor([False]), 4, (0.5,), IMAGENET_STD)


def _pixels(dtype, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_mosaic_lays_tiles_in_row_major_order(dtype):
    patches = _pixels(dtype, 11, 5, 5, 3)
    rows = torch.tensor([[0, 1, 2, 3], [10, 4, 4, 7]])
    canvases = mosaic(patches, rows, 2)
    assert canvases.shape == (2, 10, 10, 3)
    for canvas, tiles in zip(canvases, rows, strict=True):
        assert torch.equal(canvas[:5, :5], patches[tiles[0]])
        assert torch.equal(canvas[:5, 5:], patches[tiles[1]])
        assert torch.equal(canvas[5:, :5], patches[tiles[2]])
        assert torch.equal(canvas[5:, 5:], patches[tiles[3]])
    assert torch.equal(mosaic(patches, torch.arange(11)[:, None], 1), patches)
    with pytest.raises(ValueError, match=r"rows: expected shape \[B, 9\], got \[2, 4\]"):
        mosaic(patches, rows, 3)
