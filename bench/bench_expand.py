"""How fast patches become images: our backends against diffusers' own img2img pipeline.

    python bench/bench_expand.py --model sdxl-tiny --backends diffusers ort --batch 32 --json

First the gate of bench/pictures.py: every backend must make the pictures that diffusers makes, and
wrong prompts and timesteps must fail. `eager`, `ort` and `inductor` compute in fp32, `eager-bf16`
and `inductor-bf16` in bf16. Then the clock: `diffusers` is its pipeline called as a user calls it,
patches and prompts in, pictures out; ours expands samples of an open coreset. What we do once per
coreset is outside the clock and listed in `outside_clock` with its seconds. Mixup is off, diffusers
has none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers_peer import (
    compile_pipeline,
    open_pipeline,
    open_random_pipeline,
    run_pipeline,
)
from measure import environment, measure_rates, publish, ratios
from patchbloom.engine.backends import resolve_device
from patchbloom.engine.turbo import Expander
from patchbloom.export.config import DeviceName, Weights
from patchbloom.export.models import DTYPES, ModelSource, find_model
from patchbloom.kernels.pixels import upsample_patches
from pictures import (
    EPOCH,
    MIN_PSNR_DB,
    TOLERANCE,
    Coreset,
    compare_with_diffusers,
    default_precision,
    make_coreset,
    open_expander,
)

OUTSIDE_CLOCK = (
    "loading the model",
    "finding or building the engine",
    "text embeddings, added embeddings and cross-attention keys and values of every class",
    "upsampling and encoding every patch",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Expansion, images per second."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    backends: tuple[str, ...] = ("diffusers", "ort")
    """What to time: diffusers, diffusers-compiled, eager, ort, inductor, trt; with -bf16, -fp16 or
    -fp32 another precision than the device's usual one (fp32 on the CPU, fp16 on a GPU)."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    weights: Weights = "pretrained"
    """`random`: the architecture alone; speed does not depend on weights. Another precision would
    have other weights, so names then have none."""
    batch: int = 32
    size: int = 64
    """Image size in px; patches have half of it."""
    steps: int = 5
    rho: float = 0.8
    classes: int = 10
    patches_per_class: int = 40
    images: int = 64
    """Images of one pass."""
    threads: int = 2
    rounds: int = 5
    bundles: Path | None = None
    """Folder of built engines; by default the user's cache."""
    seed: int = 0
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def diffusers_pass(options: Options, pipeline: Any, coreset: Coreset) -> Callable[[], int]:
    """Diffusers' pipeline on the upsampled patches, batch by batch."""

    def one_pass() -> int:
        for first in range(0, options.images, options.batch):
            samples = torch.arange(first, min(first + options.batch, options.images))
            patches = coreset.patches_NHWC[samples].to(pipeline.device)
            images = upsample_patches(patches, options.size, mode="bicubic", dtype=torch.float32)
            run_pipeline(
                pipeline,
                coreset.prompts_of(samples),
                image=(images * 0.5 + 0.5).to(pipeline.unet.dtype),
                strength=options.rho,
                num_inference_steps=options.steps,
            )
        return options.images

    return one_pass


def expander_pass(options: Options, expander: Expander) -> Callable[[], int]:
    """Ours: the same samples, in one call."""
    samples = torch.arange(options.images)
    return lambda: len(expander.expand(samples, EPOCH))


def new_pipeline(model: ModelSource, device: str) -> Any:
    """Diffusers' pipeline, in the precision that is usual on the device."""
    precision = default_precision(device)
    if model.weights == "random":
        return open_random_pipeline(model, device=device, precision=precision)
    return open_pipeline(model.folder, device=device, dtype=DTYPES[precision])


def open_peers(
    options: Options, model: ModelSource, device: str, coreset: Coreset
) -> tuple[dict[str, Callable[[], int]], dict[str, Expander], dict[str, Any]]:
    """A pass of each backend, those of ours whose pictures are diffusers', and what that took."""
    pipeline = new_pipeline(model, device)
    samples = torch.arange(0, len(coreset.labels_N), len(coreset.labels_N) // 8)[:8]
    passes: dict[str, Callable[[], int]] = {}
    expanders: dict[str, Expander] = {}
    setup_s, errors = {}, {}
    for name in options.backends:
        start = time.perf_counter()
        if name == "diffusers":
            passes[name] = diffusers_pass(options, pipeline, coreset)
            continue
        if name == "diffusers-compiled":
            compiled = new_pipeline(model, device)
            compile_pipeline(compiled)
            passes[name] = diffusers_pass(options, compiled, coreset)
            passes[name]()  # which compiles
            setup_s[name] = round(time.perf_counter() - start, 2)
            continue
        expanders[name] = open_expander(
            name,
            model,
            coreset,
            device=device,
            bundles=options.bundles,
            size_px=options.size,
            steps=options.steps,
            rho=options.rho,
            seed=options.seed,
            batch=options.batch,
        )
        setup_s[name] = round(time.perf_counter() - start, 2)
        errors[name] = compare_with_diffusers(name, expanders[name], pipeline, coreset, samples)
        passes[name] = expander_pass(options, expanders[name])
    return passes, expanders, {"setup_s": setup_s, "errors": errors}


def main(options: Options) -> None:
    """Gate, measure, report."""
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    model = find_model(options.model, options.weights)
    coreset = make_coreset(
        classes=options.classes,
        patches_per_class=options.patches_per_class,
        side_px=options.size // 2,
        seed=options.seed,
    )
    if options.weights == "random" and any(
        name.rpartition("-")[2] in DTYPES for name in options.backends
    ):
        raise ValueError("--weights random: expected backends without a precision in their names")
    passes, expanders, found = open_peers(options, model, device, coreset)
    rates = measure_rates(passes, rounds=options.rounds)
    for name, rate in rates.items():
        low, middle, high = (rate.row()[p] for p in ("p20", "p50", "p80"))
        print(
            f"{name:18} {middle:8.1f} images/s   p20 {low:.1f}  p80 {high:.1f}  n {options.rounds}"
        )
    speedups = {
        name: ratios(rate, rates["diffusers"])
        for name, rate in rates.items()
        if name != "diffusers" and "diffusers" in rates
    }
    row = environment(device) | {
        "benchmark": "expand",
        "model": options.model,
        "weights": options.weights,
        "size_px": options.size,
        "batch": options.batch,
        "images_per_s": {name: round(rate.p50, 2) for name, rate in rates.items()},
        "spread": {name: rate.row() for name, rate in rates.items()},
        "speedup": {name: round(speedup.p50, 2) for name, speedup in speedups.items()},
        "speedup_spread": {name: speedup.row() for name, speedup in speedups.items()},
        "outside_clock": list(OUTSIDE_CLOCK),
        **found,
        "tolerance": {"fp32_max_abs": TOLERANCE, "half_psnr_db": MIN_PSNR_DB},
        "engines": {name: expander.describe() for name, expander in expanders.items()},
        "images": options.images,
        "threads": options.threads,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
