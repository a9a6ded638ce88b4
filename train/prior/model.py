"""New parts of a small SDXL-shaped model, and its folder in diffusers' layout.

`StableDiffusionXLImg2ImgPipeline.from_pretrained` loads the folder: vae, unet, text_encoder,
text_encoder_2, tokenizer, tokenizer_2, scheduler, model_index.json. The two text encoders are tiny,
random and frozen; the last layer of the second keeps the prompts of a training far apart. The UNet
learns what the embeddings mean.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ..config import TIMESTEPS

TOKENS = 77
TEXT_WIDTH = 32
TIME_IDS = 6  # original height and width, crop top and left, target height and width (SDXL)
TIME_ID_WIDTH = 32
PROMPT_RMS = 3.0  # of the pooled states, beside which the UNet sees sines of root mean square 0.7
POSTERIOR_STD = 0.05  # of the VAE's posterior; its means have variance 1 on average


@dataclass
class ModelParts:
    """A model's modules, named as the pipeline names them; `scaling_factor` is in `vae.config`."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    scheduler: EulerAncestralDiscreteScheduler


def byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, so it can encode every prompt."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256, 512 - len(printable))  # CLIP's byte-to-character map
    characters = [chr(code) for code in (*printable, *others)]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def new_parts(
    size_px: int,
    tokenizer_folder: Path,
    *,
    unet_channels: tuple[int, int, int] = (32, 64, 128),
    vae_channels: tuple[int, ...] = (16, 32, 64),
    latent_channels: int = 4,
    vae_groups: int = 8,
) -> ModelParts:
    """Initialise parts for images of `size_px` (a multiple of 4 · 2^levels).

    The VAE's factor is 2^(len(vae_channels) - 1). Initialisation draws from torch's global
    generator: seed it first.
    """
    tokenizer = byte_tokenizer(tokenizer_folder)
    ends = {
        f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        **ends,
    )
    factor = 2 ** (len(vae_channels) - 1)
    # Dictionaries, because diffusers annotates its tuples as tuples of one.
    vae_settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(vae_channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(vae_channels),
        "block_out_channels": vae_channels,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": vae_groups,
        "sample_size": size_px,
        "mid_block_add_attention": False,
        "force_upcast": False,
        "scaling_factor": 1.0,
    }
    unet_settings: dict[str, Any] = {
        "sample_size": size_px // factor,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": unet_channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": tuple(max(1, unet_channels[0] // 32) * each for each in (1, 2, 4)),
        "transformer_layers_per_block": (1, 1, 1),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": TIME_IDS * TIME_ID_WIDTH + TEXT_WIDTH,
        "norm_num_groups": 16,
    }
    vae, unet = AutoencoderKL(**vae_settings), UNet2DConditionModel(**unet_settings)
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=TIMESTEPS,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )
    return ModelParts(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text).eval().requires_grad_(False),
        text_encoder_2=CLIPTextModelWithProjection(text).eval().requires_grad_(False),
        tokenizer=tokenizer,
        scheduler=scheduler,
    )


def save_parts(parts: ModelParts, folder: Path) -> None:
    """Write the parts in diffusers' SDXL layout; UNet and VAE as fp16 safetensors.

    The text encoders stay fp32: transformers loads the stored type, diffusers loads fp32 by
    default, and a pipeline opened without a dtype must not mix the two.
    """
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **vars(parts), tokenizer_2=parts.tokenizer, add_watermarker=False
    )
    for module in (parts.unet, parts.vae):
        nn.Module.to(module, torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for module in (parts.unet, parts.vae):
        nn.Module.to(module, torch.float32)


def move_model(built: Path, folder: Path) -> None:
    """Move everything in `built` into `folder`, over entries of the same name; remove `built`.

    unet/ goes first and comes last: a folder without it does not open, so a process that is killed
    half-way leaves no usable mixture of two models.
    """
    items = sorted(built.iterdir(), key=lambda item: item.name == "unet")
    for item in (items[-1], *items[:-1]):
        if (folder / item.name).is_dir():
            shutil.rmtree(folder / item.name)
    for item in items:
        item.replace(folder / item.name)
    built.rmdir()


@torch.no_grad()
def separate_prompts(parts: ModelParts, prompts: list[str]) -> None:
    """Let the pooled states of these prompts lie as far apart as TEXT_WIDTH dimensions allow.

    Their mean becomes 0, their root mean square PROMPT_RMS; up to TEXT_WIDTH + 1 prompts get the
    same distance to each other. A random encoder tells "cat" from "dog" by a few percent of their
    length: a denoiser does not notice classes for its first thousands of steps.
    """
    encoder: Any = parts.text_encoder_2
    norm, projection = encoder.text_model.final_layer_norm, encoder.text_projection
    projection.weight.copy_(torch.eye(TEXT_WIDTH, dtype=torch.float32))
    _, pooled_GD = prompt_embeddings(parts, prompts)
    mean_D = pooled_GD.mean(0)
    _, lengths, axes_KD = torch.linalg.svd((pooled_GD - mean_D).double(), full_matrices=False)
    kept = lengths > 1e-3 * lengths[0]
    axes_KD = axes_KD[kept]
    norm.bias -= mean_D
    scale = PROMPT_RMS * (pooled_GD.numel() / len(axes_KD)) ** 0.5
    projection.weight.copy_(scale * axes_KD.T / lengths[kept] @ axes_KD)


@torch.no_grad()
def prompt_embeddings(parts: ModelParts, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts as SDXL does: penultimate states [G, 77, 64] and pooled states [G, 32]."""
    tokens = parts.tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    first = parts.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    second = parts.text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds
