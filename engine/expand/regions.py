"""Just-in-time compilation of the blocks that a UNet and a VAE are made of.

A region is a BasicTransformerBlock or a resnet block, compiled whole (`fullgraph`) for one batch.
Regions of equal shapes share one compiled function: SDXL-Turbo's 70 transformer blocks are two. The
rest stays torch's own: single convolutions, embeddings, and the slicing of keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...export.modules import GroupedCrossAttention, KeyValueSlot
from ...export.terminal import say
from .fused_layers import FusedResnet, SelfAttention, is_plain_attention

REGIONS = (BasicTransformerBlock, ResnetBlock2D, FusedResnet)
MOST_SHAPES = 64
"""Compiled functions per kind of region; torch's own limit of 8 is below a UNet's resnets."""


@dataclass(frozen=True)
class Sliced:
    """A KeyValueSlot whose K and V [G, heads, L, d] were sliced before.

    Their place in kv_GP differs between layers, and each would be compiled anew.
    """

    head_width: int

    def read(self, key_value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return key_value


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
        if isinstance(module, REGIONS):
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
    """One product for Q, K and V, unless they are in eight bits; frees their own weights."""
    if is_plain_attention(attn) and isinstance(attn.to_q, nn.Linear):
        attn.fuse_projections()
        attn.set_processor(SelfAttention())
        del attn.to_q, attn.to_k, attn.to_v


def _slice_before(block: BasicTransformerBlock) -> None:
    """Slice the block's K and V from kv_GP before its compiled code."""
    cross: Any = block.attn2
    slot: KeyValueSlot = cross.processor.slot
    cross.set_processor(GroupedCrossAttention(cast(Any, Sliced(slot.head_width))))

    def sliced(_: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "encoder_hidden_states": slot.read(named["encoder_hidden_states"])}

    block.register_forward_pre_hook(sliced, with_kwargs=True)
