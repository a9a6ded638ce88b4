"""The memory and disk that an engine needs, from the model's configuration, and what is free.

    weights   parameters × bytes of their precision
    layer     batch × channels × px² × bytes: the VAE's largest feature map, which at SDXL's sizes
              dwarfs the UNet's
    memory    HELD · weights + LAYERS · layer: an estimate
    disk      weights, once

A build is refused only when it cannot succeed: `least_bytes` is the weights once and one layer,
which torch holds while it computes the outputs that the engine is compared with.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ...export.config import BackendName, EngineSpec
from ...export.machine import free_host_bytes, gpu_memory_bytes
from ...export.models import ModelSource, Unavailable, load_parts

HELD: dict[BackendName, int] = {"eager": 1, "ort": 2, "inductor": 2, "trt": 2}
"""Copies of the weights at the peak: as written, and as compiled."""
LAYERS = 3  # a resnet's input, intermediate and output
GRAPHS_SHARE = 0.8
"""Share of the weights that is certainly in the graphs: K and V of the prompts are computed
outside, 13 % of SDXL-Turbo's UNet."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of one engine."""

    unet_parameters: int
    vae_parameters: int
    weights_bytes: int
    layer_bytes: int
    held: int
    """Copies of the weights in memory, see HELD."""

    @property
    def memory_bytes(self) -> int:
        """Estimated peak, of GPU memory on cuda, of host memory on the CPU."""
        return self.held * self.weights_bytes + LAYERS * self.layer_bytes

    @property
    def least_bytes(self) -> int:
        """Memory without which it cannot be built."""
        return self.weights_bytes + self.layer_bytes

    @property
    def least_disk_bytes(self) -> int:
        """Disk space without which it cannot be stored."""
        return int(GRAPHS_SHARE * self.weights_bytes)

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
    )
    counts = [sum(each.numel() for each in part.parameters()) for part in (parts.unet, parts.vae)]
    unet_bytes, vae_bytes = parts.unet.dtype.itemsize, parts.vae.dtype.itemsize
    channels = list(parts.vae.config["block_out_channels"])
    layer_bytes = spec.batch * max(channels[:2]) * spec.size_px**2 * vae_bytes
    return Needs(
        unet_parameters=counts[0],
        vae_parameters=counts[1],
        weights_bytes=counts[0] * unet_bytes + counts[1] * vae_bytes,
        layer_bytes=0 if export_only else layer_bytes,
        held=1 if export_only else HELD[backend],
    )


def check_room(needs: Needs, spec: EngineSpec, bundles: Path) -> None:
    """Raise Unavailable when memory or disk is certainly too small; writes nothing."""
    free = gpu_memory_bytes()[0] if spec.device == "cuda" else free_host_bytes()
    if free < needs.least_bytes:
        where = "GPU memory" if spec.device == "cuda" else "memory"
        raise Unavailable(
            f"this build needs at least {_gb(needs.least_bytes)} of {where} (weights "
            f"{_gb(needs.weights_bytes)}, largest layer {_gb(needs.layer_bytes)}), {_gb(free)} are "
            "free: end what else runs there, or use a smaller --batch, --size or --precision"
        )
    if spec.device == "cuda" and free_host_bytes() < needs.weights_bytes:
        raise Unavailable(
            f"this build loads {_gb(needs.weights_bytes)} of weights through the host's memory, "
            f"{_gb(free_host_bytes())} are free: end what else runs there"
        )
    free = free_disk_bytes(bundles)
    if free < needs.least_disk_bytes:
        raise Unavailable(
            f"this engine needs at least {_gb(needs.least_disk_bytes)} in {bundles}, {_gb(free)} "
            "are free there: remove engines with `engine remove`, or choose another folder with "
            "--bundles"
        )


def free_disk_bytes(folder: Path) -> int:
    """Free disk space where the folder is, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
