"""Export modules equal diffusers' networks at any width, and cost less at full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from patchbloom.export.models import TURBO_CONFIGURATION, ModelParts, find_model, load_parts
from patchbloom.export.modules import (
    Denoiser,
    LatentDecoder,
    LatentEncoder,
    PromptProjector,
    Upsampler,
)
from patchbloom.train.prior.model import new_parts
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 1e-5


def small_parts(folder: Path) -> ModelParts:
    torch.manual_seed(0)
    parts = new_parts(32, folder, unet_channels=(16, 32, 64), vae_channels=(8, 16, 32))
    return ModelParts(parts.unet.eval(), parts.vae.eval())


def configuration(part: str) -> dict[str, Any]:
    """Config of a part of SDXL-Turbo."""
    config = json.loads((TURBO_CONFIGURATION / part / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def predictions(unet: Any, prompts: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise for prompts × images: the stock UNet's, ours, and ours with swapped prompts."""
    config, generator = unet.config, torch.Generator().manual_seed(1)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    text = torch.randn(prompts, 77, config.cross_attention_dim, generator=generator)
    pooled = torch.randn(prompts, pooled_width, generator=generator)
    x = torch.randn(prompts * images, 4, 8, 8, generator=generator)
    time_ids, timestep = torch.tensor([32.0, 32, 0, 0, 32, 32]), torch.tensor([599.0])
    each = [index for index in range(prompts) for _ in range(images)]
    conditions = {"text_embeds": pooled[each], "time_ids": time_ids.expand(len(each), -1)}
    stock = unet(x, timestep, encoder_hidden_states=text[each], added_cond_kwargs=conditions)
    added, keys_values = PromptProjector(unet)(text, pooled, time_ids)
    denoiser = Denoiser(unet, 77)
    assert not [layer for layer in denoiser.modules() if isinstance(layer, Upsample2D)]
    ours = denoiser(x, timestep, added, keys_values)
    return stock.sample, ours, denoiser(x, timestep, added, keys_values.roll(1, dims=0))


@torch.no_grad()
@pytest.mark.parametrize(("prompts", "images"), [(3, 2), (1, 3), (35, 2)])
def test_the_grouped_denoiser_is_the_stock_unet(tmp_path: Path, prompts: int, images: int):
    """35 × 2 images exceed the batch of 64 at which diffusers' upsampler branches."""
    stock, ours, swapped = predictions(small_parts(tmp_path).unet, prompts, images)
    torch.testing.assert_close(ours, stock, rtol=TOLERANCE, atol=TOLERANCE)
    assert prompts == 1 or float((swapped - ours).abs().max()) > 1e-3


@torch.no_grad()
def test_the_denoiser_is_the_stock_unet_at_sdxls_widths():
    """SDXL-Turbo's first and last width, heads and text; one layer where it has up to ten."""
    thin = {
        "block_out_channels": (320, 1280),
        "attention_head_dim": (5, 20),
        "transformer_layers_per_block": (1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(configuration("unet") | thin)).eval()
    stock, ours, swapped = predictions(unet, prompts=2, images=2)
    torch.testing.assert_close(ours, stock, rtol=TOLERANCE, atol=TOLERANCE)
    assert float((swapped - ours).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("width", "batch"), [("small", 3), ("small", 70), ("sdxl", 1)])
def test_encoder_and_decoder_are_the_stock_vae(tmp_path: Path, width: str, batch: int):
    torch.manual_seed(0)
    vae: Any = small_parts(tmp_path).vae
    if width == "sdxl":
        vae = AutoencoderKL(**configuration("vae")).eval()
    images = torch.rand(batch, 3, 32, 32) * 2 - 1
    scale = vae.config.scaling_factor
    posterior = vae.encode(images).latent_dist
    latents = scale * posterior.mean
    expected = vae.decode(latents / scale).sample.clamp(-1, 1)
    moments, decoder = LatentEncoder(vae)(images), LatentDecoder(vae)
    assert not [layer for layer in decoder.modules() if isinstance(layer, Upsample2D)]
    torch.testing.assert_close(moments, torch.cat([latents, scale * posterior.std], dim=1))
    torch.testing.assert_close(decoder(latents), expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_the_upsampler_is_the_stock_one():
    stock = Upsample2D(8, use_conv=True)
    x = torch.randn(70, 8, 6, 5).to(memory_format=torch.channels_last)
    assert torch.equal(Upsampler(stock)(x), stock(x))
    assert torch.equal(Upsampler(stock)(x, (13, 11)), stock(x, (13, 11)))
    with pytest.raises(ValueError, match="the upsampler must be SDXL's"):
        Upsampler(Upsample2D(8, use_conv_transpose=True))


@torch.no_grad()
def test_full_size_parameters_shapes_and_flops():
    """SDXL-Turbo's configuration at 224 px, on the meta device: no weights, no arithmetic."""
    parts = load_parts(find_model("sdxl-turbo", weights="random"), precision="fp16", device="meta")
    unet, batch, prompts = parts.unet, 4, 2
    assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(2.567, abs=5e-4)
    assert sum(p.numel() for p in parts.vae.parameters()) / 1e6 == pytest.approx(83.65, abs=5e-3)
    half = {"dtype": torch.float16, "device": "meta"}
    x, timestep = torch.empty(batch, 4, 28, 28, **half), torch.empty(1, device="meta")
    conditions = {
        "text_embeds": torch.empty(batch, 1280, **half),
        "time_ids": torch.empty(batch, 6, **half),
    }
    with FlopCounterMode(display=False) as stock:
        text = torch.empty(batch, 77, 2048, **half)
        unet(x, timestep, encoder_hidden_states=text, added_cond_kwargs=conditions)
    projector = PromptProjector(unet)
    of_unet = sum(p.nbytes for p in projector.parameters()) / sum(
        p.nbytes for p in unet.parameters()
    )
    assert of_unet == pytest.approx(0.13, abs=0.005)  # stays loaded unless all K and V are kept
    added, keys_values = projector(
        torch.empty(prompts, 77, 2048, **half),
        torch.empty(prompts, 1280, **half),
        torch.empty(6, device="meta"),
    )
    with FlopCounterMode(display=False) as ours:
        noise = Denoiser(unet, 77)(x, timestep, added, keys_values)
    assert noise.shape == x.shape
    assert added.shape == (prompts, 1280)
    assert keys_values[0].nbytes / 1e6 == pytest.approx(25.6, abs=0.1)
    per_image = stock.get_total_flops() / batch / 1e12
    assert per_image == pytest.approx(0.339, abs=1e-3)
    assert ours.get_total_flops() <= 0.85 * stock.get_total_flops()


def test_a_unet_of_another_kind_is_refused(tmp_path: Path):
    unet = small_parts(tmp_path).unet
    unet.register_to_config(addition_embed_type=None)
    with pytest.raises(ValueError, match="SDXL's text_time conditioning"):
        Denoiser(unet, 77)
