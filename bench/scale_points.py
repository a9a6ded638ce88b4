"""One point of bench_scale.py, in a process of its own, so that its peak memory is nobody else's.

    python bench/scale_points.py scoring '{"images": 1000, ...}'

The last line of stdout is one JSON object: what the point measured, `peak_bytes` of this process on
the host (its highest resident set) and `peak_gpu_bytes` of the whole GPU (0 without one).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Rate, measure_rates, timed
from patchbloom.engine.coreset.coreset import Coreset, open_coreset, write_coreset
from patchbloom.engine.coreset.manifest import LABELS
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.engine.select.patches import select_patches
from patchbloom.export.machine import PeakGpuMemory, peak_host_bytes
from patchbloom.export.models import TOKENS, find_model, load_parts
from patchbloom.export.modules import key_value_slots
from patchbloom.train.commands.train import run_stages
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.networks import build_network
from patchbloom.train.options import TrainCoreset, TrainLabels
from patchbloom.train.teacher.teacher import Teacher
from pictures import make_coreset, open_expander

FACTOR = 2
PATCHES_PER_CLASS = FACTOR**2  # at IPC 1


def expansion(
    *, expander: dict[str, Any], batch: int, classes: int, images: int, rounds: int
) -> dict[str, Any]:
    """Images/s of an open coreset at one engine batch; `images` of a pass, rounded up to calls.

    `expander`: model, weights, backend with its precision (eager-fp32), device, size_px.
    """
    coreset = make_coreset(
        classes=classes, patches_per_class=40, side_px=expander["size_px"] // FACTOR, seed=0
    )
    began = time.perf_counter()
    model, settings = _model_and_settings(expander)
    opened = open_expander(
        model=model, coreset=coreset, batch=batch, images_per_prompt=None, **settings
    )
    open_s = time.perf_counter() - began
    samples = np.arange(-(-images // batch) * batch) % len(coreset.labels_N)
    rate = measure_rates({"ours": lambda: len(opened.expand(samples, 0))}, rounds=rounds)["ours"]
    return {"images_per_s": rate.row(), "open_s": round(open_s, 2), "evals": opened.schedule.evals}


def _model_and_settings(expander: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    settings = {"name" if k == "backend" else k: v for k, v in expander.items()}
    return find_model(settings.pop("model"), settings.pop("weights")), settings


def coreset(
    *,
    expander: dict[str, Any],
    batch: int,
    classes: int,
    cached_prompts: int,
    images: int,
    rounds: int,
) -> dict[str, Any]:
    """A coreset of generated names and patches, IPC 1: written, opened, read, expanded.

    There is room for the keys and values of `cached_prompts` prompts; a pass expands all samples of
    random classes, others in every round.
    """
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        written = _timed(
            took, "write_s", lambda: _write_coreset(Path(name), classes, expander["size_px"])
        )
        sizes = written.bytes()
        opened = _timed(took, "verify_s", lambda: open_coreset(written.folder))
        made = replace(
            make_coreset(classes=1, patches_per_class=1, side_px=1, seed=0),
            patches_NHWC=_timed(took, "read_s", opened.patches),
            labels_N=opened.labels_N.numpy(),
            prompts_K=tuple(f"A photo of a {each}" for each in opened.class_names),
        )
    model, settings = _model_and_settings(expander)
    row_bytes = _row_bytes(expander)
    engine = _timed(
        took,
        "expander_s",
        lambda: open_expander(
            model=model,
            coreset=made,
            batch=batch,
            prompt_cache_bytes=cached_prompts * row_bytes,
            **settings,
        ),
    )
    rng = np.random.default_rng(0)

    def one_pass() -> int:
        chosen = rng.permutation(classes)[: max(1, images // PATCHES_PER_CLASS)]
        samples = chosen[:, None] * PATCHES_PER_CLASS + np.arange(PATCHES_PER_CLASS)
        return len(engine.expand(samples.ravel(), 0))

    rate = measure_rates({"ours": one_pass}, rounds=rounds)["ours"]
    bank = engine.prompt_bank
    return {
        **{step: round(seconds, 2) for step, seconds in took.items()},
        "images_per_s": rate.row(),
        "patch_bytes": sizes["patches"],
        "manifest_bytes": sizes["manifest"],
        "prompts_kept": bank.capacity,
        "kept_bytes": bank.kept_bytes,
        "projector_bytes": bank.weights_bytes,
        "all_keys_values_bytes": classes * row_bytes,
        "text_bytes": 0 if bank.resident else classes * _text_bytes(expander),
    }


def _timed(took: dict[str, float], step: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    answer = work()
    took[step] = time.perf_counter() - began
    return answer


def _write_coreset(folder: Path, classes: int, size_px: int) -> Coreset:
    """Noise does not compress: its files are as large as patches get."""
    side_px, names = size_px // FACTOR, [f"generated thing {index}" for index in range(classes)]
    shape = (classes * PATCHES_PER_CLASS, side_px, side_px, 3)
    return write_coreset(
        folder / "coreset",
        patches_NHWC=np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        class_ids=[f"c{index:06}" for index in range(classes)],
        class_names=names,
        settings={
            "method": "random",
            "seed": 0,
            "image_size_px": size_px,
            "factor": FACTOR,
            "patch_px": side_px,
            "ipc": 1,
        },
        provenance={},
    )


def _row_bytes(expander: dict[str, Any]) -> int:
    """Keys and values of one prompt, from the model's configuration."""
    parts = load_parts(
        find_model(expander["model"], "random"), precision=_precision(expander), device="meta"
    )
    slots = key_value_slots(parts.unet, TOKENS)
    return 2 * sum(slot.size for slot in slots) * parts.unet.dtype.itemsize


def _text_bytes(expander: dict[str, Any]) -> int:
    """Text embeddings of one prompt, as they lie on the host."""
    width, pooled_width = find_model(expander["model"], "random").text_widths()
    itemsize = {"fp32": 4}.get(_precision(expander), 2)
    return (TOKENS * width + pooled_width) * itemsize


def _precision(expander: dict[str, Any]) -> Any:
    return expander["backend"].partition("-")[2]


def scoring(
    *,
    data: str | None,
    images: int,
    size_px: int,
    crops: int,
    batch: int,
    teacher: str,
    device: str,
    threads: int,
    rounds: int,
) -> dict[str, Any]:
    """Every image decoded, cropped and scored by an untrained teacher; the best patches, IPC 1.

    So `rounds` times over: `seconds` and `images_per_s` have the start of the loader in them.

    Without `data`, generated JPEGs, listed once each. Of a set that is smaller than `images`, the
    files are listed again: `listings` is how often.

    What grows with the images is the list alone: 111 B each, so 0.9 MB from 1,000 to 9,000.
    """
    with tempfile.TemporaryDirectory() as name:
        if data is None:
            write_shapes(Path(name) / "data", train_per_class=-(-images // 10), val_per_class=1)
        given = open_image_set(data or Path(name) / "data", "train")
        chosen = _listed(given, images)
        network = build_network(teacher, len(chosen.class_ids), size_px)
        asked = Teacher(
            network,
            architecture=teacher,
            class_ids=chosen.class_ids,
            size_px=size_px,
            device=device,
        )
        taken_s = [
            timed(
                lambda: select_patches(
                    chosen,
                    asked.logits_from_uint8,
                    per_class=PATCHES_PER_CLASS,
                    patch_px=size_px // FACTOR,
                    image_size_px=size_px,
                    crops=crops,
                    pool_per_class=len(chosen),
                    seed=0,
                    batch=batch,
                    device=device,
                    threads=threads,
                )
            )[0]
            for _ in range(rounds)
        ]
    return _figures(taken_s, len(chosen), "images_per_s") | {"listings": -(-images // len(given))}


def _figures(taken_s: list[float], items: int, name: str) -> dict[str, Any]:
    """Seconds of every round, start included, their quantiles, and the rate's under `name`."""
    rate = Rate(tuple(items / seconds for seconds in taken_s))
    return {
        "seconds": Rate(tuple(taken_s)).row(),
        name: rate.row(),
        "items": items,
        "rounds_s": [round(seconds, 3) for seconds in taken_s],
    }


def _listed(given: ImageSet, images: int) -> ImageSet:
    """`images` files, spread evenly over the set, in the order of their classes."""
    rows = np.sort(np.resize(np.arange(len(given)), images))
    if images <= len(given):
        rows = np.linspace(0, len(given) - 1, images).astype(np.int64)
    return replace(given, paths=tuple(given.paths[row] for row in rows), labels=given.labels[rows])


def labels(
    *,
    epochs: int,
    model: str,
    backend: str,
    size_px: int,
    teacher: str,
    device: str,
    shapes_per_class: int,
    rounds: int,
) -> dict[str, Any]:
    """Seconds and bytes of a coreset's dense labels; teacher and patches are made before.

    Every round labels a copy of that run: its `seconds` and `labels_per_s` have the start in them,
    with the engine's opening.

    `backend` with its precision, as of an expander.
    """
    name_of_backend, _, precision = backend.partition("-")
    with tempfile.TemporaryDirectory() as name:
        asked: dict[str, Any] = {
            "data": "shapes",
            "out": Path(name) / "run",
            "model": model,
            "backend": name_of_backend,
            "precision": precision,
            "image_size": size_px,
            "teacher": teacher,
            "device": device,
            "epochs": epochs,
            "teacher_epochs": 1,
            "shapes_per_class": shapes_per_class,
            "codec": "dense",
        }
        run_stages(TrainCoreset(**asked), "bench_scale")
        taken_s = []
        for number in range(rounds):
            copied: dict[str, Any] = asked | {"out": Path(name) / f"round{number}"}
            shutil.copytree(asked["out"], copied["out"])
            labelled = TrainLabels(**copied)
            taken_s.append(timed(lambda labelled=labelled: run_stages(labelled, "bench_scale"))[0])
        kept = open_coreset(copied["out"] / "coreset")
        return _figures(taken_s, len(kept.labels_N) * epochs, "labels_per_s") | {
            "label_bytes": kept.manifest["files"][LABELS]["bytes"],
            "evals": kept.manifest["model"]["evals"],
        }


POINTS: dict[str, Callable[..., dict[str, Any]]] = {
    "expansion": expansion,
    "coreset": coreset,
    "scoring": scoring,
    "labels": labels,
}


if __name__ == "__main__":
    part, threads, settings = sys.argv[1:]
    torch.set_num_threads(int(threads))
    asked_for = json.loads(settings)
    on = asked_for.get("device") or asked_for["expander"]["device"]
    try:
        with PeakGpuMemory(on) as gpu:
            point = POINTS[part](**asked_for)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(point | {"peak_bytes": peak_host_bytes(), "peak_gpu_bytes": gpu.bytes}))
