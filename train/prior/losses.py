"""Losses of the four training phases of a small latent diffusion prior, and its samples.

1. `vae`       autoencoder: L1 on pixels and on their gradients, posterior of fixed width.
2. `denoiser`  epsilon prediction, weighted (1 + sigma²) so that errors count alike at every noise
               level (the v-prediction loss of Salimans & Ho 2022), prompt dropped for 10 % of
               the samples.
3. `guidance`  the guided prediction u + w·(c - u) regressed into one unguided eval (Meng et al.
               2023).
4. `few_step`  at the timesteps that the sampler visits, one eval regressed onto what the model of
               phase 3 reaches in several small deterministic steps (progressive distillation,
               Salimans & Ho 2022).

Shapes: B batch, latents z_B4hw of variance 1 on average, states x = z + sigma·n (diffusers'
convention), UNet input x / sqrt(sigma² + 1). All tensors of a loss lie on the device of its bank;
a CPU generator draws, so that draws are the same on any device.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import l1_loss

from .model import POSTERIOR_STD

BLUR_SIGMA = 0.5  # states of less noise begin only partly at an enlarged patch
WEIGHT_CAP = 30.0  # of 1 + sigma²: reached at t = 820; beyond it the prediction is the class mean


# ---------------------------------------------------------------- phase 1: the autoencoder


@torch.no_grad()
def fix_posterior_width(vae: AutoencoderKL) -> None:
    """Make the posterior's log-variance constant: 2·ln(POSTERIOR_STD), in the means' own units."""
    layer: Any = vae.quant_conv
    channels = vae.config["latent_channels"]
    layer.weight[channels:] = 0.0
    layer.bias[channels:] = 2 * math.log(POSTERIOR_STD)


@torch.no_grad()
def balance_channels(vae: AutoencoderKL, means_NChw: Tensor) -> None:
    """Give each latent channel mean 0 and a variance proportional to what it shows, on average 1.

    Given the posterior's means of images. What a channel shows is the root mean square change of
    the decoded pixels when another image's channel replaces it. Equal variances would turn errors
    in the finest channels into grain. The 1×1 convolutions on both sides take the change:
    reconstructions stay the same.
    """
    coder: Any = vae
    channels = vae.config["latent_channels"]
    mean_C, std_C = means_NChw.mean((0, 2, 3)), means_NChw.std((0, 2, 3))
    some = means_NChw[:: max(1, len(means_NChw) // 256)]

    def decode(latents: Tensor) -> Tensor:
        return torch.cat([coder.decode(part).sample for part in latents.split(32)])

    decoded, shown_C = decode(some), torch.empty_like(std_C)
    for channel in range(channels):
        exchanged = some.clone()
        exchanged[:, channel] = some[:, channel].roll(1, 0)
        shown_C[channel] = (decode(exchanged) - decoded).square().mean().sqrt()
    shown_C.clamp_(min=1e-6)  # one image alone, or a channel that no image uses
    scale_C = (shown_C / shown_C.mean()).sqrt() / std_C.clamp(min=1e-6)
    before, after = coder.quant_conv, coder.post_quant_conv
    before.weight[:channels] *= scale_C[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean_C) * scale_C
    after.bias += after.weight[:, :, 0, 0] @ mean_C
    after.weight /= scale_C[None, :, None, None]


def vae_loss(vae: AutoencoderKL, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 0.5 · L1 of gradients + 1e-4 · mean²; the decoder sees posterior samples.

    Images [B, 3, H, W] in [-1, 1]. bf16 autocast: 0.38 s instead of 1.1 s for a step of 32 images
    on one core with AMX.
    """
    channels = vae.config["latent_channels"]
    with torch.autocast(images_BCHW.device.type, torch.bfloat16):
        mean = vae.quant_conv(vae.encoder(images_BCHW))[:, :channels].float()  # pyright: ignore
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean.device)
        sample = vae.post_quant_conv(mean + POSTERIOR_STD * noise)  # pyright: ignore
        decoded = vae.decoder(sample).float()
    loss = l1_loss(decoded, images_BCHW) + 1e-4 * mean.square().mean()
    edges = (l1_loss(decoded.diff(dim=axis), images_BCHW.diff(dim=axis)) for axis in (-1, -2))
    return loss + 0.5 * sum(edges)


# ---------------------------------------------------------------- phases 2–4: the denoiser


class LatentBank(NamedTuple):
    """The denoiser's training data, row by row: latents, classes, SDXL's micro-conditioning."""

    latents_NChw: Tensor  # variance 1 on average, fp16
    enlarged_NChw: Tensor
    """Latents of the same images reduced to patches and enlarged again, fp16."""
    labels_N: Tensor  # int64
    time_ids_N6: Tensor  # original h, w; crop top, left; target h, w


class Conditioning(NamedTuple):
    """Prompt embeddings by class; the last row is the empty prompt."""

    states_GLD: Tensor
    pooled_GD: Tensor

    @property
    def empty(self) -> int:
        return len(self.states_GLD) - 1


class Noisy(NamedTuple):
    """One batch of the UNet's inputs."""

    states_B4hw: Tensor
    sigmas_B: Tensor
    timesteps_B: Tensor
    prompts_B: Tensor  # rows of Conditioning
    time_ids_B6: Tensor


@dataclass(frozen=True)
class Denoising:
    """Data and settings that the three denoiser phases share."""

    bank: LatentBank
    conditioning: Conditioning
    sigmas_T: Tensor
    batch: int
    half: bool
    """bf16 autocast for the trained UNet."""

    def random_timesteps(self, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(self.sigmas_T), (self.batch,), generator=generator)
        return drawn.to(self.sigmas_T.device)

    def draw(self, timesteps_B: Tensor, generator: torch.Generator) -> tuple[Noisy, Tensor]:
        """Random rows of the bank plus noise, and the noise that leads back to their latents.

        Two in five rows begin at their latents, one in five at those of the enlarged patch, the
        others in between. Below BLUR_SIGMA the share of the patch falls with sigma, so that the
        target stays finite.
        """
        device = self.sigmas_T.device
        rows_B = torch.randint(len(self.bank.labels_N), (self.batch,), generator=generator)
        columns = (column[rows_B.to(device)] for column in self.bank)
        latents, enlarged, labels_B, time_ids_B6 = columns
        latents, enlarged = latents.float(), enlarged.float()
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(device)
        sigmas_B = self.sigmas_T[timesteps_B]
        sigmas = sigmas_B[:, None, None, None]
        drawn = torch.rand((self.batch, 1, 1, 1), generator=generator, dtype=torch.float32)
        blurred = (2.5 * drawn.to(device) - 1).clamp(0, 1) * (sigmas / BLUR_SIGMA).clamp(max=1)
        states = torch.lerp(latents, enlarged, blurred) + sigmas * noise
        target = (states - latents) / sigmas
        return Noisy(states, sigmas_B, timesteps_B, labels_B, time_ids_B6), target

    def error(self, unet: nn.Module, noisy: Noisy, target: Tensor) -> Tensor:
        """Mean squared error of the UNet's prediction, weighted (1 + sigma²)."""
        prediction = predict(unet, noisy, self.conditioning, half=self.half)
        weight = (1 + noisy.sigmas_B.square()).clamp(max=WEIGHT_CAP)[:, None, None, None]
        return (weight * (prediction - target).square()).mean()


def sigma_table(scheduler) -> Tensor:
    """sigma(t) = sqrt((1 - alpha_bar) / alpha_bar) for t = 0 … T-1, of a diffusers scheduler."""
    alpha_bar = scheduler.alphas_cumprod.double()
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def predict(
    unet: nn.Module, noisy: Noisy, conditioning: Conditioning, *, half: bool = False
) -> Tensor:
    """Predict the noise in `states`; bf16 autocast when `half` (frozen models: 1.7 × faster)."""
    states_B4hw, sigmas_B, timesteps_B, prompts_B, time_ids_B6 = noisy
    device = states_B4hw.device.type
    scaled = states_B4hw / (sigmas_B.square() + 1).sqrt()[:, None, None, None]
    added = {"text_embeds": conditioning.pooled_GD[prompts_B], "time_ids": time_ids_B6}
    # On a CPU the backward pass of torch's fused attention takes a third of a bf16 step
    # (torch 2.15): plain products make the step 1.4 × faster.
    plain = device == "cpu" and half and torch.is_grad_enabled()
    attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=half), attention:
        eps = unet(
            scaled,
            timesteps_B,
            conditioning.states_GLD[prompts_B],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return eps.float()


def denoiser_loss(unet: nn.Module, generator: torch.Generator, task: Denoising) -> Tensor:
    """Phase 2 on one drawn batch."""
    noisy, noise = task.draw(task.random_timesteps(generator), generator)
    dropped = (torch.rand(task.batch, generator=generator, dtype=torch.float32) < 0.1).to(
        noise.device
    )
    prompts = torch.where(dropped, task.conditioning.empty, noisy.prompts_B)
    return task.error(unet, noisy._replace(prompts_B=prompts), noise)


def guidance_loss(
    unet: nn.Module,
    generator: torch.Generator,
    task: Denoising,
    teacher: nn.Module,
    guidance: float,
) -> Tensor:
    """Phase 3 on one drawn batch: the teacher's guided prediction is the target."""
    noisy, _ = task.draw(task.random_timesteps(generator), generator)
    with torch.no_grad():
        unprompted = torch.full_like(noisy.prompts_B, task.conditioning.empty)
        pairs = zip(noisy, noisy._replace(prompts_B=unprompted), strict=True)
        both = Noisy(*map(torch.cat, pairs))
        prompted, free = predict(teacher, both, task.conditioning, half=True).chunk(2)
        target = free + guidance * (prompted - free)
    return task.error(unet, noisy, target)


class SampledSteps(NamedTuple):
    """The sampler's evals: timestep, sigma, and the sigma its deterministic part goes down to."""

    timesteps_S: Tensor  # int64
    sigmas_S: Tensor
    sigmas_down_S: Tensor


def sampled_steps(scheduler, steps: int, device: torch.device | str = "cpu") -> SampledSteps:
    """Read the evals of `steps` Euler-ancestral steps off the scheduler (k-diffusion's eta = 1)."""
    scheduler.set_timesteps(steps)
    high, low = scheduler.sigmas[:-1].float(), scheduler.sigmas[1:].float()
    timesteps = scheduler.timesteps.long().clone()
    return SampledSteps(timesteps.to(device), high.to(device), (low.square() / high).to(device))


def few_step_loss(
    unet: nn.Module,
    generator: torch.Generator,
    task: Denoising,
    teacher: nn.Module,
    visited: SampledSteps,
    substeps: int,
) -> Tensor:
    """Phase 4 on one drawn batch: one eval must land where `substeps` of the teacher's land.

    The target of a state x at sigma is the slope (x - x_down) / (sigma - sigma_down), where x_down
    is the teacher's solution of the probability-flow ODE at sigma_down.
    """
    table_T = task.sigmas_T
    which = torch.randint(len(visited.timesteps_S), (task.batch,), generator=generator)
    which = which.to(table_T.device)
    noisy, _ = task.draw(visited.timesteps_S[which], generator)
    high, down = noisy.sigmas_B, visited.sigmas_down_S[which]
    with torch.no_grad():
        solution, now = noisy.states_B4hw, high
        floor = torch.maximum(down, table_T[0].expand_as(down))
        for k in range(1, substeps + 1):
            after = down if k == substeps else high * (floor / high) ** (k / substeps)
            at = noisy._replace(
                states_B4hw=solution, sigmas_B=now, timesteps_B=_timestep_of(now, table_T)
            )
            eps = predict(teacher, at, task.conditioning, half=True)
            solution = solution + eps * (after - now)[:, None, None, None]
            now = after
        target = (noisy.states_B4hw - solution) / (high - down)[:, None, None, None]
    return task.error(unet, noisy, target)


def _timestep_of(sigmas_B: Tensor, table_T: Tensor) -> Tensor:
    """Fractional timestep of a sigma, linear in log sigma: the sinusoidal embedding takes it."""
    log_table, log_sigma = table_T.log(), torch.maximum(sigmas_B, table_T[0]).log()
    above = torch.searchsorted(log_table, log_sigma).clamp(1, len(table_T) - 1)
    low, high = log_table[above - 1], log_table[above]
    return (above - 1) + ((log_sigma - low) / (high - low)).clamp(0, 1)


# ---------------------------------------------------------------- samples


@torch.no_grad()
def samples_of_class(
    unet: nn.Module,
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
    up = (low.square() - visited.sigmas_down_S.square()).clamp(min=0).sqrt()
    draw = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=torch.float32).to(device)

    from_images = real_B4hw + low[0] * noise(real_B4hw)
    states = torch.cat([from_images, noise(real_B4hw) * visited.sigmas_S[0]])
    prompts = torch.full((2 * count,), label, device=device, dtype=torch.int64)
    side = float(size_px)
    ids = torch.tensor([side, side, 0, 0, side, side], device=device, dtype=torch.float32).repeat(
        2 * count, 1
    )
    for k, (t, high, down) in enumerate(zip(*visited, strict=True)):
        first = count if k == 0 else 0
        part = states[first:]
        rows = len(part)
        noisy = Noisy(part, high.repeat(rows), t.repeat(rows), prompts[:rows], ids[:rows])
        eps = predict(unet, noisy, conditioning)
        states[first:] = part + eps * (down - high) + up[k] * noise(part)
    return states
