"""Just-in-time compilation of the blocks that a UNet and a VAE are made of.

A region is a BasicTransformerBlock or a resnet block, compiled whole (`fullgraph`) for one batch.
Regions of equal shapes share one compiled function: SDXL-Turbo's 70 transformer blocks are two. The
rest stays torch's own: single convolutions, embeddings, and the slicing of keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...export.modules import KeyValueSlot
from ...export.terminal import say
from .fused_layers import FusedResnet

MOST_SHAPES = 64
"""Compiled functions per kind of region; torch's own limit of 8 is below a UNet's resnets."""


class SlicedCrossAttention:
    """Attention processor: queries of G · n images against K and V [G, heads, L, d] of G prompts.

    As modules.GroupedCrossAttention, but of K and V that were sliced before: their place in kv_GP
    differs between layers, and each would be compiled anew.
    """

    def __init__(self, slot: KeyValueSlot) -> None:
        self.head_width = slot.head_width

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        key_GhLd, value_GhLd = encoder_hidden_states
        grouped = (key_GhLd.shape[0], -1, attn.heads, self.head_width)
        query_GhQd = attn.to_q(hidden_states).view(grouped).transpose(1, 2)
        mixed_GhQd = F.scaled_dot_product_attention(query_GhQd, key_GhLd, value_GhLd)
        return attn.to_out[0](mixed_GhQd.transpose(1, 2).reshape(hidden_states.shape))


class PackedSelfAttention:
    """Attention processor of rows [B, S, D], whose Q, K and V are one product."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        packed_BS3hd = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1))
        mixed_BhSd = F.scaled_dot_product_attention(*packed_BS3hd.permute(2, 0, 3, 1, 4))
        return attn.to_out[0](mixed_BhSd.transpose(1, 2).flatten(2))


@contextmanager
def compiling(*networks: nn.Module, device: str) -> Iterator[None]:
    """Compile the networks' regions in place; the block calls each network once.

    Later calls must have the same shapes and layouts. Torch keeps what it compiled in a cache of
    its own: the next start takes seconds. Torch's errors pass through, and nothing falls back.
    """
    options: dict[str, Any] = {} if device == "cuda" else {"cpp.dynamic_threads": True}
    every: list[Any] = [each for network in networks for each in network.modules()]
    for module in every:
        if isinstance(module, BasicTransformerBlock):
            _pack_projections(module.attn1)
            _slice_before(module)
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D | FusedResnet):
            _compile(module, options)
    began_s = time.perf_counter()
    say("compiling the model's blocks: a minute or two the first time")
    # For good: a later change of torch's global state (deterministic algorithms) compiles again.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_SHAPES)
    yield
    say(f"compiled in {time.perf_counter() - began_s:.0f} s")


def _compile(module: Any, options: dict[str, Any]) -> None:
    """Compile `forward`, not the module: the hook that slices stays outside."""
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)


def _pack_projections(attn: Any) -> None:
    """One product for Q, K and V; frees their own weights."""
    if attn.residual_connection or attn.rescale_output_factor != 1 or attn.norm_q is not None:
        return  # not SDXL's
    attn.fuse_projections()
    attn.set_processor(PackedSelfAttention())
    del attn.to_q, attn.to_k, attn.to_v


def _slice_before(block: BasicTransformerBlock) -> None:
    """Slice the block's K and V from kv_GP before its compiled code."""
    cross: Any = block.attn2
    slot: KeyValueSlot = cross.processor.slot
    cross.set_processor(SlicedCrossAttention(slot))

    def sliced(_: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "encoder_hidden_states": slot.read(named["encoder_hidden_states"])}

    block.register_forward_pre_hook(sliced, with_kwargs=True)
