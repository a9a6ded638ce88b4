"""Let an autoencoder begin as a linear transform: principal components in, block means out.

    encoder   pixels → 2×2 blocks → components → 2×2 blocks → … → the latents, of unit variance
    decoder   latents → the mean colour of their block, enlarged by repetition

An autoencoder that begins at random spends its first thousands of steps on what a linear transform
knows: on CIFAR-10 it reached 28 dB after 1200 steps and had dropped the red-green axis. From here
the steps go to detail. The decoder cannot begin with detail too: enlarging by repetition, as
AutoencoderKL does, no convolution tells the pixels of a block apart.

The residual branches begin at zero. Either network ends with GroupNorm and SiLU, which a value v
passes as the pair (v, -v): silu(v) - silu(-v) = v. Constants of ±HOLD share its group, so that the
group's norm hardly depends on the image.

Shapes: N images, f the factor, C latent channels, W a network's channels, B = N·(H/f)·(W/f) blocks.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

HOLD = 8.0
TAPS = tuple(product((0, 1), repeat=2))
"""Rows and columns of a kernel of stride 2 that see the pixels of its block."""


def norm_groups(vae_width: int) -> int:
    """GroupNorm's groups in an autoencoder of this width: eight channels hold three pairs."""
    return vae_width // 8


@torch.no_grad()
def start_linear(vae: AutoencoderKL, images_N3HW: Tensor) -> None:
    """Set the weights. Images in [-1, 1]; levels must differ in width, as those of PriorConfig."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            _bias(module.conv2).zero_()
    coder: Any = vae
    latents_NChw = _encoder(coder, images_N3HW)
    _decoder(coder, images_N3HW, latents_NChw)


def _encoder(vae: Any, images_N3HW: Tensor) -> Tensor:
    """Set the encoder's weights; the latents of the images."""
    encoder, channels = vae.encoder, vae.config["latent_channels"]
    _copy(encoder.conv_in, torch.eye(3, dtype=torch.float32))
    signals = images_N3HW
    for number, (block, below) in enumerate(
        zip(encoder.down_blocks, encoder.down_blocks[1:], strict=False)
    ):
        conv, last = block.downsamplers[0].conv, number == len(encoder.down_blocks) - 2
        blocks = torch.cat([signals[:, :, row::2, column::2] for row, column in TAPS], dim=1)
        count = channels if last else min(blocks.shape[1], len(conv.weight))
        matrix, offset = _components(blocks, count, scaled=last)
        signals = torch.einsum("ij,njhw->nihw", matrix, blocks) + offset[:, None, None]
        conv.weight[:count] = 0
        parts = matrix.split(matrix.shape[1] // len(TAPS), dim=1)
        for (row, column), part in zip(TAPS, parts, strict=True):
            conv.weight[:count, : part.shape[1], row, column] = part
        conv.bias[:count] = offset
        if not last:
            _copy(below.resnets[0].conv_shortcut, torch.eye(count, dtype=torch.float32))
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
    ones = torch.ones(channels, dtype=torch.float32)
    _pass(shortcut, encoder.conv_norm_out, encoder.conv_out, ones)
    _copy(vae.quant_conv, torch.eye(channels, dtype=torch.float32))
    return signals


def _decoder(vae: Any, images_N3HW: Tensor, latents_NChw: Tensor) -> None:
    """Set the decoder's weights: least squares from latents of unit variance to mean colours."""
    decoder, factor = vae.decoder, images_N3HW.shape[-1] // latents_NChw.shape[-1]
    _copy(vae.post_quant_conv, torch.eye(latents_NChw.shape[1], dtype=torch.float32))
    colours_B3 = _rows(avg_pool2d(images_N3HW, factor))
    latents_BC, mean_3 = _rows(latents_NChw), colours_B3.mean(0)
    _copy(decoder.conv_in, (colours_B3 - mean_3).T @ latents_BC / len(latents_BC), mean_3)
    *above, last = decoder.up_blocks
    same = torch.eye(3, dtype=torch.float32)
    for block in above:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _copy(resnet.conv_shortcut, same)
        _copy(block.upsamplers[0].conv, same)
    power_3 = images_N3HW.square().mean((0, 2, 3))
    _pass(last.resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, power_3)


def _components(blocks_NDhw: Tensor, count: int, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """Matrix [count, D] and offset [count] to the first principal components, of mean 0."""
    rows_BD = _rows(blocks_NDhw)
    mean_D = rows_BD.mean(0)
    centred_BD = rows_BD - mean_D
    covariance_DD = (centred_BD.T @ centred_BD / len(rows_BD)).double()
    variances_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    matrix = vectors_DD.flip(1)[:, :count].T
    if scaled:  # a component that the data does not have stays 0
        matrix = matrix / variances_D.flip(0)[:count].clamp(min=1e-6).sqrt()[:, None]
    matrix = matrix.float()
    return matrix, -matrix @ mean_D


def _rows(values_NDhw: Tensor) -> Tensor:
    return values_NDhw.movedim(1, -1).flatten(0, 2)


def _copy(conv: nn.Conv2d, matrix_OI: Tensor, offset_O: Tensor | None = None) -> None:
    """Let the first O channels of a convolution be this product; the others stay random."""
    outputs, inputs = matrix_OI.shape
    centre, bias = conv.kernel_size[0] // 2, _bias(conv)
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :inputs, centre, centre] = matrix_OI
    bias[:outputs] = 0 if offset_O is None else offset_O


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _pass(shortcut: nn.Conv2d, norm: nn.GroupNorm, out: nn.Conv2d, power_S: Tensor) -> None:
    """Let the first S inputs of `shortcut` pass norm, SiLU and `out`; power: their mean squares."""
    size = norm.num_channels // norm.num_groups
    centre, bias = out.kernel_size[0] // 2, _bias(shortcut)
    bias[::2], bias[1::2] = HOLD, -HOLD
    for zero in (shortcut.weight, out.weight, _bias(out)):
        zero.zero_()
    squares_W = bias.square()
    placed = [(s % norm.num_groups) * size + s // norm.num_groups * 2 for s in range(len(power_S))]
    for signal, at in enumerate(placed):
        bias[at : at + 2] = 0
        squares_W[at : at + 2] = power_S[signal]
        for channel, sign in ((at, 1.0), (at + 1, -1.0)):
            shortcut.weight[channel, signal] = sign
            out.weight[signal, channel, centre, centre] = sign
    scale_W = squares_W.view(norm.num_groups, size).mean(1).sqrt().repeat_interleave(size)
    for at in placed:
        norm.weight[at : at + 2] = scale_W[at : at + 2]
