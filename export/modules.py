"""Export-ready torch modules around diffusers' networks; weights and arithmetic are unchanged.

Legend: B = G · n images in a batch of G prompts × n images (image b belongs to prompt b // n),
C latent channels, h w latent size, H W image size, L tokens, D embedding width, P concatenated keys
and values of one prompt. Each module equals the stock pipeline to fp32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


@dataclass(frozen=True)
class KeyValueSlot:
    """Position in kv_GP of one cross-attention layer's K [heads, L, d], directly followed by V."""

    start: int
    heads: int
    tokens: int
    head_width: int

    @property
    def size(self) -> int:
        """Elements of K; V has as many."""
        return self.heads * self.tokens * self.head_width

    def read(self, kv_GP: Tensor) -> tuple[Tensor, Tensor]:
        """K and V as views [G, heads, L, d]."""
        shape = (kv_GP.shape[0], self.heads, self.tokens, self.head_width)
        middle = self.start + self.size
        key_GhLd = kv_GP[:, self.start : middle].view(shape)
        return key_GhLd, kv_GP[:, middle : middle + self.size].view(shape)


def _cross_attentions(unet: UNet2DConditionModel) -> list[Any]:
    layers = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    ]
    for layer in layers:
        plain = layer.norm_cross is None and layer.norm_q is None and layer.norm_k is None
        if not plain or layer.residual_connection or layer.rescale_output_factor != 1:
            raise ValueError(
                "the UNet's cross-attention must be SDXL's plain one, got normalised, "
                "residual or rescaled attention; use an SDXL model"
            )
    return layers


def key_value_slots(unet: UNet2DConditionModel, tokens: int) -> list[KeyValueSlot]:
    """The layout of kv_GP, in the order of the UNet's cross-attention layers."""
    slots, start = [], 0
    for layer in _cross_attentions(unet):
        slot = KeyValueSlot(start, layer.heads, tokens, layer.to_k.out_features // layer.heads)
        slots.append(slot)
        start += 2 * slot.size
    return slots


class GroupedCrossAttention:
    """Attention processor: queries of G · n images against K and V of G prompts.

    The n images of a prompt are n · S queries of one attention, so K and V are never copied.
    """

    def __init__(self, slot: KeyValueSlot) -> None:
        self.slot = slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        images, pixels, width = hidden_states.shape
        key_GhLd, value_GhLd = self.slot.read(encoder_hidden_states)
        grouped = (key_GhLd.shape[0], -1, attn.heads, self.slot.head_width)
        query_GhQd = attn.to_q(hidden_states).view(grouped).transpose(1, 2)
        mixed_GhQd = F.scaled_dot_product_attention(query_GhQd, key_GhLd, value_GhLd)
        return attn.to_out[0](mixed_GhQd.transpose(1, 2).reshape(images, pixels, width))


INT32_MAX = 2**31 - 1


class Upsampler(nn.Module):
    """diffusers' upsampler: nearest neighbours to twice the size or `output_size`, then a conv.

    It drops diffusers' branch for 64 images or more, which would end an exported range of batches
    at 63, and keeps a check of the cause: torch's channels_last kernel on CUDA counted elements in
    32 bits (pytorch issue 141831).
    """

    def __init__(self, stock: Upsample2D) -> None:
        super().__init__()
        if stock.norm is not None or stock.use_conv_transpose or not stock.interpolate:
            raise ValueError(
                "the upsampler must be SDXL's: nearest neighbours, then a convolution; "
                "use an SDXL model"
            )
        self.conv = (stock.conv if stock.name == "conv" else stock.Conv2d_0) or nn.Identity()

    def forward(self, x_BCHW: Tensor, output_size: Any = None) -> Tensor:
        if not torch.compiler.is_exporting() and 4 * x_BCHW.numel() > INT32_MAX:
            x_BCHW = x_BCHW.contiguous()
        if output_size is not None:
            return self.conv(F.interpolate(x_BCHW, size=output_size, mode="nearest"))
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def _replace_upsamplers(network: nn.Module) -> None:
    """Replace every Upsample2D of diffusers by an Upsampler with the same weights."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample2D):
                setattr(parent, name, Upsampler(child))


class Denoiser(nn.Module):
    """SDXL's UNet without the text side: (x_BCHW, timestep_1, added_GD, kv_GP) → eps_BCHW.

    x is the scaled model input, timestep is fp32, added_GD and kv_GP come from PromptProjector.
    Takes over the UNet: replaces its cross-attention processors and upsamplers. Raises ValueError
    when it is not an SDXL UNet.
    """

    def __init__(self, unet: UNet2DConditionModel, tokens: int) -> None:
        super().__init__()
        config: Any = unet.config
        if config.addition_embed_type != "text_time" or unet.encoder_hid_proj is not None:
            raise ValueError(
                "the UNet must have SDXL's text_time conditioning, "
                f"got {config.addition_embed_type}; use an SDXL model"
            )
        self.unet = unet
        _replace_upsamplers(unet)
        slots = key_value_slots(unet, tokens)
        for layer, slot in zip(_cross_attentions(unet), slots, strict=True):
            layer.set_processor(GroupedCrossAttention(slot))
        # UNet2DConditionModel.forward adds this method's result to the time embedding.
        unet.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: (
            added_cond_kwargs["added_BD"]
        )

    def forward(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        images_per_prompt = x_BCHW.shape[0] // added_GD.shape[0]
        added_BD = added_GD.repeat_interleave(images_per_prompt, dim=0)
        return self.unet(
            x_BCHW,
            timestep_1,
            encoder_hidden_states=kv_GP,
            added_cond_kwargs={"added_BD": added_BD},
            return_dict=False,
        )[0]


class PromptProjector(nn.Module):
    """The UNet's inputs from a prompt: (text_GLD, pooled_GD, time_ids_6) → (added_GD, kv_GP).

    time_ids is SDXL's micro-conditioning: original height and width, crop top and left, target
    height and width, in pixels. Shares only the UNet weights that it needs: 13 % of SDXL-Turbo's.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        layers = _cross_attentions(unet)
        self.heads = [layer.heads for layer in layers for _ in range(2)]
        self.projections = nn.ModuleList(
            project for layer in layers for project in (layer.to_k, layer.to_v)
        )
        self.time_proj, self.embedding = unet.add_time_proj, unet.add_embedding

    def forward(
        self, text_GLD: Tensor, pooled_GD: Tensor, time_ids_6: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompts = pooled_GD.shape[0]
        times_D = self.time_proj(time_ids_6).flatten()
        times_GD = times_D.expand(prompts, -1).to(pooled_GD.dtype)
        added_GD = self.embedding(torch.cat([pooled_GD, times_GD], dim=-1))
        pieces = []
        for heads, project in zip(self.heads, self.projections, strict=True):
            heads_GLhd = project(text_GLD).unflatten(-1, (heads, -1))
            pieces.append(heads_GLhd.transpose(1, 2).flatten(1))
        return added_GD, torch.cat(pieces, dim=1)


def _latent_statistics(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Shift and scale [1, C, 1, 1] of latents = (raw - shift) · scale, as in the pipeline."""
    config: Any = vae.config
    channels, factor = config.latent_channels, config.scaling_factor
    mean, std = config.latents_mean, config.latents_std
    if mean is None or std is None:
        return torch.zeros(1, channels, 1, 1), torch.full((1, channels, 1, 1), factor)
    scale = factor / torch.tensor(std, dtype=torch.float32)
    return torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), scale.view(1, -1, 1, 1)


class LatentEncoder(nn.Module):
    """images_BCHW in [-1, 1] → moments [B, 2C, h, w]: mean and standard deviation of the latents.

    Both are in the UNet's units (shifted and scaled); a latent is mean, or mean + std · n.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv or nn.Identity()
        shift, scale = _latent_statistics(vae)
        dtype, device = vae.dtype, vae.device
        self.register_buffer("shift", shift.to(device, dtype), persistent=False)
        self.register_buffer("scale", scale.to(device, dtype), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        mean, log_variance = self.quant_conv(self.encoder(images_BCHW)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # diffusers' bounds
        return torch.cat([(mean - self.shift) * self.scale, std * self.scale], dim=1)


class LatentDecoder(nn.Module):
    """latents_BCHW in the UNet's units → images [B, 3, H, W], clamped to [-1, 1].

    Takes over the VAE's decoder: replaces its upsamplers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        _replace_upsamplers(vae.decoder)
        self.decoder, self.conv = vae.decoder, vae.post_quant_conv or nn.Identity()
        shift, scale = _latent_statistics(vae)
        dtype, device = vae.dtype, vae.device
        self.register_buffer("shift", shift.to(device, dtype), persistent=False)
        self.register_buffer("scale", scale.to(device, dtype), persistent=False)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        raw_BCHW = latents_BCHW / self.scale + self.shift
        return self.decoder(self.conv(raw_BCHW)).clamp(-1.0, 1.0)


class TinyLatentDecoder(nn.Module):
    """LatentDecoder's inputs and outputs, by an AutoencoderTiny."""

    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder = tiny.decoder

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        return self.decoder(latents_BCHW).clamp(-1.0, 1.0)
