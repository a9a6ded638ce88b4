"""What labels cost: recorded while students train, against online ones and against labels first.

    python bench/bench_labels.py --epochs 100 --json

Teacher and coreset of the generated set are made once, outside the clock. A pass is the rest of a
run of method dace, from a copy of that folder: with `online` and `record` the stage of the
students, with `stored` the stage of the labels and then that of the students. So a pass counts
opening the engine, every expansion, the teacher, the students, validation, and putting the labels
into the coreset. The gate: students and labels are equal in every bit, however the labels came.

Targets: record <= 1.1 times online, record <= 0.6 times stored, in seconds. With labels first
every image is expanded twice: the second target asks that expansion is most of the work, as it is
for the one student of this benchmark: making the artefact and the first student.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import environment, measure_rates, publish, ratios, run_program
from patchbloom.engine.coreset.manifest import LABELS
from patchbloom.export.config import BackendName
from patchbloom.train.commands.pipeline import Distillation
from patchbloom.train.commands.planning import make_plan
from patchbloom.train.commands.train import run_stages
from patchbloom.train.options import LabelChoice, TrainCoreset
from patchbloom.train.plan import Plan
from patchbloom.train.run.checkpoint import read_tensors
from patchbloom.train.run.folder import RunFolder
from patchbloom.train.run.progress import Report

METHOD = "dace"
MODES: tuple[LabelChoice, ...] = ("online", "record", "stored")
TARGETS = {"record_over_online": 1.1, "record_over_stored": 0.6}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seconds of labels and students together, by how the labels come."""

    epochs: int = 100
    """Of the students: every epoch renders every sample once."""
    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    backend: BackendName = "auto"
    """What runs it."""
    shapes_per_class: int = 200
    """Training images per class; a fifth as many for validation."""
    threads: int = 2
    rounds: int = 5
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def prepare(options: Options, folder: Path, report: Report) -> Plan:
    """A run folder with a teacher and a coreset in it, and the plan of the rest."""
    run = TrainCoreset(
        data="shapes",
        out=folder,
        model=options.model,
        backend=options.backend,
        ipc=1,
        epochs=options.epochs,
        teacher_epochs=1,  # the teacher's accuracy decides no time
        codec="dense",
        seeds=1,
        shapes_per_class=options.shapes_per_class,
    )
    run_stages(run, "bench_labels")
    return make_plan(run, report)


def mode_pass(
    mode: LabelChoice, plan: Plan, folder: Path, out: Path, report: Report
) -> Callable[[], int]:
    """The rest of the run in a fresh copy of `folder`; the images that its students saw."""
    chosen = replace(plan, labels=mode)
    samples = len(plan.class_names) * plan.samples_per_class

    def one_pass() -> int:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
        with RunFolder(out, report) as run:
            job = Distillation(chosen, run, report, "bench_labels")
            if mode == "stored":
                job.labels_stage(METHOD)
            job.student_stage(METHOD)
        return samples * plan.student.epochs

    return one_pass


def check_equal(work: Path, plan: Plan) -> int:
    """Bytes of the stored labels; RuntimeError unless all modes made the same bits."""
    name = f"students/{METHOD}-seed{plan.student_seeds[0]}.safetensors"
    first, *others = (read_tensors(work / mode / name)[0] for mode in MODES)
    for other in others:
        if not all(torch.equal(first[key], other[key]) for key in first):
            raise RuntimeError(f"{name}: students differ by how labels came; nothing is timed")
    recorded, stored = ((work / mode / "coreset" / LABELS).read_bytes() for mode in MODES[1:])
    if recorded != stored:
        raise RuntimeError("labels recorded and stored first differ; nothing is timed")
    return len(recorded)


def main(options: Options) -> None:
    """Gate, measure, report."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name, Report() as report:
        work = Path(name)
        plan = prepare(options, work / "prepared", report)
        passes = {
            mode: mode_pass(mode, plan, work / "prepared", work / mode, report) for mode in MODES
        }
        images = max(one_pass() for one_pass in passes.values())  # the warm-up; all see as many
        label_bytes = check_equal(work, plan)
        rates = measure_rates(passes, rounds=options.rounds, warmup=0)
    over = {
        f"record_over_{mode}": ratios(rates[mode], rates["record"]) for mode in ("online", "stored")
    }
    for mode, rate in rates.items():
        print(f"{mode:8} {images / rate.p50:8.1f} s   {rate.p50:.1f} images/s   n {options.rounds}")
    for name, ratio in over.items():
        print(f"{name:20} {ratio.p50:.3f}   target {TARGETS[name]}")
    row = environment(plan.device) | {
        "benchmark": "labels",
        "seconds": {mode: round(images / rate.p50, 2) for mode, rate in rates.items()},
        "images_per_s": {mode: rate.row() for mode, rate in rates.items()},
        "ratio": {name: round(ratio.p50, 3) for name, ratio in over.items()},
        "ratio_spread": {name: ratio.row() for name, ratio in over.items()},
        "targets": TARGETS,
        "label_bytes": label_bytes,
        "codec": "dense",
        "model": options.model,
        "backend": options.backend,
        "student": plan.student.network,
        "size_px": plan.image_size,
        "images": images,
        "epochs": options.epochs,
        "seeds": 1,
        "ipc": 1,
        "threads": options.threads,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
