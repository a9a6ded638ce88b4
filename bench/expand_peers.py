"""Peers of bench_expand.py: opened by name, gated, and their memory measured, before timing.

The gate (bench/pictures.py) compares each with diffusers' usual pipeline: ours, and diffusers' own
in another precision, compiled or upcast. That pipeline makes its pictures first and is closed, so
that memory which a process allocates only once is charged to no peer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers_peer import (
    compile_pipeline,
    decode_tiny,
    open_pipeline,
    open_random_pipeline,
    run_pipeline,
    upcast_vae,
)
from measure import timed
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.expander import Expander
from patchbloom.export.config import DeviceName, Precision, Weights
from patchbloom.export.models import DTYPES, ModelSource, find_model
from patchbloom.kernels.pixels import upsample_patches
from peak_memory import MemoryWatch
from peer_names import DIFFUSERS, TINY, default_precision, is_tiny, split_name
from pictures import (
    EPOCH,
    Coreset,
    Errors,
    coarser,
    compare,
    expander_cases,
    open_expander,
    picture_errors,
    pipeline_cases,
    pipeline_pictures,
)
from torch import Tensor

VARIANTS: dict[str, Callable[[Any], None]] = dict(
    zip(DIFFUSERS, (lambda _: None, compile_pipeline, upcast_vae), strict=True)
)
"""Changes made to diffusers' pipeline, by the peer's name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Expansion, images per second."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    backends: tuple[str, ...] = ("diffusers", "ort")
    """Peers to time: diffusers, diffusers-compiled, diffusers-upcast (fp16 with a VAE in fp32, as
    SDXL's own asks for), eager, compile, ort, openvino, inductor, trt. Append to one of ours
    -launched to have no CUDA graph, or -tiny for the decoder of --tiny-decoder. Append -bf16,
    -fp16, -fp32, -int8 or -fp8 for another precision than the usual one (fp32 on the CPU, fp16 on a
    GPU); compare openvino-bf16 with diffusers-bf16."""
    tiny_decoder: str | None = None
    """Folder of the model with a tiny decoder, as `train decoder` writes it."""
    device: DeviceName = "auto"
    """`auto`: cuda if available."""
    weights: Weights = "pretrained"
    """`random`: the architecture only; speed does not depend on weights. Weights would differ
    between precisions, so backends must then be named without one."""
    batch: int = 32
    size: int = 64
    """Image size in px; patches are half as large."""
    classes: int = 10
    patches_per_class: int = 40
    images: int = 64
    """Images per pass."""
    threads: int = 2
    rounds: int = 5
    json: bool = False
    """Print the row as the last line; before, after every opened peer, the row so far."""
    record: bool = True
    """Append the row to bench/results/."""


def diffusers_pass(options: Options, pipeline: Any, coreset: Coreset) -> Callable[[], int]:
    """One pass of diffusers' pipeline over the upsampled patches, batch by batch."""
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
    """One pass of ours: the same samples, in one call."""
    samples = torch.arange(options.images)
    return lambda: len(expander.expand(samples, EPOCH))


def new_pipeline(model: ModelSource, device: str, precision: Precision) -> Any:
    """Diffusers' pipeline as users open it."""
    if model.weights == "random":
        return open_random_pipeline(model, device=device, precision=precision)
    return open_pipeline(model.folder, device=device, dtype=DTYPES[precision])


@dataclass(frozen=True)
class Peers:
    """Peers by name: the pass to time, and what was measured when opening it."""

    passes: dict[str, Callable[[], int]] = field(default_factory=dict)
    expanders: dict[str, Expander] = field(default_factory=dict)
    """Only ours."""
    setup_s: dict[str, float] = field(default_factory=dict)
    """Opening and a first pass, during which some compile."""
    errors: dict[str, Errors] = field(default_factory=dict)
    """Picture errors of every peer except the reference pipeline."""
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    """Images per second of a single pass, known before the other peers are opened."""


def open_peers(
    options: Options, model: ModelSource, device: str, coreset: Coreset
) -> Iterator[Peers]:
    """Open every peer, compare it with diffusers, and measure the memory of a second pass.

    Prints a line for each, and yields the peers so far. Raises RuntimeError when the gate fails.
    """
    peers, usual = Peers(), default_precision(device)
    # The timed batch size: a compiled pipeline would recompile for another one.
    samples, config = coreset.spread(options.batch), ExpandConfig(size_px=options.size)
    expected = pipeline_pictures(new_pipeline(model, device, usual), coreset, samples, config)
    tiny = tiny_pictures(options, device, coreset) if any(map(is_tiny, options.backends)) else None
    gc.collect()
    for name in options.backends:
        watch, start = MemoryWatch(device), time.perf_counter()
        one_pass, make_cases = open_peer(peers, options, name, model, device, coreset)
        one_pass()
        peers.setup_s[name] = round(time.perf_counter() - start, 2)
        peer, precision = split_name(name)
        if (peer, precision or usual) != ("diffusers", usual):
            cases = make_cases(samples)
            right = tiny if tiny is not None and is_tiny(name) else expected
            peers.errors[name] = compare(name, cases, right, coarser(precision or usual, usual))
            if is_tiny(name):
                peers.errors[name]["own_decoder"] = picture_errors(cases["same"], expected)
        peers.passes[name] = one_pass
        peers.memory[name] = watch.peak_of(one_pass)
        seconds, images = timed(one_pass)
        peers.single[name] = round(images / seconds, 2)
        print(f"{name:18} opened in {peers.setup_s[name]:.1f} s", flush=True)
        yield peers


def tiny_pictures(options: Options, device: str, coreset: Coreset) -> Tensor:
    """Pictures of diffusers' usual pipeline with the tiny decoder."""
    model = tiny_model(options)
    pipeline = new_pipeline(model, device, default_precision(device))
    decode_tiny(pipeline, model)
    config = ExpandConfig(size_px=options.size)
    return pipeline_pictures(pipeline, coreset, coreset.spread(options.batch), config)


def tiny_model(options: Options) -> ModelSource:
    """The model with a tiny decoder. Raises ValueError without one."""
    if options.tiny_decoder is None or options.weights == "random":
        raise ValueError(f"a backend with {TINY}: expected --tiny-decoder FOLDER and its weights")
    model = find_model(options.tiny_decoder)
    if not model.has_tiny_decoder:
        raise ValueError(f"--tiny-decoder {options.tiny_decoder}: the model has no tiny decoder")
    return model


def open_peer(
    peers: Peers, options: Options, name: str, model: ModelSource, device: str, coreset: Coreset
) -> tuple[Callable[[], int], Callable[[Tensor], dict[str, Tensor]]]:
    """A pass of the peer, and the function that makes its pictures; adds ours to `peers`."""
    peer, precision = split_name(name)
    if peer in VARIANTS:
        pipeline = new_pipeline(model, device, precision or default_precision(device))
        VARIANTS[peer](pipeline)
        one_pass = diffusers_pass(options, pipeline, coreset)
        return one_pass, lambda samples: pipeline_cases(
            pipeline, coreset, samples, ExpandConfig(size_px=options.size)
        )
    model = tiny_model(options) if is_tiny(name) else model
    expander = peers.expanders[name] = open_expander(
        name, model, coreset, device=device, size_px=options.size, batch=options.batch
    )
    one_pass = expander_pass(options, expander)
    return one_pass, lambda samples: expander_cases(expander, coreset, samples)
