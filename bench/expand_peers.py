"""Who bench_expand.py times: opened by name, gated, and its memory looked at, before any clock.

The gate (bench/pictures.py) holds each against diffusers' usual pipeline: ours, and diffusers' own
in another precision, compiled or upcast. That pipeline's pictures are made first, and it is closed
again, so that what a process takes once, whoever comes first, is in nobody's memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers_peer import (
    compile_pipeline,
    open_pipeline,
    open_random_pipeline,
    run_pipeline,
    upcast_vae,
)
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.expander import Expander
from patchbloom.export.config import DeviceName, Precision, Weights
from patchbloom.export.models import DTYPES, ModelSource
from patchbloom.kernels.pixels import upsample_patches
from peak_memory import MemoryWatch
from peer_names import DIFFUSERS, default_precision, split_name
from pictures import (
    EPOCH,
    Coreset,
    Errors,
    coarser,
    compare,
    expander_cases,
    open_expander,
    pipeline_cases,
    pipeline_pictures,
)
from torch import Tensor

VARIANTS: dict[str, Callable[[Any], None]] = dict(
    zip(DIFFUSERS, (lambda _: None, compile_pipeline, upcast_vae), strict=True)
)
"""What becomes of diffusers' pipeline, by the peer's name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Expansion, images per second."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    backends: tuple[str, ...] = ("diffusers", "ort")
    """What to time: diffusers, diffusers-compiled, diffusers-upcast (in fp16 with a VAE in fp32, as
    SDXL's own asks for), eager, ort, inductor, trt; with -bf16, -fp16 or -fp32 another precision
    than the device's usual one (fp32 on the CPU, fp16 on a GPU): diffusers-bf16 beside ort-bf16."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    weights: Weights = "pretrained"
    """`random`: the architecture alone; speed does not depend on weights. Another precision would
    have other weights, so names then have none."""
    batch: int = 32
    size: int = 64
    """Image size in px; patches have half of it."""
    classes: int = 10
    patches_per_class: int = 40
    images: int = 64
    """Images of one pass."""
    threads: int = 2
    rounds: int = 5
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def diffusers_pass(options: Options, pipeline: Any, coreset: Coreset) -> Callable[[], int]:
    """Diffusers' pipeline on the upsampled patches, batch by batch."""
    config = ExpandConfig(size_px=options.size)

    def one_pass() -> int:
        for first in range(0, options.images, options.batch):
            samples = torch.arange(first, min(first + options.batch, options.images))
            patches = coreset.patches_NHWC[samples].to(pipeline.device)
            images = upsample_patches(patches, options.size, dtype=torch.float32)
            run_pipeline(
                pipeline,
                coreset.prompts_of(samples),
                image=(images * 0.5 + 0.5).to(pipeline.unet.dtype),
                strength=config.rho,
                num_inference_steps=config.steps,
            )
        return options.images

    return one_pass


def expander_pass(options: Options, expander: Expander) -> Callable[[], int]:
    """Ours: the same samples, in one call."""
    samples = torch.arange(options.images)
    return lambda: len(expander.expand(samples, EPOCH))


def new_pipeline(model: ModelSource, device: str, precision: Precision) -> Any:
    """Diffusers' pipeline as users open it."""
    if model.weights == "random":
        return open_random_pipeline(model, device=device, precision=precision)
    return open_pipeline(model.folder, device=device, dtype=DTYPES[precision])


@dataclass(frozen=True)
class Peers:
    """What is timed, each by its name, and what opening it told."""

    passes: dict[str, Callable[[], int]] = field(default_factory=dict)
    expanders: dict[str, Expander] = field(default_factory=dict)
    """Ours, whose pictures are diffusers'."""
    setup_s: dict[str, float] = field(default_factory=dict)
    """Opening and a first pass, on which some compile."""
    errors: dict[str, Errors] = field(default_factory=dict)
    """Of all but the pipeline that the others are held against."""
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)


def open_peers(options: Options, model: ModelSource, device: str, coreset: Coreset) -> Peers:
    """Open everybody, hold them against diffusers, and look at the memory of a second pass.

    RuntimeError: a failed gate. Prints a line for each.
    """
    peers, usual = Peers(), default_precision(device)
    # As many as are timed: a compiled pipeline would compile once more for another batch.
    samples, config = coreset.spread(options.batch), ExpandConfig(size_px=options.size)
    expected = pipeline_pictures(new_pipeline(model, device, usual), coreset, samples, config)
    gc.collect()
    for name in options.backends:
        watch, start = MemoryWatch(device), time.perf_counter()
        one_pass, make_cases = open_peer(peers, options, name, model, device, coreset)
        one_pass()
        peers.setup_s[name] = round(time.perf_counter() - start, 2)
        peer, precision = split_name(name)
        if (peer, precision or usual) != ("diffusers", usual):
            cases = make_cases(samples)
            peers.errors[name] = compare(name, cases, expected, coarser(precision or usual, usual))
        peers.passes[name] = one_pass
        peers.memory[name] = watch.peak_of(one_pass)
        print(f"{name:18} opened in {peers.setup_s[name]:.1f} s", flush=True)
    return peers


def open_peer(
    peers: Peers, options: Options, name: str, model: ModelSource, device: str, coreset: Coreset
) -> tuple[Callable[[], int], Callable[[Tensor], dict[str, Tensor]]]:
    """A pass of the peer, and what makes its pictures for the gate; ours is put among `peers`."""
    peer, precision = split_name(name)
    if peer in VARIANTS:
        pipeline = new_pipeline(model, device, precision or default_precision(device))
        VARIANTS[peer](pipeline)
        one_pass = diffusers_pass(options, pipeline, coreset)
        return one_pass, lambda samples: pipeline_cases(
            pipeline, coreset, samples, ExpandConfig(size_px=options.size)
        )
    expander = peers.expanders[name] = open_expander(
        name, model, coreset, device=device, size_px=options.size, batch=options.batch
    )
    one_pass = expander_pass(options, expander)
    return one_pass, lambda samples: expander_cases(expander, coreset, samples)
