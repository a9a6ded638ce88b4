"""GroupNorm with SiLU, and GEGLU: formulas on the CPU, kernels in the interpreter and on a GPU.

``test_kernels_triton.py`` explains the cases, the interpreter's process and the poisoned memory.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernel_cases import Case, interpret, run_case
from patchbloom.engine.expand.fused_layers import fuse
from patchbloom.kernels import group_norm as group_norm_file
from patchbloom.kernels.geglu import geglu, geglu_reference
from patchbloom.kernels.group_norm import group_norm, group_norm_reference, plan_slabs
from patchbloom.kernels.noise import normal_reference
from small_networks import new_parts
from torch.nn.functional import gelu, silu
from torch.nn.functional import group_norm as torch_group_norm

CASES: dict[str, Case] = {}
SHAPES = (
    (2, 8, 3, 5, 4), (1, 30, 9, 7, 3), (2, 7, 5, 1, 7), (1, 96, 2, 3, 1), (1, 320, 5, 5, 32),
    (1, 350, 3, 3, 5),
)  # fmt: skip
"""B, C, H, W, groups."""
ON_CHIP = {"ON_CHIP": 2**15}
IN_SLABS = {"ON_CHIP": 64, "TILE": 512, "MOST_SLABS": 3}
"""With these, small images too go in slabs of many tiles, the last of them not full."""
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
HALF = {"rtol": 1e-3, "atol": 1e-3}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def draws(*shape: int) -> torch.Tensor:
    """Test data, the same in every process; images are channels_last."""
    numbers = normal_reference(78, 0, torch.arange(shape[0]), 0, shape[1:])
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def affine(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = draws(2, channels)
    return weight + 1, bias


def norms_agree(
    x: torch.Tensor, groups: int, device: str, *, eps: float = 1e-5, with_silu: bool, **near: float
) -> None:
    """Launcher and reference agree, and the layout is kept."""
    ours, settings = affine(x.shape[1]), {"eps": eps, "silu": with_silu}
    expected = group_norm_reference(x, groups, *ours, **settings)
    named = x.to(device), groups, *(tensor.to(device) for tensor in ours)
    actual = group_norm(*named, **settings)
    assert actual.dtype == x.dtype
    assert actual.stride() == x.stride()
    torch.testing.assert_close(actual.cpu().float(), expected, **near)


def check_odd_shapes(device: str) -> None:
    """In fp32 the variance is below eps. The interpreter truncates bf16, so only a GPU has it."""
    for *shape, groups in SHAPES:
        x = draws(*shape)
        norms_agree(x * 0.003, groups, device, with_silu=False, **SINGLE)
        norms_agree(x.half(), groups, device, with_silu=True, **HALF)
        if device == "cuda":
            norms_agree(x.bfloat16(), groups, device, with_silu=True, rtol=1e-2, atol=1e-2)


@case
def norms_on_chip(device: str) -> None:
    check_odd_shapes(device)


@case
def norms_in_slabs(device: str) -> None:
    norms_agree(draws(1, 5, 91, 101), 1, device, with_silu=True, **SINGLE)
    with patch.multiple(group_norm_file, **IN_SLABS):
        check_odd_shapes(device)


@case
def norms_of_large_means(device: str) -> None:
    """At 300 ± 2, sums of squares would lose the variance in fp32, and any sum in fp16."""
    x = draws(2, 16, 9, 7) * 2 + 300
    for constants in (ON_CHIP, IN_SLABS):
        with patch.multiple(group_norm_file, **constants):
            norms_agree(x, 4, device, with_silu=False, rtol=1e-4, atol=1e-4)
            norms_agree(x.half(), 4, device, with_silu=False, **HALF)


@case
def an_image_ignores_its_neighbours(device: str) -> None:
    """A kernel's result keeps its bits; torch's sums, in the reference, depend on the batch."""
    x, ours = draws(3, 320, 5, 5).to(device), [part.to(device) for part in affine(320)]
    for constants in (ON_CHIP, IN_SLABS):
        with patch.multiple(group_norm_file, **constants):
            together = group_norm(x, 32, *ours, eps=1e-5, silu=True)
            for row in range(3):
                alone = group_norm(x[row : row + 1].clone(), 32, *ours, eps=1e-5, silu=True)
                assert torch.equal(alone[0], together[row])


@case
def rows_are_images(device: str) -> None:
    rows, ours = draws(2, 35, 12).to(device), [part.to(device) for part in affine(12)]
    found = group_norm(rows.transpose(1, 2), 3, *ours, eps=1e-5).transpose(1, 2)
    assert found.is_contiguous()
    image = rows.transpose(1, 2).unflatten(2, (5, 7))
    assert torch.equal(found, group_norm(image, 3, *ours, eps=1e-5).flatten(2).transpose(1, 2))
    assert group_norm(image[:0], 3, *ours, eps=1e-5).shape == (0, 12, 5, 7)


@case
def geglus(device: str) -> None:
    """Gates of 30 would overflow a tanh's cube in fp16; 515 columns need two programs."""
    for shape in ((3, 5, 2), (7, 26), (1, 3, 1030)):
        x = draws(*shape) * 10
        torch.testing.assert_close(
            geglu(x.to(device)).cpu(), geglu_reference(x), rtol=1e-5, atol=1e-5
        )
        half = geglu(x.half().to(device)).cpu()
        torch.testing.assert_close(half.float(), geglu_reference(x.half()), rtol=1e-3, atol=1e-3)
    assert geglu(torch.empty(0, 4, device=device)).shape == (0, 2)


@case
@torch.no_grad()
def fused_networks(device: str) -> None:
    """The small networks' results are the stock ones', whatever kernel or reference computes."""
    parts = new_parts()
    unet, vae = parts.unet, parts.vae
    x, text = draws(1, 4, 8, 8), draws(1, 3, 32)
    added = {"text_embeds": draws(1, 16), "time_ids": draws(1, 6)}
    stock = unet(x, 500, text, added_cond_kwargs=added).sample, vae.decode(x).sample
    encoded = vae.encode(stock[1]).latent_dist.parameters
    for part in (unet, vae):
        part.to(device)
    fuse(parts)
    x, text, added = x.to(device), text.to(device), {k: v.to(device) for k, v in added.items()}
    ours = unet(x, 500, text, added_cond_kwargs=added).sample, vae.decode(x).sample
    assert ours[0].is_contiguous()
    ours = *ours, vae.encode(stock[1].to(device)).latent_dist.parameters
    for actual, expected in zip(ours, (*stock, encoded), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    if interpreted[name] is not None:
        pytest.fail(str(interpreted[name]), pytrace=False)


def test_fused_networks_with_the_references() -> None:
    fused_networks("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    run_case(CASES[name], "cuda")


@pytest.mark.parametrize("with_silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_torchs_in_float64(shape: tuple[int, ...], with_silu: bool) -> None:
    *sizes, groups = shape
    for shift, tolerance in ((0.0, 1e-5), (300.0, 1e-3)):
        x, ours = draws(*sizes) + shift, affine(sizes[1])
        expected = torch_group_norm(x.double(), groups, *(part.double() for part in ours), 1e-5)
        found = group_norm_reference(x, groups, *ours, eps=1e-5, silu=with_silu)
        expected = silu(expected) if with_silu else expected
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_gelu_is_exact() -> None:
    rows = torch.linspace(-6, 6, 401).repeat(2, 1)
    expected = rows[0].double() * gelu(rows[0].double())
    torch.testing.assert_close(
        geglu_reference(rows.view(-1)).double(), expected, rtol=1e-5, atol=1e-5
    )
    assert (geglu(rows.view(-1)) - rows[0] * gelu(rows[0], approximate="tanh")).abs().max() > 1e-4


def test_large_groups_go_in_slabs() -> None:
    """SDXL at 224 px: the UNet stays on chip, the decoder's large images do not."""
    for pixels, channels in ((28**2, 30), (14**2, 60), (7**2, 80)):
        assert plan_slabs(pixels, channels, 32)[2] == 0
    for pixels, channels in ((224**2, 4), (224**2, 8), (512**2, 8), (1, 40_000)):
        tile, slab, slabs = plan_slabs(pixels, channels, 32)
        assert 1 <= slabs <= 64
        assert (slabs - 1) * slab < pixels <= slabs * slab
        assert slab % tile["PIXELS"] == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_BCX": torch.zeros(1, 4, 3, 3).double()}, TypeError, "x_BCX: expected float32"),
        ({"x_BCX": torch.zeros(2, 4, 3, 3)}, ValueError, "channels innermost"),
        ({"groups": 3}, ValueError, "divisor of 4 channels, got 3"),
        ({"weight_C": torch.ones(3)}, ValueError, r"weight_C: expected shape \[4\], got \[3\]"),
        ({"bias_C": torch.ones(4).int()}, TypeError, "bias_C: expected float32"),
    ],
)
def test_wrong_arguments_are_named(change: Any, error: type[Exception], message: str) -> None:
    x = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    right = {"x_BCX": x, "groups": 2, "weight_C": torch.ones(4), "bias_C": torch.ones(4)}
    group_norm(**right, eps=1e-5)
    with pytest.raises(error, match=message):
        group_norm(**{**right, **change}, eps=1e-5)
    with pytest.raises(ValueError, match="rows of even length, got 3"):
        geglu(torch.zeros(2, 3))


if __name__ == "__main__":
    interpret(CASES)
