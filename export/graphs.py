"""What is compiled: encoder, denoiser and decoder of a model, with static borders.

Every backend starts from these three modules; what it makes of them is held against them.
Legend: B = G · n images of G prompts, C latent channels, h w latent size, P keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import EngineSpec
from .models import ModelParts
from .modules import Denoiser, LatentDecoder, LatentEncoder, key_value_slots

GRAPHS = ("encoder", "denoiser", "decoder")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """A module and its borders; `inputs` in the order of the module's arguments."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    output: Port

    def random_inputs(self, seed: int) -> list[Tensor]:
        """Standard normal inputs, on the module's device; a timestep is drawn from the schedule."""
        generator = torch.Generator().manual_seed(seed)
        device = next(self.module.parameters()).device
        values = []
        for port in self.inputs:
            value = torch.randn(port.shape, generator=generator)
            if port.name == "timestep":
                value = value.abs().mul(300).clamp(max=999).floor()
            values.append(value.to(device, port.dtype))
        return values


def make_graphs(parts: ModelParts, spec: EngineSpec, *, tokens: int) -> tuple[Graph, Graph, Graph]:
    """Encoder, denoiser and decoder of a model at an engine's shapes; takes over the parts."""
    vae_config: Any = parts.vae.config
    slots = key_value_slots(parts.unet, tokens)
    channels, side = (
        vae_config.latent_channels,
        spec.size_px // 2 ** (len(vae_config.block_out_channels) - 1),
    )
    latents, images = (
        (spec.batch, channels, side, side),
        (spec.batch, 3, spec.size_px, spec.size_px),
    )
    moments = (spec.batch, 2 * channels, side, side)
    width = parts.unet.time_embedding.linear_2.out_features
    unet_dtype, vae_dtype = parts.unet.dtype, parts.vae.dtype
    denoiser_inputs = (
        Port("latents", latents, unet_dtype),
        Port("timestep", (1,), torch.float32),
        Port("added", (spec.prompts, width), unet_dtype),
        Port("keys_values", (spec.prompts, 2 * sum(slot.size for slot in slots)), unet_dtype),
    )
    return (
        Graph(
            "encoder",
            LatentEncoder(parts.vae).eval(),
            (Port("images", images, vae_dtype),),
            Port("moments", moments, vae_dtype),
        ),
        Graph(
            "denoiser",
            Denoiser(parts.unet, tokens).eval(),
            denoiser_inputs,
            Port("noise", latents, unet_dtype),
        ),
        Graph(
            "decoder",
            LatentDecoder(parts.vae).eval(),
            (Port("latents", latents, vae_dtype),),
            Port("images", images, vae_dtype),
        ),
    )
