"""Samples of a prior in the steps it was distilled for, beside the images they are to look like.

Shapes: B latents of one class, z_B4hw of unit variance, states x = z + sigma·n (diffusers').
"""

from __future__ import annotations

import torch
from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from ...engine.data.images import to_pixels
from ..teacher.teacher import Teacher
from .losses import Conditioning, predict, sampled_steps


@torch.no_grad()
def samples_of_class(
    unet: UNet2DConditionModel,
    scheduler: EulerAncestralDiscreteScheduler,
    conditioning: Conditioning,
    real_B4hw: Tensor,
    label: int,
    *,
    steps: int,
    size_px: int,
    seed: int,
) -> Tensor:
    """[2B, 4, h, w]: B samples from real latents, with all steps but the first, and B from noise.

    Of one step the first B keep none and are the latents themselves.
    """
    device, count = real_B4hw.device, len(real_B4hw)
    visited = sampled_steps(scheduler, steps, device)
    low = scheduler.sigmas[1:].float().to(device)
    up = (low.square() - visited.sigmas_down.square()).clamp(min=0).sqrt()
    draw = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw).to(device)

    states = torch.cat(
        [real_B4hw + low[0] * noise(real_B4hw), noise(real_B4hw) * visited.sigmas[0]]
    )
    prompts = torch.full((2 * count,), label, device=device)
    side = float(size_px)
    ids = torch.tensor([side, side, 0, 0, side, side], device=device).repeat(2 * count, 1)
    for k, (t, high, down) in enumerate(
        zip(visited.timesteps, visited.sigmas, visited.sigmas_down, strict=True)
    ):
        first = count if k == 0 else 0
        part = states[first:]
        rows = len(part)
        eps = predict(
            *(unet, part, high.repeat(rows), t.repeat(rows)),
            *(prompts[:rows], ids[:rows], conditioning),
        )
        states[first:] = part + eps * (down - high) + up[k] * noise(part)
    return states


def recognised_percent(teacher: Teacher, images_BCHW: Tensor, label: int) -> float:
    """Share of images in [-1, 1] that the teacher takes for class `label`, in percent, to 0.1."""
    answers = teacher.logits_from_uint8(to_pixels(images_BCHW)).argmax(1)
    return round(100 * (answers == label).float().mean().item(), 1)
