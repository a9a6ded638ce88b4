"""How fast patches become images: our backends against diffusers' own img2img pipeline.

    python bench/bench_expand.py --model sdxl-tiny --backends diffusers ort --batch 32 --json

First the gate of bench/pictures.py: every backend must make the pictures that diffusers makes, and
wrong prompts and timesteps must fail. `eager`, `ort` and `inductor` compute in fp32, `eager-bf16`
and `inductor-bf16` in bf16. Then the clock: `diffusers` is its pipeline called as a user calls it,
patches and prompts in, pictures out; ours expands samples of an open coreset. What we do once per
coreset is outside the clock and listed in `outside_clock` with its seconds. Mixup is off, diffusers
has none.

Beside the rates: TFLOP/s and percent of roofline, by the arithmetic that an image needs
(bench/roofline.py), and the peak of memory that each adds (bench/peak_memory.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers_peer import (
    compile_pipeline,
    open_pipeline,
    open_random_pipeline,
    run_pipeline,
    upcast_vae,
)
from measure import Rate, environment, measure_rates, publish, ratios
from patchbloom.engine.backends import resolve_device
from patchbloom.engine.schedule import make_schedule
from patchbloom.engine.turbo import Expander
from patchbloom.export.config import DeviceName, Weights
from patchbloom.export.models import DTYPES, ModelSource, find_model
from patchbloom.kernels.pixels import upsample_patches
from peak_memory import MemoryWatch
from pictures import (
    EPOCH,
    MARGIN_DB,
    MIN_PSNR_DB,
    TOLERANCE,
    Coreset,
    compare_with_diffusers,
    default_precision,
    make_coreset,
    open_expander,
)
from roofline import count_image_work, measure_roofline, peer_precisions

VARIANTS: dict[str, Callable[[Any], None]] = {
    "diffusers-compiled": compile_pipeline,
    "diffusers-upcast": upcast_vae,
}
"""Diffusers' pipeline otherwise."""
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
    """What to time: diffusers, diffusers-compiled, diffusers-upcast (in fp16 with a VAE in fp32, as
    SDXL's own asks for), eager, ort, inductor, trt; with -bf16, -fp16 or -fp32 another precision
    than the device's usual one (fp32 on the CPU, fp16 on a GPU)."""
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


@dataclass(frozen=True)
class Peers:
    """What is timed, each by its name, and what opening it told."""

    passes: dict[str, Callable[[], int]] = field(default_factory=dict)
    expanders: dict[str, Expander] = field(default_factory=dict)
    """Ours, whose pictures are diffusers'."""
    setup_s: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)


def open_peers(options: Options, model: ModelSource, device: str, coreset: Coreset) -> Peers:
    """Open every backend, hold ours against diffusers, and look at the memory of a first pass."""
    peers = Peers()
    watch = MemoryWatch(device)
    pipeline = new_pipeline(model, device)
    samples = torch.arange(0, len(coreset.labels_N), len(coreset.labels_N) // 8)[:8]
    if "diffusers" in options.backends:
        peers.passes["diffusers"] = diffusers_pass(options, pipeline, coreset)
        peers.memory["diffusers"] = watch.peak_of(peers.passes["diffusers"])
    for name in (name for name in options.backends if name != "diffusers"):
        watch, start = MemoryWatch(device), time.perf_counter()
        if name in VARIANTS:
            variant = new_pipeline(model, device)
            VARIANTS[name](variant)
            one_pass = diffusers_pass(options, variant, coreset)
            one_pass()  # which compiles
            peers.setup_s[name] = round(time.perf_counter() - start, 2)
        else:
            expander = peers.expanders[name] = new_expander(options, name, model, device, coreset)
            peers.setup_s[name] = round(time.perf_counter() - start, 2)
            found = compare_with_diffusers(name, expander, pipeline, coreset, samples)
            peers.errors[name] = found
            one_pass = expander_pass(options, expander)
        peers.passes[name] = one_pass
        peers.memory[name] = watch.peak_of(one_pass)
    return peers


def new_expander(
    options: Options, name: str, model: ModelSource, device: str, coreset: Coreset
) -> Expander:
    """Ours, at the benchmark's settings."""
    return open_expander(
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


def arithmetic(
    options: Options, model: ModelSource, device: str, rates: dict[str, Rate]
) -> dict[str, Any]:
    """What an image needs, what the device reaches, and how far each peer is from it."""
    evals = make_schedule(model.scheduler_config(), steps=options.steps, rho=options.rho).evals
    work = count_image_work(model, size_px=options.size, batch=options.batch, evals=evals)
    usual = default_precision(device)
    precisions = {name: peer_precisions(name, model, usual) for name in rates}
    roofline = measure_roofline(device, (each for pair in precisions.values() for each in pair))
    floors_s = {name: work.floor_s(roofline, *pair) for name, pair in precisions.items()}
    return {
        "evals": evals,
        "work": work.row(),
        "roofline": roofline.row(),
        "tflops": {name: round(rate.p50 * work.flops / 1e12, 4) for name, rate in rates.items()},
        "percent_of_roofline": {
            name: round(100 * rate.p50 * floors_s[name], 1) for name, rate in rates.items()
        },
    }


def print_peers(rates: dict[str, Rate], found: dict[str, Any]) -> None:
    """One line per peer."""
    for name, rate in rates.items():
        row, memory = rate.row(), found["peak_memory"][name]
        held = ", ".join(
            f"{key[:-6]} {'not known' if size is None else f'{size / 2**20:.0f} MiB'}"
            for key, size in memory.items()
        )
        print(
            f"{name:18} {row['p50']:8.1f} images/s   p20 {row['p20']:.1f}  p80 {row['p80']:.1f}  "
            f"n {row['n']}   {found['tflops'][name]:.3g} TFLOP/s, "
            f"{found['percent_of_roofline'][name]} % of roofline, {held}"
        )


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
    peers = open_peers(options, model, device, coreset)
    rates = measure_rates(peers.passes, rounds=options.rounds)
    found = arithmetic(options, model, device, rates) | {"peak_memory": peers.memory}
    print_peers(rates, found)
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
        **found,
        "outside_clock": list(OUTSIDE_CLOCK),
        "setup_s": peers.setup_s,
        "errors": peers.errors,
        "tolerance": {
            "fp32_max_abs": TOLERANCE,
            "half_psnr_db": MIN_PSNR_DB,
            "half_margin_db": MARGIN_DB,
        },
        "engines": {name: expander.describe() for name, expander in peers.expanders.items()},
        "images": options.images,
        "classes": options.classes,
        "patches_per_class": options.patches_per_class,
        "threads": options.threads,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
