"""The graphs to compile: a model's encoder, denoiser and decoder, with borders of known shape.

Every backend starts from these three modules and is compared with them. Height and width are
static; the batch is static too, or a range of prompts with n images each. Encoder and decoder may
run a static batch in parts.
Legend: B = G · n images of G prompts, C latent channels, h w latent size, P keys and values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import EngineSpec
from .models import DTYPES, PRECISIONS, ModelParts
from .modules import (
    Denoiser,
    LatentDecoder,
    LatentEncoder,
    TinyLatentDecoder,
    key_value_slots,
)

GRAPHS = ("encoder", "denoiser", "decoder")
VAE_ELEMENTS = 2**29
"""Most elements of a feature map in encoder and decoder, 1 GB in half precision: a larger batch
runs in parts. TensorRT takes fewer than 2^31."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    """Shape at the largest batch."""
    dtype: torch.dtype
    per_prompt: int = 0
    """Rows of the first dimension per prompt; 0: it does not grow with the batch."""


def prompts_of(name: str, rows: int, per_prompt: int, *, fewest: int, most: int) -> int:
    """Prompts in a call to an engine with a range of batches, from the rows of its first input.

    Raises ValueError when that is not a whole number in the engine's range.
    """
    prompts, rest = divmod(rows, per_prompt)
    if rest or not fewest <= prompts <= most:
        raise ValueError(
            f"{name} must have {fewest * per_prompt} to {most * per_prompt} rows in steps of "
            f"{per_prompt}, the engine's batches, got {rows}"
        )
    return prompts


@dataclass(frozen=True)
class Borders:
    """Inputs and output of a compiled graph."""

    inputs: tuple[Port, ...]
    output: Port


@dataclass(frozen=True)
class Graph:
    """A module and its borders; `inputs` in the order of the module's arguments."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    output: Port
    min_prompts: int | None = None
    """Fewest prompts in a range of batches; None: the batch is static."""

    def random_inputs(self, seed: int) -> list[Tensor]:
        """Standard normal inputs on the module's device; a timestep is whole, in [0, 999]."""
        generator = torch.Generator().manual_seed(seed)
        device = next(self.module.parameters()).device
        values = []
        for port in self.inputs:
            value = torch.randn(port.shape, generator=generator)
            if port.name == "timestep":
                value = value.abs().mul(300).clamp(max=999).floor()
            values.append(value.to(device, port.dtype))
        return values


def first_prompts(ports: Sequence[Port], values: Sequence[Tensor], prompts: int) -> list[Tensor]:
    """The values of the first prompts."""
    return [
        value[: port.per_prompt * prompts or port.shape[0]]
        for port, value in zip(ports, values, strict=True)
    ]


@contextmanager
def layers_in_fp32(module: nn.Module) -> Iterator[None]:
    """Hold each layer's weights in fp32 while it runs: a copy of SDXL-Turbo's UNet takes 10 GB."""

    def widen(layer: nn.Module, _: Any) -> None:
        layer.float()

    def narrow(layer: nn.Module, *_: Any) -> None:
        layer.to(dtype)  # what it was: fp32 holds every half-precision number

    dtype = next(module.parameters()).dtype
    layers = [each for each in module.modules() if not list(each.children())]
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(narrow) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_borders(graph: Graph, folder: Path) -> None:
    """Write `<graph>.json`, for sessions whose engines do not report shapes and dtypes."""
    ports = [
        {
            "name": port.name,
            "shape": port.shape,
            "precision": PRECISIONS[port.dtype],
            "per_prompt": port.per_prompt,
        }
        for port in (*graph.inputs, graph.output)
    ]
    (folder / f"{graph.name}.json").write_text(json.dumps(ports, indent=1))


def read_borders(folder: Path, name: str) -> Borders:
    """Read one graph's `<graph>.json`."""
    *inputs, output = (
        Port(port["name"], tuple(port["shape"]), DTYPES[port["precision"]], port["per_prompt"])
        for port in json.loads((folder / f"{name}.json").read_text())
    )
    return Borders(tuple(inputs), output)


def vae_batch(spec: EngineSpec, block_out_channels: Sequence[int]) -> int:
    """Images per call of encoder and decoder: the batch in as few equal parts as fit, rounded up.

    A part fits with at most VAE_ELEMENTS in the largest feature map. A range of batches runs whole.
    """
    if spec.min_batch is not None:
        return spec.batch
    most = max(1, VAE_ELEMENTS // vae_layer(spec, block_out_channels))
    return math.ceil(spec.batch / math.ceil(spec.batch / most))


def vae_layer(spec: EngineSpec, block_out_channels: Sequence[int]) -> int:
    """Elements of an image's largest feature map in encoder and decoder."""
    return max(block_out_channels[:2]) * spec.size_px**2


def make_graphs(parts: ModelParts, spec: EngineSpec, *, tokens: int) -> tuple[Graph, Graph, Graph]:
    """A model's encoder, denoiser and decoder at an engine's shapes; takes over the parts."""
    vae_config: Any = parts.vae.config
    channels, n = vae_config.latent_channels, spec.images_per_prompt
    side = spec.size_px // 2 ** (len(vae_config.block_out_channels) - 1)
    latents = (spec.batch, channels, side, side)
    rows = vae_batch(spec, vae_config.block_out_channels)
    vae_n = n if rows == spec.batch else 1
    vae_latents = (rows, channels, side, side)
    moments = (rows, 2 * channels, side, side)
    images = (rows, 3, spec.size_px, spec.size_px)
    width = parts.unet.time_embedding.linear_2.out_features
    kv_width = 2 * sum(slot.size for slot in key_value_slots(parts.unet, tokens))
    unet_dtype, vae_dtype = parts.unet.dtype, parts.vae.dtype
    tiny = parts.tiny_decoder
    decoder = LatentDecoder(parts.vae) if tiny is None else TinyLatentDecoder(tiny)
    denoiser_inputs = (
        Port("latents", latents, unet_dtype, n),
        Port("timestep", (1,), torch.float32),
        Port("added", (spec.prompts, width), unet_dtype, 1),
        Port("keys_values", (spec.prompts, kv_width), unet_dtype, 1),
    )
    min_prompts = spec.min_prompts if spec.min_batch else None
    return (
        Graph(
            "encoder",
            LatentEncoder(parts.vae).eval(),
            (Port("images", images, vae_dtype, vae_n),),
            Port("moments", moments, vae_dtype, vae_n),
            min_prompts,
        ),
        Graph(
            "denoiser",
            Denoiser(parts.unet, tokens).eval(),
            denoiser_inputs,
            Port("noise", latents, unet_dtype, n),
            min_prompts,
        ),
        Graph(
            "decoder",
            decoder.eval(),
            (Port("latents", vae_latents, vae_dtype, vae_n),),
            Port("images", images, vae_dtype, vae_n),
            min_prompts,
        ),
    )
