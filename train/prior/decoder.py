"""`train decoder`: a model's decoder distilled into a tiny one, as TAESD is, for `--model`.

The tiny decoder (diffusers' AutoencoderTiny) learns to make what the model's own makes of the
latents of real images. Its encoder is never used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ...engine.data.crops import to_unit
from ...export.modules import LatentDecoder, LatentEncoder
from ..config import DecoderConfig
from .loop import Phase

LATENT_NOISE = 0.05
"""Standard deviation of the noise on the latents, whose own is 1: sampled latents are not exact."""


def new_decoder(config: DecoderConfig, *, latent_channels: int, factor: int) -> AutoencoderTiny:
    """Untrained; weights from torch's global generator."""
    levels = factor.bit_length()
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(config.width,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(config.blocks,) * levels,
        latent_channels=latent_channels,
    )


class DecoderTraining:
    """Images in memory, the model's VAE, and the decoder that learns from it."""

    def __init__(
        self,
        config: DecoderConfig,
        pixels_NHWC: Tensor,
        vae: Any,
        work: Path,
        report: Callable[[str], None],
        device: str,
    ) -> None:
        self.config, self.pixels_NHWC, self.device = config, pixels_NHWC, torch.device(device)
        self.encoder, self.own = LatentEncoder(vae).eval(), LatentDecoder(vae).eval()
        torch.manual_seed(config.seed)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = vae.config.latent_channels
        tiny = new_decoder(config, latent_channels=self.channels, factor=factor)
        tiny.encoder.requires_grad_(False)
        nn.Module.to(tiny, self.device)
        self.phase = Phase("decoder", tiny, config.steps, 1e-3, work / "decoder.safetensors")
        self._report = report

    def run(self) -> AutoencoderTiny:
        """Train to the end, or resume; ValueError when it diverges."""
        return self.phase.run(self._loss, seed=self.config.seed, report=self._report)

    def _loss(self, tiny: AutoencoderTiny, generator: torch.Generator) -> Tensor:
        """L1 + 0.5 · L1 of gradients, as the model's own autoencoder is trained."""
        rows = torch.randint(len(self.pixels_NHWC), (self.config.batch,), generator=generator)
        images = to_unit(self.pixels_NHWC[rows].to(self.device))
        if torch.rand((), generator=generator, dtype=torch.float32) < 0.5:
            images = images.flip(-1)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            latents = self.encoder(images)[:, : self.channels].float()
            noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
            latents = latents + LATENT_NOISE * noise.to(self.device)
            target = self.own(latents).float()
        with torch.autocast(self.device.type, torch.bfloat16):
            made = tiny.decoder(latents).float()
        edges = (l1_loss(made.diff(dim=axis), target.diff(dim=axis)) for axis in (-1, -2))
        return l1_loss(made, target) + 0.5 * sum(edges)

    @torch.no_grad()
    def psnr_db(self, tiny: AutoencoderTiny, count: int = 512) -> float:
        """PSNR against the model's own decoder on the latents of every n-th image."""
        every, errors = max(1, len(self.pixels_NHWC) // count), []
        for pixels_BHWC in self.pixels_NHWC[::every].split(self.config.batch):
            images = to_unit(pixels_BHWC.to(self.device))
            latents = self.encoder(images)[:, : self.channels]
            difference = tiny.decoder(latents).clamp(-1, 1) - self.own(latents)
            errors.append(difference.square().mean((1, 2, 3)))
        return float(-10 * torch.log10(torch.cat(errors).mean() / 4))
