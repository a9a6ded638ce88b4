"""Losses of the four training phases of a small latent diffusion prior, and its samples.

1. `vae`       autoencoder: L1 on pixels and on their gradients, posterior of fixed width.
2. `denoiser`  epsilon prediction, weighted (1 + sigma²) so that errors count alike at every noise
               level (the v-prediction loss of Salimans & Ho 2022), prompt dropped for 10 % of
               the samples.
3. `guidance`  the guided prediction u + w·(c - u) regressed into one unguided eval (Meng et al.
               2023).
4. `few_step`  at the timesteps that the sampler really visits, one eval regressed onto what the
               model of phase 3 reaches in several small deterministic steps (progressive
               distillation, Salimans & Ho 2022).

Shapes: B batch, latents z_B4hw scaled to unit variance, states x = z + sigma·n (diffusers'
convention), UNet input x / sqrt(sigma² + 1). All tensors of a loss lie on the device of its bank;
draws come from a CPU generator, so that they are the same on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import l1_loss

from .model import POSTERIOR_STD

WEIGHT_CAP = 30.0  # of 1 + sigma²: reached at t = 820; beyond it the prediction is the class mean


# ---------------------------------------------------------------- phase 1: the autoencoder


def fix_posterior_width(vae: AutoencoderKL) -> None:
    """Make the posterior's log-variance constant: 2·ln(POSTERIOR_STD), in the means' own units."""
    assert vae.quant_conv is not None
    assert vae.quant_conv.bias is not None
    channels = vae.config["latent_channels"]
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0.0
        vae.quant_conv.bias[channels:] = 2 * math.log(POSTERIOR_STD)


def _gradients(images_BCHW: Tensor) -> Iterable[Tensor]:
    yield images_BCHW[..., 1:] - images_BCHW[..., :-1]
    yield images_BCHW[..., 1:, :] - images_BCHW[..., :-1, :]


def vae_loss(vae: AutoencoderKL, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 0.5 · L1 of gradients + 1e-4 · mean²; the decoder sees posterior samples.

    Images [B, 3, H, W] in [-1, 1]. bf16 autocast: 0.38 s instead of 1.1 s for a step of 32 images
    on one core with AMX.
    """
    channels = vae.config["latent_channels"]
    with torch.autocast(images_BCHW.device.type, torch.bfloat16):
        mean = vae.quant_conv(vae.encoder(images_BCHW))[:, :channels].float()  # pyright: ignore
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        sample = vae.post_quant_conv(mean + POSTERIOR_STD * noise)  # pyright: ignore
        decoded = vae.decoder(sample).float()
    loss = l1_loss(decoded, images_BCHW) + 1e-4 * mean.square().mean()
    pairs = zip(_gradients(decoded), _gradients(images_BCHW), strict=True)
    return loss + 0.5 * sum((l1_loss(a, b) for a, b in pairs), torch.zeros_like(loss))


# ---------------------------------------------------------------- phases 2–4: the denoiser


@dataclass(frozen=True)
class LatentBank:
    """What the denoiser learns from: latents, classes, SDXL's micro-conditioning, row by row."""

    latents_N4hw: Tensor  # unit variance
    labels_N: Tensor  # int64
    time_ids_N6: Tensor  # original h, w; crop top, left; target h, w

    @property
    def device(self) -> torch.device:
        return self.latents_N4hw.device

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(self.labels_N), (batch,), generator=generator).to(self.device)
        return self.latents_N4hw[rows], self.labels_N[rows], self.time_ids_N6[rows]


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings by class; the last row is the empty prompt."""

    states_GLD: Tensor
    pooled_GD: Tensor

    @property
    def empty(self) -> int:
        return len(self.states_GLD) - 1


def sigma_table(scheduler) -> Tensor:
    """sigma(t) = sqrt((1 - alpha_bar) / alpha_bar) for t = 0 … T-1, of a diffusers scheduler."""
    alpha_bar = scheduler.alphas_cumprod.double()
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def predict(
    unet: nn.Module,
    states_B4hw: Tensor,
    sigmas_B: Tensor,
    timesteps_B: Tensor,
    prompts_B: Tensor,
    time_ids_B6: Tensor,
    conditioning: Conditioning,
    *,
    half: bool = False,
) -> Tensor:
    """Predict the noise in `states`; bf16 autocast when `half` (frozen models: 1.7 × faster)."""
    device = states_B4hw.device.type
    scaled = states_B4hw / (sigmas_B.square() + 1).sqrt()[:, None, None, None]
    added = {"text_embeds": conditioning.pooled_GD[prompts_B], "time_ids": time_ids_B6}
    with torch.autocast(device, torch.bfloat16, enabled=half), _attention(device, half):
        eps = unet(
            scaled,
            timesteps_B,
            conditioning.states_GLD[prompts_B],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return eps.float()


def _attention(device: str, half: bool) -> AbstractContextManager[object]:
    """Plain products where a CPU differentiates in bf16: a step of the denoiser is 1.4 × faster.

    The backward pass of torch's fused attention takes a third of such a step (torch 2.15).
    """
    plain = device == "cpu" and half and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _weighted_error(prediction: Tensor, target: Tensor, sigmas_B: Tensor) -> Tensor:
    weight = (1 + sigmas_B.square()).clamp(max=WEIGHT_CAP)[:, None, None, None]
    return (weight * (prediction - target).square()).mean()


def _noised(
    bank: LatentBank, batch: int, timesteps_B: Tensor, sigmas: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    latents, labels, time_ids = bank.draw(batch, generator)
    noise = torch.randn(latents.shape, generator=generator).to(bank.device)
    sigmas_B = sigmas[timesteps_B]
    return latents + sigmas_B[:, None, None, None] * noise, noise, sigmas_B, labels, time_ids


def denoiser_loss(
    unet: UNet2DConditionModel,
    bank: LatentBank,
    conditioning: Conditioning,
    sigmas: Tensor,
    batch: int,
    generator: torch.Generator,
    *,
    half: bool = False,
) -> Tensor:
    """Phase 2 on one drawn batch; the UNet runs in bf16 autocast when `half`."""
    timesteps = torch.randint(len(sigmas), (batch,), generator=generator).to(bank.device)
    states, noise, sigmas_B, prompts, time_ids = _noised(bank, batch, timesteps, sigmas, generator)
    dropped = (torch.rand(batch, generator=generator) < 0.1).to(bank.device)
    prompts = torch.where(dropped, conditioning.empty, prompts)
    eps = predict(unet, states, sigmas_B, timesteps, prompts, time_ids, conditioning, half=half)
    return _weighted_error(eps, noise, sigmas_B)


def guidance_loss(
    unet: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    bank: LatentBank,
    conditioning: Conditioning,
    sigmas: Tensor,
    guidance: float,
    batch: int,
    generator: torch.Generator,
    *,
    half: bool = False,
) -> Tensor:
    """Phase 3 on one drawn batch: the teacher's guided prediction is the target."""
    timesteps = torch.randint(len(sigmas), (batch,), generator=generator).to(bank.device)
    states, _, sigmas_B, prompts, time_ids = _noised(bank, batch, timesteps, sigmas, generator)
    with torch.no_grad():
        both = predict(
            teacher,
            states.repeat(2, 1, 1, 1),
            sigmas_B.repeat(2),
            timesteps.repeat(2),
            torch.cat([prompts, torch.full_like(prompts, conditioning.empty)]),
            time_ids.repeat(2, 1),
            conditioning,
            half=True,
        )
        with_prompt, without = both.chunk(2)
        target = without + guidance * (with_prompt - without)
    eps = predict(unet, states, sigmas_B, timesteps, prompts, time_ids, conditioning, half=half)
    return _weighted_error(eps, target, sigmas_B)


@dataclass(frozen=True)
class SampledSteps:
    """The sampler's evals: timestep, sigma, and the sigma its deterministic part goes down to."""

    timesteps: Tensor  # int64 [S]
    sigmas: Tensor  # [S]
    sigmas_down: Tensor  # [S]


def sampled_steps(scheduler, steps: int, device: torch.device | str = "cpu") -> SampledSteps:
    """Read the evals of `steps` Euler-ancestral steps off the scheduler (k-diffusion's eta = 1)."""
    scheduler.set_timesteps(steps)
    high, low = scheduler.sigmas[:-1].float(), scheduler.sigmas[1:].float()
    timesteps = scheduler.timesteps.long().clone()
    return SampledSteps(timesteps.to(device), high.to(device), (low.square() / high).to(device))


def few_step_loss(
    unet: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    bank: LatentBank,
    conditioning: Conditioning,
    sigmas: Tensor,
    visited: SampledSteps,
    substeps: int,
    batch: int,
    generator: torch.Generator,
    *,
    half: bool = False,
) -> Tensor:
    """Phase 4 on one drawn batch: one eval must land where `substeps` of the teacher's land.

    The target of a state x at sigma is the slope (x - x_down) / (sigma - sigma_down), where x_down
    is the teacher's solution of the probability-flow ODE at sigma_down.
    """
    which = torch.randint(len(visited.timesteps), (batch,), generator=generator).to(bank.device)
    timesteps, down = visited.timesteps[which], visited.sigmas_down[which]
    states, _, high, prompts, time_ids = _noised(bank, batch, timesteps, sigmas, generator)
    with torch.no_grad():
        solution, now = states, high
        floor = torch.maximum(down, sigmas[0].expand_as(down))
        for k in range(1, substeps + 1):
            after = high * (floor / high) ** (k / substeps)
            if k == substeps:
                after = down
            nearest = _timestep_of(now, sigmas)
            eps = predict(
                teacher, solution, now, nearest, prompts, time_ids, conditioning, half=True
            )
            solution = solution + eps * (after - now)[:, None, None, None]
            now = after
        target = (states - solution) / (high - down)[:, None, None, None]
    eps = predict(unet, states, high, timesteps, prompts, time_ids, conditioning, half=half)
    return _weighted_error(eps, target, high)


def _timestep_of(sigmas_B: Tensor, table: Tensor) -> Tensor:
    """Fractional timestep of a sigma, linear in log sigma: the sinusoidal embedding takes it."""
    log_table, log_sigma = table.log(), torch.maximum(sigmas_B, table[0]).log()
    above = torch.searchsorted(log_table, log_sigma).clamp(1, len(table) - 1)
    low, high = log_table[above - 1], log_table[above]
    return (above - 1) + ((log_sigma - low) / (high - low)).clamp(0, 1)


# ---------------------------------------------------------------- samples


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

    With one step the first B are the real latents themselves.
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
