"""Layers of diffusers' networks for torch on CUDA: fewer launches, fewer bytes, the same weights.

GroupNorm and SiLU become one operator, and so do GEGLU's chunk, gelu and product. Divisions by 1
and copies between NCHW and channels_last go. SDXL's own layers are replaced; others stay. No GPU
has run them yet; gradients are not defined.
Legend: B images, C channels, H W sides, P = H · W rows, D width, T time embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...export.models import ModelParts
from ...kernels.geglu import geglu
from ...kernels.group_norm import group_norm


def fuse(parts: ModelParts) -> None:
    """Replace layers of the UNet and VAE in place; the UNet's convolutions become channels_last.

    The UNet's result stays contiguous, as the sampler needs it.
    """
    modules: list[Any] = [*parts.unet.modules(), *parts.vae.modules()]
    for module in modules:
        for name, child in module.named_children():
            if isinstance(child, ResnetBlock2D) and _is_plain_resnet(child):
                setattr(module, name, FusedResnet(child))
            elif isinstance(child, GEGLU):
                setattr(module, name, FusedGEGLU(child))
        if isinstance(module, Attention):
            _fuse_attention(module)
        _fuse_ends(module)
    nn.Module.to(parts.unet, memory_format=torch.channels_last)
    parts.unet.conv_out.register_forward_hook(lambda *call: call[-1].contiguous())


def _fuse_attention(layer: Any) -> None:
    if is_plain_attention(layer):
        layer.set_processor(SelfAttention())
        if layer.group_norm is not None:
            layer.group_norm = FusedGroupNorm(layer.group_norm, silu=False)


def is_plain_attention(layer: Any) -> bool:
    """Whether it is SDXL's self-attention: the UNet's of rows, the VAE's of images with norm and
    residual."""
    return (
        not layer.is_cross_attention
        and layer.rescale_output_factor == 1
        and layer.norm_q is layer.norm_k is layer.spatial_norm is None
        and layer.residual_connection == (layer.group_norm is not None)
    )


def _fuse_ends(module: Any) -> None:
    """A network's last norm, and a transformer's borders with the images around it."""
    if isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm):
        if isinstance(module.conv_act, nn.SiLU):
            module.conv_norm_out = FusedGroupNorm(module.conv_norm_out, silu=True)
            module.conv_act = nn.Identity()
    elif getattr(module, "is_input_continuous", False):  # Transformer2DModel
        module.norm = FusedGroupNorm(module.norm, silu=False)
        if module.use_linear_projection:
            module._get_output_for_continuous_inputs = partial(_add_rows, module)


def _add_rows(transformer: Any, hidden_states: Tensor, residual: Tensor, **_: int) -> Tensor:
    """Transformer2DModel's end without its copy to NCHW: rows [B, P, C] + image [B, C, H, W]."""
    rows_BCP = transformer.proj_out(hidden_states).transpose(1, 2)
    return rows_BCP.unflatten(2, residual.shape[2:]) + residual


class FusedGroupNorm(nn.Module):
    """GroupNorm, then SiLU if asked, of images [B, C, H, W], in channels_last."""

    def __init__(self, stock: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = stock.num_groups, stock.eps, silu
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        affine = self.weight, self.bias
        return group_norm(x_BCHW, self.groups, *affine, eps=self.eps, silu=self.silu)


def _is_plain_resnet(block: ResnetBlock2D) -> bool:
    """Whether it is SDXL's: SiLU, the time added, no resampling, no scale."""
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and (block.time_emb_proj is None or block.time_embedding_norm == "default")
        and not (block.up or block.down or block.skip_time_act)
        and block.output_scale_factor == 1
    )


class FusedResnet(nn.Module):
    """SDXL's ResnetBlock2D: (x_BCHW, time embedding [B, T] or None) → [B, C, H, W]."""

    def __init__(self, stock: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1 = FusedGroupNorm(stock.norm1, silu=True)
        self.norm2 = FusedGroupNorm(stock.norm2, silu=True)
        self.conv1, self.conv2 = stock.conv1, stock.conv2
        self.time_emb_proj: Any = stock.time_emb_proj
        self.conv_shortcut = stock.conv_shortcut or nn.Identity()

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        x_BCHW = self.conv1(self.norm1(input_tensor))
        if temb is not None:
            x_BCHW = x_BCHW + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(input_tensor) + self.conv2(self.norm2(x_BCHW))


class FusedGEGLU(nn.Module):
    """diffusers' GEGLU: rows [B, P, D] → [B, P, D of its output]."""

    def __init__(self, stock: GEGLU) -> None:
        super().__init__()
        self.proj = stock.proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return geglu(self.proj(hidden_states))


class SelfAttention:
    """Attention processor of rows [B, P, D], or of images [B, C, H, W] with norm and residual.

    Q, K and V are one product where diffusers has fused their projections.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        rows_BPD = hidden_states
        if attn.group_norm is not None:
            rows_BPD = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        if attn.fused_projections:
            projected = attn.to_qkv(rows_BPD).chunk(3, dim=2)
        else:
            projected = tuple(to(rows_BPD) for to in (attn.to_q, attn.to_k, attn.to_v))
        heads_BhPd = (each.unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in projected)
        mixed_BPhd = F.scaled_dot_product_attention(*heads_BhPd).transpose(1, 2)
        out_BPD = attn.to_out[0](mixed_BPhd.flatten(2))
        if attn.group_norm is None:
            return out_BPD
        return out_BPD.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) + hidden_states
