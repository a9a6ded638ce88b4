"""The smallest networks with SDXL's kinds of layers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from patchbloom.export.config import Precision
from patchbloom.export.models import DTYPES, ModelParts

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def new_parts(precision: Precision = "fp32") -> ModelParts:
    """Seeded random weights; images of 32 px, latents of 8."""
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET).eval(), AutoencoderKL(**VAE).eval()
    dtype = DTYPES[precision]
    return ModelParts(unet.to(dtype).requires_grad_(False), vae.to(dtype).requires_grad_(False))
