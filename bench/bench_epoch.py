"""Seconds per epoch, as in DACE's Table 3: expansion, student, serial and overlapped.

    python bench/bench_epoch.py --json                                          (CPU, sdxl-tiny)
    python bench/bench_epoch.py --model sdxl-turbo --weights random --size 224 --json        (a GPU)

Ten classes at IPC 1: factor r means 10 r² patches of size / r pixels, one image of each per epoch;
one student, batch 10, stored labels of fp16 logits. Four runs take turns in one process, with the
same engine:

    generate     renders an epoch's views and labels; no student trains
    train        a student trains on images that already exist
    serial       both, `--overlap off`
    overlapped   both, `--overlap on`, and how long the student waited

A run lasts `epochs` epochs and gives one number: the time from its start to its last step, divided
by its epochs (epoch_runs.py). Each run first warms up for one epoch, which is not counted; n is the
number of rounds. Outside the clock: opening the engine, encoding the patches, building the
student's network, writing its weights.

The gate runs before anything is timed: over many small pools, with every slot used twice and
deterministic kernels, a serial and an overlapped student must end with the same weights. The CPU
must match bit for bit. On a GPU, where some kernels have no deterministic form, they may differ by
NEAR times the distance to a student that learned from another epoch's images; that student is the
negative control, and shows how a slot that is read too late would look.

With `--json` the row so far is printed after every factor, as `partial`; the last line is the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from epoch_runs import EpochTime, Given, Kept, Part, render_epochs, train_student
from measure import environment, publish, quantiles, run_program
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.backends import resolve_device
from patchbloom.engine.expand.expander import Expander
from patchbloom.export.config import BackendName, DeviceName, Weights
from patchbloom.export.models import find_model
from patchbloom.train.config import StudentConfig
from patchbloom.train.methods.source import Expansions, ImageSource
from patchbloom.train.students.lockstep import SLOTS
from pictures import default_precision, make_coreset
from torch import Tensor

Run = Literal["generate", "train", "serial", "overlapped"]

CLASSES = 10
PAPER_S = {2: 2.53, 3: 2.76, 4: 6.39, 5: 8.23, 7: 16.58, 8: 22.49}
"""DACE, Table 3: seconds per epoch of SDXL-Turbo on four A6000, at PAPER_SETTING only; not measured
here."""
PAPER_SETTING = {"model": "sdxl-turbo", "size_px": 224, "evals": 4}
NEAR = {"cpu": 0.0, "cuda": 0.1}
"""How far overlap may move a student, relative to a student that learned from other images."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seconds per epoch."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    weights: Weights = "pretrained"
    """`random`: the architecture only; speed does not depend on weights."""
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    """`auto`: cuda if available."""
    size: int = 64
    """Image size in px; the paper's is 224."""
    factors: tuple[int, ...] = (2, 5, 8)
    """r: 10 r² patches of size / r pixels. The paper has 2, 3, 4, 5, 7 and 8."""
    runs: tuple[Run, ...] = ("generate", "train", "serial", "overlapped")
    """Runs to time."""
    student: str | None = None
    """Default: resnet18 on a GPU, convnet-d4-w24to96 on the CPU."""
    epochs: int = 2
    """Epochs per run; more epochs dilute the start and end, which overlap cannot hide."""
    rounds: int = 5
    """Timed rounds (n): each run gives one number per round."""
    batch: int = 32
    """Images per engine call."""
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def open_source(options: Options, factor: int, device: str) -> Expansions:
    """Ten classes of r² random patches each, expanded by the model."""
    coreset = make_coreset(
        classes=CLASSES, patches_per_class=factor**2, side_px=options.size // factor, seed=factor
    )
    config = ExpandConfig(
        size_px=options.size,
        precision=default_precision(device),
        batch=min(options.batch, len(coreset.labels_N)),
        backend=options.backend,
        device=options.device,
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
    source: ImageSource, config: StudentConfig, device: str, batch: int
) -> dict[str, float]:
    """Relative L2 distance of the overlapped student's and the control's weights to a serial one's.

    Uses part of the samples: `batch` per pool, and enough pools to use every slot twice.
    Raises RuntimeError when overlap changes the student, or when other images do not.
    """
    pools = 2 * SLOTS[device]
    part = Part(source, min(source.samples, pools * batch))
    labels, pool = Given(part.samples, CLASSES), max(config.batch, part.samples // pools)
    epochs = -(-pools // -(-part.samples // pool))
    serial = replace(config, epochs=epochs, pool=pool, compile=False, overlap=False)
    # Not use_deterministic_algorithms: compiled blocks guard it, and would be compiled anew.
    torch.backends.cudnn.deterministic = True
    try:
        weights = train_student(part, labels, serial)[1]
        overlapped = train_student(part, labels, replace(serial, overlap=True))[1]
        other = train_student(Kept(part, epoch=epochs), labels, serial)[1]
    finally:
        torch.backends.cudnn.deterministic = False
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


def make_runs(
    wanted: tuple[Run, ...], source: ImageSource
) -> dict[Run, Callable[[StudentConfig], EpochTime]]:
    """The runs to time, by name."""
    labels = Given(source.samples, CLASSES)
    kept = Kept(source) if "train" in wanted else source

    def serial(config: StudentConfig) -> EpochTime:
        return train_student(source, labels, replace(config, overlap=False))[0]

    calls: dict[Run, Callable[[StudentConfig], EpochTime]] = {
        "generate": lambda config: render_epochs(source, labels, config),
        "train": lambda config: train_student(kept, labels, replace(config, overlap=False))[0],
        "serial": serial,
        "overlapped": lambda config: train_student(source, labels, config)[0],
    }
    return {name: calls[name] for name in wanted}


def time_runs(
    runs: dict[Run, Callable[[StudentConfig], EpochTime]], config: StudentConfig, rounds: int
) -> dict[Run, list[EpochTime]]:
    """One time per run and round, after an uncounted warm-up epoch of each run."""
    for run in runs.values():
        run(replace(config, epochs=1))
    taken: dict[Run, list[EpochTime]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(run(config))
    return taken


def measure(options: Options, factor: int, config: StudentConfig, device: str) -> dict[str, Any]:
    """The row of one factor. Raises RuntimeError when the gate fails."""
    source = open_source(options, factor, device)
    described = source.expander.describe()
    gate = check_overlap(source, config, device, described["batch"])
    taken = time_runs(make_runs(options.runs, source), config, options.rounds)
    source.expander.close()
    seconds = {name: _quantiles([each.seconds for each in taken[name]]) for name in taken}
    row = {
        "patches": source.samples,
        "patch_px": options.size // factor,
        "evals": described["evals"],
        "engine_batch": described["batch"],
        "backend": described["backend"],
        "gate": gate,
        "seconds": seconds,
    }
    if "overlapped" in taken:
        row["waited_s"] = _quantiles([each.waited_s for each in taken["overlapped"]])
    if len(taken) == 4:
        longer = max(seconds["generate"]["p50"], seconds["train"]["p50"])
        overlapped = seconds["overlapped"]["p50"]
        row["overlapped_over_longer_half"] = round(overlapped / longer, 3)
        row["speedup_over_serial"] = round(seconds["serial"]["p50"] / overlapped, 3)
    setting = {"model": options.model, "size_px": options.size, "evals": described["evals"]}
    if setting == PAPER_SETTING and factor in PAPER_S:
        row["paper_s"] = PAPER_S[factor]
    return row


def _quantiles(values: list[float]) -> dict[str, float | int]:
    return quantiles(values, digits=4) | {"n": len(values)}


def print_factor(factor: int, row: dict[str, Any]) -> None:
    """Print one line: the time of an epoch in every run."""
    parts = [f"{name} {seconds['p50']:.2f} s" for name, seconds in row["seconds"].items()]
    if "waited_s" in row:
        parts.append(f"waited {row['waited_s']['p50']:.2f} s")
    if "overlapped_over_longer_half" in row:
        parts.append(f"{row['overlapped_over_longer_half']:.2f} x the longer half")
    size = f"{row['patches']} images, patches of {row['patch_px']} px"
    print(f"r {factor}, {size}: {', '.join(parts)}", flush=True)


def main(options: Options) -> None:
    """Gate, measure, report."""
    device = resolve_device(options.device)
    small = device == "cpu"
    config = StudentConfig(
        network=options.student or ("convnet-d4-w24to96" if small else "resnet18"),
        size_px=options.size,
        epochs=options.epochs,
        batch=10,
        precision="fp32" if small else "bf16",
        device=options.device,
    )
    rows: dict[str, dict[str, Any]] = {}
    row: dict[str, Any] = {}
    for factor in options.factors:
        if row and options.json:
            print(json.dumps(row | {"partial": True}), flush=True)
        rows[f"r{factor}"] = measure(options, factor, config, device)
        print_factor(factor, rows[f"r{factor}"])
        row = environment(device) | {
            "benchmark": "epoch",
            "model": options.model,
            "weights": options.weights,
            "size_px": options.size,
            "backend": rows[f"r{factor}"]["backend"],
            "engine_batch": options.batch,
            "student": config.network,
            "student_batch": config.batch,
            "student_precision": config.precision,
            "epochs": options.epochs,
            "threads": torch.get_num_threads(),
            "factors": rows,
        }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
