"""How fast patches become images: our backends against diffusers' own img2img pipeline.

    python bench/bench_expand.py --backends diffusers diffusers-bf16 ort eager-bf16 --json
    python bench/bench_expand.py --model sdxl-turbo --backends diffusers diffusers-upcast eager

The gate (bench/pictures.py) runs first: every peer must make the pictures that diffusers makes, and
wrong prompts and timesteps must fail. Then the clock: diffusers' pipeline is called as a user calls
it, patches and prompts in, pictures out; ours expands samples of an open coreset. Work done once
per coreset is outside the clock and listed in `outside_clock`. Mixup is off: diffusers has none.

`diffusers` runs in the device's usual precision, fp32 on the CPU. A lower precision is faster by
itself, so compare `eager-bf16` with `diffusers-bf16`. Every row has our speed over every timed peer
(`speedup_over`) and the precision of each; `speedup` is over `diffusers`.

`eager` replays a CUDA graph on a GPU, `eager-launched` does not. A row lists under `recorded` the
backends whose graph exists: where recording failed, both are launched.

Rows also report TFLOP/s and percent of roofline, from the arithmetic that an image needs
(bench/roofline.py), measured over predicted images per second (bench/predict.py), and the peak
memory that each peer adds (bench/peak_memory.py).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from expand_peers import Options, Peers, open_peers, tiny_model
from measure import Rate, device_name, environment, measure_rates, publish, ratios, run_program
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.engine.expand.image_work import count_image_work
from patchbloom.engine.expand.schedule import make_schedule
from patchbloom.export.config import EIGHT_BITS
from patchbloom.export.models import ModelSource, find_model
from peer_names import default_precision, is_peer, is_tiny, split_name
from pictures import RELATIVE_L2, TOLERANCE, WRONG_TIMES, make_coreset
from predict import predict_rates
from roofline import floor_s, measure_roofline, peer_precisions, work_row

OUTSIDE_CLOCK = (
    "loading the model",
    "finding or building the engine",
    "text embeddings, added embeddings and cross-attention keys and values of every class",
    "upsampling and encoding every patch",
)


def arithmetic(
    options: Options, model: ModelSource, device: str, rates: dict[str, Rate]
) -> dict[str, Any]:
    """Arithmetic of an image, the device's roofline, and the share of it that each peer reaches."""
    config = ExpandConfig(size_px=options.size)
    evals = make_schedule(model.scheduler_config(), steps=config.steps, rho=config.rho).evals
    count: Any = partial(count_image_work, size_px=options.size, batch=options.batch, evals=evals)
    work = count(model)
    works = {name: count(tiny_model(options)) if is_tiny(name) else work for name in rates}
    usual = default_precision(device)
    precisions = {name: peer_precisions(name, model, usual) for name in rates}
    roofline = measure_roofline(device, (each for pair in precisions.values() for each in pair))
    floors_s = {name: floor_s(works[name], roofline, *pair) for name, pair in precisions.items()}
    predicted = predict_rates(
        model,
        precisions,
        roofline,
        device_name(device),
        device=device,
        size_px=options.size,
        batch=options.batch,
        evals=evals,
    )
    eight = {name: named for name in rates if (named := split_name(name)[1]) in EIGHT_BITS}
    return {
        "precision": {name: pair[0] for name, pair in precisions.items()} | eight,
        "vae_precision": {name: pair[1] for name, pair in precisions.items()} | eight,
        "evals": evals,
        "work": work_row(work),
        "roofline": roofline.row(),
        "tflops": {
            name: round(rate.p50 * works[name].flops / 1e12, 4) for name, rate in rates.items()
        },
        "percent_of_roofline": {
            name: round(100 * rate.p50 * floors_s[name], 1) for name, rate in rates.items()
        },
        "predicted_images_per_s": {name: round(each, 1) for name, each in predicted.items()},
        "measured_over_predicted": {
            name: round(rates[name].p50 / each, 2) for name, each in predicted.items()
        },
    }


def compared(rates: dict[str, Rate]) -> dict[str, Any]:
    """Speed of all over `diffusers`, and of ours over every peer: medians and spreads of rounds."""
    usual = {
        name: ratios(rate, rates["diffusers"])
        for name, rate in rates.items()
        if name != "diffusers" and "diffusers" in rates
    }
    return {
        "speedup": {name: round(ratio.p50, 2) for name, ratio in usual.items()},
        "speedup_spread": {name: ratio.row() for name, ratio in usual.items()},
        "speedup_over": {
            peer: {
                name: ratios(rate, rates[peer]).row()
                for name, rate in rates.items()
                if not is_peer(name)
            }
            for peer in rates
            if is_peer(peer)
        },
    }


def print_peers(rates: dict[str, Rate], found: dict[str, Any]) -> None:
    """Print one line per peer; ours get a second line with the speed-up over each peer."""
    for name, rate in rates.items():
        row, memory = rate.row(), found["peak_memory"][name]
        held = ", ".join(
            f"{key[:-6]} {'not known' if size is None else f'{size / 2**20:.0f} MiB'}"
            for key, size in memory.items()
        )
        print(
            f"{name:18} {row['p50']:8.1f} images/s   p20 {row['p20']:.1f}  p80 {row['p80']:.1f}  "
            f"n {row['n']}   {found['precision'][name]}, {found['tflops'][name]:.3g} TFLOP/s, "
            f"{found['percent_of_roofline'][name]} % of roofline, {held}"
        )
        if name in found["measured_over_predicted"]:
            told = f"{found['measured_over_predicted'][name]} of the predicted"
            print(f"{'':18} {told} {found['predicted_images_per_s'][name]} images/s")
        over = (
            f"{ours[name]['p50']:.2f} x {peer} ({found['precision'][peer]})"
            for peer, ours in found["speedup_over"].items()
            if name in ours
        )
        if told := ", ".join(over):
            print(f"{'':18} {told}")


def settings(options: Options, device: str) -> dict[str, Any]:
    """Machine and settings of the measurement."""
    return environment(device) | {
        "benchmark": "expand",
        "model": options.model,
        "weights": options.weights,
        "size_px": options.size,
        "batch": options.batch,
        "images": options.images,
        "classes": options.classes,
        "patches_per_class": options.patches_per_class,
        "threads": options.threads,
    }


def gated(peers: Peers) -> dict[str, Any]:
    """Errors that the gate measured, its tolerances, and our backends."""
    return {
        "errors": peers.errors,
        "tolerance": {
            "fp32_max_abs": TOLERANCE,
            "relative_l2": RELATIVE_L2,
            "wrong_times": WRONG_TIMES,
        },
        "engines": {name: expander.describe() for name, expander in peers.expanders.items()},
        "recorded": [
            name for name, each in peers.expanders.items() if each._graph and each._graph._graph
        ],
    }


def main(options: Options) -> None:
    """Gate, measure, report. Raises ValueError for settings that cannot be compared."""
    if options.weights == "random" and any(split_name(name)[1] for name in options.backends):
        raise ValueError("--weights random: expected backends without a precision in their names")
    if any(map(is_tiny, options.backends)):
        tiny_model(options)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    model = find_model(options.model, options.weights)
    coreset = make_coreset(
        classes=options.classes,
        patches_per_class=options.patches_per_class,
        side_px=options.size // 2,
        seed=0,
    )
    peers = Peers()
    for peers in open_peers(options, model, device, coreset):
        if options.json:
            so_far = {"partial": True, "images_per_s": peers.single, **gated(peers)}
            print(json.dumps(settings(options, device) | so_far), flush=True)
    rates = measure_rates(peers.passes, rounds=options.rounds)
    found = compared(rates) | arithmetic(options, model, device, rates)
    found["peak_memory"] = peers.memory
    print_peers(rates, found)
    row = settings(options, device) | {
        "images_per_s": {name: round(rate.p50, 2) for name, rate in rates.items()},
        "spread": {name: rate.row() for name, rate in rates.items()},
        **found,
        "outside_clock": list(OUTSIDE_CLOCK),
        "setup_s": peers.setup_s,
        **gated(peers),
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
