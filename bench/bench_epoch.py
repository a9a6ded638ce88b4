"""Seconds of an epoch, as in DACE's Table 3: expansion, student, in turns and overlapped.

    python bench/bench_epoch.py --json                                          (CPU, sdxl-tiny)
    python bench/bench_epoch.py --model sdxl-turbo --weights random --size 224 --json        (a GPU)

Ten classes at ipc 1: factor r means 10 r² patches of size / r pixels, one image of each per epoch;
one student, batch 10, stored labels of fp16 logits. Four runs take turns, each in one process with
the same engine:

    generate     the ring is filled and nobody learns
    train        a student learns from images that are there already
    serial       both, `--overlap off`
    overlapped   both, `--overlap on`, and how long the student waited

The gate, before any time: over an epoch of many small pools, with deterministic kernels, a serial
and an overlapped student end with the same weights: bit for bit on the CPU; on a GPU, where some
kernels have no deterministic form, NEAR of the distance to a student that learned from another
epoch's images, which is the negative control and what a slot read too late would look like. The
first epoch of every run is not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from measure import environment, publish, quantiles
from patchbloom.engine.backends import resolve_device
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.soft_labels import SoftTargets
from patchbloom.engine.turbo import Expander
from patchbloom.export.config import BackendName, DeviceName, Weights
from patchbloom.export.models import find_model
from patchbloom.train.checkpoint import read_tensors
from patchbloom.train.config import StudentConfig
from patchbloom.train.lockstep import SLOTS
from patchbloom.train.loop import train_students
from patchbloom.train.methods import Expansions, ImageSource
from patchbloom.train.overlap import Ring
from patchbloom.train.pool_slots import PoolSlot, fill_slot, pools_from
from pictures import default_precision, make_coreset
from torch import Tensor

CLASSES = 10
PAPER_S = {2: 2.53, 3: 2.76, 4: 6.39, 5: 8.23, 7: 16.58, 8: 22.49}
"""DACE, Table 3: seconds per epoch on four A6000, for the row; not measured here."""
NEAR = {"cpu": 0.0, "cuda": 0.1}
"""How far overlap may move a student, of the distance to one that learned from other images."""
GATE_POOLS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seconds of an epoch."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    weights: Weights = "pretrained"
    """`random`: the architecture alone; speed does not depend on weights."""
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    size: int = 64
    """Image size in px; the paper's is 224."""
    factors: tuple[int, ...] = (2, 3, 4, 5, 7, 8)
    """r: 10 r² patches of size / r pixels."""
    student: str | None = None
    """Left out: resnet18 on a GPU, convnet-d4-w24to96 on the CPU."""
    epochs: int = 3
    """Timed epochs of a run, after one that is not counted."""
    rounds: int = 2
    """Turns of the four runs."""
    batch: int = 32
    """Images per call of the engine."""
    bundles: Path | None = None
    """Folder of built engines; by default the user's cache."""
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


class Kept:
    """A source that has all its images of one epoch: what is left is the student."""

    def __init__(self, source: ImageSource, epoch: int = 0) -> None:
        self.samples, self.labels_N, self.class_ids = (
            source.samples,
            source.labels_N,
            source.class_ids,
        )
        self._images_NCHW = source.render(torch.arange(source.samples), epoch)

    def render(self, samples_P: Tensor, epoch: int) -> Tensor:
        return self._images_NCHW[samples_P.to(self._images_NCHW.device)]

    def describe(self) -> dict[str, Any]:
        return {"method": "kept"}


class Given:
    """Labels as if read from a coreset: the same for every epoch."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._logits_NK = torch.randn(samples, CLASSES, generator=generator).half()

    def targets(self, samples_P: Tensor, epoch: int, views_PCHW: Tensor) -> SoftTargets:
        return SoftTargets(self._logits_NK[samples_P].to(views_PCHW.device))

    def flush(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"codec": "dense"}


class Clock:
    """A Report that keeps what the loop says of every epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.waited_s: list[float] = []

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None: ...

    def scalar(self, tag: str, step: int, value: float) -> None:
        for name, values in (("seconds", self.seconds), ("waited_s", self.waited_s)):
            if tag.endswith(f"/{name}"):
                values.append(value)

    def say(self, line: str) -> None: ...


def generate_s(
    source: ImageSource, labels: Given, config: StudentConfig, device: str
) -> list[float]:
    """Seconds of every epoch when nobody learns."""
    where = torch.device(device)
    slots = [PoolSlot(config, source.samples, where) for _ in range(SLOTS[device])]
    seconds, began = [], time.perf_counter()
    with Ring(
        slots,
        lambda slot, pool: fill_slot(slot, pool, source, labels, config),
        pools_from(config, source.labels_N, 0),
        device=where,
        overlap=False,
    ) as ring:
        while taken := ring.take():
            if device == "cuda":
                torch.cuda.synchronize()
            epochs = sum(pool.ends_epoch for pool, _ in taken)
            if epochs:
                now = time.perf_counter()
                seconds += [(now - began) / epochs] * epochs
                began = now
    return seconds


def train_s(source: ImageSource, labels: Given, config: StudentConfig) -> tuple[Clock, dict]:
    """What the loop says of its epochs, and the student's weights."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        (result,) = train_students(
            source, labels, config, seeds=[0], val_set=None, folder=Path(folder), report=clock
        )
        return clock, read_tensors(result.path)[0]


def open_source(options: Options, factor: int, device: str) -> Expansions:
    """Ten classes of r² random patches each, and the model's expansions of them."""
    coreset = make_coreset(
        classes=CLASSES, patches_per_class=factor**2, side_px=options.size // factor, seed=factor
    )
    config = ExpandConfig(
        size_px=options.size,
        precision=default_precision(device),
        batch=min(options.batch, len(coreset.labels_N)),
        backend=options.backend,
        device=options.device,
        bundles=options.bundles,
        nan_gate=options.weights != "random",
    )
    expander = Expander(
        find_model(options.model, options.weights),
        config,
        patches_NHWC=coreset.patches_NHWC,
        labels_N=coreset.labels_N,
        prompts_K=coreset.prompts_K,
    )
    labels_N = torch.from_numpy(coreset.labels_N)
    return Expansions(expander=expander, labels_N=labels_N, class_ids=coreset.prompts_K)


def check_overlap(
    source: ImageSource, labels: Given, config: StudentConfig, device: str
) -> dict[str, float]:
    """Relative L2 distance of a serial student's weights to an overlapped one's and the control's.

    RuntimeError when overlap changes the student, or other images do not.
    """
    pool = max(config.batch, source.samples // GATE_POOLS)
    serial = replace(config, epochs=1, pool=pool, compile=False, overlap=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        weights = train_s(source, labels, serial)[1]
        overlapped = train_s(source, labels, replace(serial, overlap=True))[1]
        other = train_s(Kept(source, epoch=1), labels, serial)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    found = {
        "overlapped": _distance(weights, overlapped),
        "other_images": _distance(weights, other),
    }
    if found["other_images"] < 1e-4:
        raise RuntimeError(
            f"{source.samples} patches: a student of other images is {found['other_images']:.1e} "
            "from the serial one, so the gate is blind; no time is reported"
        )
    if found["overlapped"] > NEAR[device] * found["other_images"]:
        raise RuntimeError(
            f"{source.samples} patches: overlap changed the student: its weights are "
            f"{found['overlapped']:.1e} from the serial one's, those of a student of other images "
            f"{found['other_images']:.1e}; no time is reported"
        )
    return found


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([t[name].flatten().double() for name in sorted(one)]) for t in (one, other))
    return float((a - b).norm() / a.norm())


def measure(options: Options, factor: int, config: StudentConfig, device: str) -> dict[str, Any]:
    """The row of one factor. RuntimeError when the gate does not hold."""
    source = open_source(options, factor, device)
    labels, kept = Given(source.samples), Kept(source)
    gate = check_overlap(source, labels, config, device)
    taken: dict[str, list[float]] = {n: [] for n in ("generate", "train", "serial", "overlapped")}
    waited: list[float] = []
    for _ in range(options.rounds):
        taken["generate"] += generate_s(source, labels, config, device)[1:]
        taken["train"] += train_s(kept, labels, replace(config, overlap=False))[0].seconds[1:]
        serial, _ = train_s(source, labels, replace(config, overlap=False))
        overlapped, _ = train_s(source, labels, config)
        taken["serial"] += serial.seconds[1:]
        taken["overlapped"] += overlapped.seconds[1:]
        waited += overlapped.waited_s[1:]
    described = source.expander.describe()
    source.expander.close()
    seconds = {name: _quantiles(values) for name, values in taken.items()}
    longer = max(seconds["generate"]["p50"], seconds["train"]["p50"])
    return {
        "patches": source.samples,
        "patch_px": options.size // factor,
        "evals": described["evals"],
        "engine_batch": described["batch"],
        "backend": described["backend"],
        "gate": gate,
        "seconds": seconds,
        "waited_s": _quantiles(waited),
        "overlapped_over_longer_half": round(seconds["overlapped"]["p50"] / longer, 3),
        "paper_s": PAPER_S.get(factor),
        "speedup_over_serial": round(seconds["serial"]["p50"] / seconds["overlapped"]["p50"], 3),
    }


def _quantiles(values: list[float]) -> dict[str, float | int]:
    return quantiles(values, digits=4) | {"n": len(values)}


def main(options: Options) -> None:
    """Gate, measure, report."""
    device = resolve_device(options.device)
    small = device == "cpu"
    config = StudentConfig(
        network=options.student or ("convnet-d4-w24to96" if small else "resnet18"),
        size_px=options.size,
        epochs=1 + options.epochs,
        batch=10,
        precision="fp32" if small else "bf16",
        device=options.device,
    )
    print("   r  patch  images   generate   train    serial  overlapped  waited   / longer half")
    rows = {}
    for factor in options.factors:
        row = rows[f"r{factor}"] = measure(options, factor, config, device)
        p50 = {name: seconds["p50"] for name, seconds in row["seconds"].items()}
        print(
            f"{factor:4d} {row['patch_px']:4d}px {row['patches']:7d} {p50['generate']:9.2f}s "
            f"{p50['train']:7.2f}s {p50['serial']:7.2f}s {p50['overlapped']:9.2f}s "
            f"{row['waited_s']['p50']:7.2f}s {row['overlapped_over_longer_half']:13.2f}",
            flush=True,
        )
    row = environment(device) | {
        "benchmark": "epoch",
        "model": options.model,
        "weights": options.weights,
        "size_px": options.size,
        "backend": next(iter(rows.values()))["backend"],
        "engine_batch": options.batch,
        "student": config.network,
        "student_batch": config.batch,
        "student_precision": config.precision,
        "threads": torch.get_num_threads(),
        "factors": rows,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
