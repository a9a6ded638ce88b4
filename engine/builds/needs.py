"""The memory and disk that an engine needs, from the model's configuration, and what is free.

    weights   parameters × bytes of their precision
    layer     images × channels × px² × bytes: the VAE's largest feature map, which at SDXL's sizes
              dwarfs the UNet's; images: the batch, or the part of it that the VAE runs at a time
    memory    k · weights + LAYERS · layer, k = 1 to run eagerly, 2 to build: an estimate
    disk      weights, once

A build is refused only when it cannot succeed: `least_bytes` is the weights once and one layer,
which torch holds while it computes the outputs that the engine is compared with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...export.bundle import bundles_option
from ...export.config import UNBUILT, BackendName, EngineSpec
from ...export.graphs import vae_batch, vae_layer
from ...export.machine import free_disk_bytes, free_host_bytes, gpu_memory_bytes
from ...export.models import TOKENS, ModelSource, Unavailable, load_parts
from ...export.modules import INT32_MAX, key_value_slots

SMALLER = "--batch, --size, no --min-batch of engine build; --engine-batch, --image-size of train"
LAYERS = 3  # a resnet's input, intermediate and output
UNET_LAYERS = 5
"""An image's share of the UNet's peak, in its largest tensors. SDXL-Turbo traced on meta tensors in
fp16: 7.9 MB an image at 224 px and 41 at 512; five are 9 and 51."""
GRAPHS_SHARE = 0.8
"""Least share of the weights in the graphs: the prompts' K and V are computed outside, 13 % of
SDXL-Turbo's UNet."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of one engine."""

    unet_parameters: int
    vae_parameters: int
    weights_bytes: int
    layer_bytes: int
    memory_bytes: int
    """Estimated peak: GPU memory on cuda, host memory on the CPU."""
    image_bytes: int
    """Memory of an image in the UNet, with its own prompt's keys and values."""
    deep_tokens: int
    """Positions of an image at the UNet's deepest level."""
    deep_columns: int
    """Channels there."""
    refused_elements: int = 0
    """Elements of the largest tensor where TensorRT does not take it."""

    @property
    def least_bytes(self) -> int:
        """Memory without which it cannot be built."""
        return self.weights_bytes + self.layer_bytes

    def parameters(self) -> str:
        """UNet + VAE parameters, for display."""
        return f"{self.unet_parameters / 1e6:,.0f} M + {self.vae_parameters / 1e6:,.0f} M"


def engine_needs(
    model: ModelSource, spec: EngineSpec, backend: BackendName, *, export_only: bool = False
) -> Needs:
    """Compute the needs from a model's layers on the meta device; reads no weights.

    An export alone runs nothing, so it holds the weights once and no layer.
    """
    parts = load_parts(
        replace(model, weights="random"),
        precision=spec.precision,
        vae_precision=spec.vae_precision,
        device="meta",
        runs_on=spec.device,
    )
    counts = [sum(each.numel() for each in part.parameters()) for part in (parts.unet, parts.vae)]
    fp32 = backend == "openvino"  # whatever the precision: to_openvino.py
    unet_bytes, vae_bytes = (4 if fp32 else p.dtype.itemsize for p in (parts.unet, parts.vae))
    channels = parts.vae.config["block_out_channels"]
    weights_bytes = counts[0] * unet_bytes + counts[1] * vae_bytes
    layer = vae_batch(spec, channels) * vae_layer(spec, channels)
    config: Any = parts.unet.config
    side = spec.size_px // 2 ** (len(channels) - 1)
    unet_layer = _unet_layer(config, side)
    largest = max(layer, spec.batch * unet_layer)
    slots = key_value_slots(parts.unet, TOKENS)
    keys = sum(2 * slot.size for slot in slots)
    too_large = backend == "trt" and spec.trt_library != "rtx" and largest > INT32_MAX
    layer_bytes = 0 if export_only else layer * vae_bytes
    copies = 1 if export_only or backend in UNBUILT else 2  # as written, and as compiled
    return Needs(
        unet_parameters=counts[0],
        vae_parameters=counts[1],
        weights_bytes=weights_bytes,
        layer_bytes=layer_bytes,
        memory_bytes=copies * weights_bytes + LAYERS * layer_bytes,
        image_bytes=(UNET_LAYERS * unet_layer + keys) * unet_bytes,
        deep_tokens=(side >> len(config.block_out_channels) - 1) ** 2,
        deep_columns=config.block_out_channels[-1],
        refused_elements=largest if too_large else 0,
    )


def _unet_layer(config: Any, side: int) -> int:
    """Elements of an image's largest tensor in the UNet, with latents of side² positions: a
    transformer's GEGLU, 8 · C wide, or the three inputs of a level's first convolution."""
    levels = enumerate(zip(config["block_out_channels"], config["down_block_types"], strict=True))
    return max(
        (8 if "CrossAttn" in kind else 3) * channels * (side >> level) ** 2
        for level, (channels, kind) in levels
    )


def check_room(needs: Needs, device: str, bundles: Path) -> None:
    """Raise Unavailable when memory or disk is certainly too small, or a tensor too large for
    TensorRT; writes nothing."""
    if needs.refused_elements:
        raise Unavailable(
            "TensorRT takes tensors of fewer than 2^31 elements, the largest here has "
            f"{needs.refused_elements:,}: make it smaller ({SMALLER})"
        )
    free = gpu_memory_bytes()[0] if device == "cuda" else free_host_bytes()
    if free < needs.least_bytes:
        where = "GPU memory" if device == "cuda" else "memory"
        raise Unavailable(
            f"this build needs at least {_gb(needs.least_bytes)} of {where} (weights "
            f"{_gb(needs.weights_bytes)}, largest layer {_gb(needs.layer_bytes)}), {_gb(free)} are "
            f"free: end what else runs there, or make it smaller ({SMALLER}, or --precision)"
        )
    if device == "cuda" and free_host_bytes() < needs.weights_bytes:
        raise Unavailable(
            f"this build loads {_gb(needs.weights_bytes)} of weights through the host's memory, "
            f"{_gb(free_host_bytes())} are free: end what else runs there"
        )
    check_disk(needs, bundles)


def check_disk(needs: Needs, bundles: Path) -> None:
    """Raise Unavailable when the engine can certainly not be stored there; writes nothing."""
    folder = bundles.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise Unavailable(
            f"no engine can be stored in {bundles} ({nearest} is not a folder that you may write "
            "to): choose another folder with --bundles"
        )
    free, disk_bytes = free_disk_bytes(bundles), int(GRAPHS_SHARE * needs.weights_bytes)
    if free < disk_bytes:
        raise Unavailable(
            f"this engine needs at least {_gb(disk_bytes)} in {bundles}, {_gb(free)} "
            f"are free there: remove some with `engine remove NAME{bundles_option(bundles)}`, or "
            "choose another folder with --bundles"
        )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
