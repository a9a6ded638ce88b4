"""How fast patches become images: our backends against diffusers' own img2img pipeline.

    python bench/bench_expand.py --model sdxl-tiny --backends diffusers ort --batch 32 --json

First the gate: every backend must make the pictures that diffusers makes from the same latents and
noise (max abs error at most 1e-4 of the range [-1, 1] in fp32), and the same gate must catch wrong
prompts. Then the clock: `diffusers` is its pipeline called as a user calls it, patches and prompts
in, pictures out; ours expands samples of an open coreset. What we do once per coreset is outside
the clock and listed in `outside_clock` with its seconds. Mixup is off, diffusers has none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from diffusers_peer import noise_of_ours, open_pipeline, run_pipeline
from measure import append_row, environment, measure_rates, ratios
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.prompts import class_prompts
from patchbloom.engine.turbo import Expander
from patchbloom.export.models import ModelSource, find_model
from patchbloom.kernels.noise import Draw, uniform
from patchbloom.kernels.pixels import upsample_patches
from torch import Tensor

TOLERANCE = 1e-4
EPOCH = 0
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
    backends: tuple[Literal["diffusers", "eager", "ort"], ...] = ("diffusers", "ort")
    """What to time."""
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


@dataclass(frozen=True)
class Coreset:
    """Patches of noise: what they show does not change the work."""

    patches_NHWC: Tensor
    labels_N: np.ndarray
    prompts_K: tuple[str, ...]

    def prompts_of(self, samples: Tensor) -> list[str]:
        return [self.prompts_K[self.labels_N[sample]] for sample in samples]


def make_coreset(options: Options) -> Coreset:
    """Random patches, `patches_per_class` for each of `classes`."""
    count, side = options.classes * options.patches_per_class, options.size // 2
    draws = uniform(options.seed, Draw.ORDER, torch.arange(count), 0, side * side * 3)
    return Coreset(
        patches_NHWC=(draws * 255).round().to(torch.uint8).view(count, side, side, 3),
        labels_N=np.repeat(np.arange(options.classes), options.patches_per_class),
        prompts_K=class_prompts([f"class {number}" for number in range(options.classes)]),
    )


def open_expander(
    options: Options, model: ModelSource, coreset: Coreset, backend: Literal["eager", "ort"]
) -> Expander:
    """Our Expander on one backend."""
    config = ExpandConfig(
        size_px=options.size,
        steps=options.steps,
        rho=options.rho,
        mixup=False,
        seed=options.seed,
        batch=options.batch,
        backend=backend,
        device="cpu",
        bundles=options.bundles,
    )
    return Expander(
        model,
        config,
        patches_NHWC=coreset.patches_NHWC,
        labels_N=coreset.labels_N,
        prompts_K=coreset.prompts_K,
    )


def check_pictures(
    options: Options, pipeline: Any, coreset: Coreset, expanders: dict[str, Expander]
) -> dict[str, dict[str, float]]:
    """Errors against diffusers, of the same pictures and of the negative control; or an error."""
    samples = torch.arange(0, len(coreset.labels_N), len(coreset.labels_N) // 8)[:8]
    call = {"strength": options.rho, "num_inference_steps": options.steps}
    errors = {}
    for name, expander in expanders.items():
        found = expander.expand(samples, EPOCH)
        latents = expander.latents()[samples]
        prompts = coreset.prompts_of(samples)
        row = {}
        for case, given in (("same", prompts), ("wrong_prompt", prompts[1:] + prompts[:1])):
            with noise_of_ours(pipeline, samples, seed=options.seed, epoch=EPOCH):
                expected = run_pipeline(pipeline, given, image=latents, **call)
            row[f"{case}_max_abs"] = float((found - expected).abs().max())
            row[f"{case}_relative_l2"] = float((found - expected).norm() / expected.norm())
        if not row["same_max_abs"] <= TOLERANCE < row["wrong_prompt_max_abs"]:
            raise RuntimeError(
                f"{name}: expected pictures within {TOLERANCE} of diffusers' and wrong prompts "
                f"beyond, got {row}; no speed is reported"
            )
        errors[name] = row
    return errors


def diffusers_pass(options: Options, pipeline: Any, coreset: Coreset) -> Callable[[], int]:
    """Diffusers' pipeline on the upsampled patches, batch by batch."""

    def one_pass() -> int:
        for first in range(0, options.images, options.batch):
            samples = torch.arange(first, min(first + options.batch, options.images))
            patches = coreset.patches_NHWC[samples]
            images = upsample_patches(patches, options.size, mode="bicubic", dtype=torch.float32)
            run_pipeline(
                pipeline,
                coreset.prompts_of(samples),
                image=images * 0.5 + 0.5,
                strength=options.rho,
                num_inference_steps=options.steps,
            )
        return options.images

    return one_pass


def expander_pass(options: Options, expander: Expander) -> Callable[[], int]:
    """Ours: the same samples, in one call."""
    samples = torch.arange(options.images)
    return lambda: len(expander.expand(samples, EPOCH))


def main(options: Options) -> None:
    """Gate, measure, report."""
    torch.set_num_threads(options.threads)
    model, coreset = find_model(options.model), make_coreset(options)
    pipeline = open_pipeline(model.folder)
    expanders, setup_s = {}, {}
    for backend in options.backends:
        if backend != "diffusers":
            start = time.perf_counter()
            expanders[backend] = open_expander(options, model, coreset, backend)
            setup_s[backend] = round(time.perf_counter() - start, 2)
    errors = check_pictures(options, pipeline, coreset, expanders)
    passes = {name: expander_pass(options, expander) for name, expander in expanders.items()}
    if "diffusers" in options.backends:
        passes = {"diffusers": diffusers_pass(options, pipeline, coreset)} | passes
    rates = measure_rates(passes, rounds=options.rounds)
    for name, rate in rates.items():
        low, middle, high = (rate.row()[p] for p in ("p20", "p50", "p80"))
        print(
            f"{name:10} {middle:8.1f} images/s   p20 {low:.1f}  p80 {high:.1f}  n {options.rounds}"
        )
    speedups = {
        name: ratios(rates[name], rates["diffusers"]) for name in expanders if "diffusers" in rates
    }
    row = environment() | {
        "benchmark": "expand",
        "images_per_s": {name: round(rate.p50, 2) for name, rate in rates.items()},
        "spread": {name: rate.row() for name, rate in rates.items()},
        "speedup": {name: round(speedup.p50, 2) for name, speedup in speedups.items()},
        "speedup_spread": {name: speedup.row() for name, speedup in speedups.items()},
        "outside_clock": list(OUTSIDE_CLOCK),
        "setup_s": setup_s,
        "errors": errors,
        "tolerance": TOLERANCE,
        "engines": {name: expander.describe() for name, expander in expanders.items()},
        "images": options.images,
        "threads": options.threads,
    }
    if options.record:
        print(f"appended to {append_row('expand', row)}")
    if options.json:
        print(json.dumps(row))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
