"""`train student --coreset DIR`: students from a coreset folder alone, on any machine.

    OUT/stages/student.json, OUT/students/METHOD-seedS.safetensors, OUT/tensorboard/, OUT/log.jsonl

This needs neither the original images nor the teacher; --data adds a validation split to measure
accuracy on. Students learn the stored labels, or with hard targets the classes, which every coreset
has. With the same seeds, and the same engine on the same kind of device, they equal the students of
the coreset's own run: bit for bit on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.data.images import ImageSet, open_image_set
from ...engine.expand.backends import resolve_device
from ...export.durable import full_disk_explained
from ..config import CHANGES_NO_RESULT, StudentConfig, Targets, student_seeds
from ..coreset_options import StudentElsewhere
from ..data.folder import data_folder, images_sha256
from ..labels.hard import HardLabels
from ..report.summary import mean_and_std, provenance, rounded
from ..run.folder import RunFolder, StageResult, check_out
from ..run.progress import Report
from ..run.settings import settings_by_option
from ..students.from_manifest import fitting_labels, open_recorded_source, student_config
from ..students.loop import train_students
from .checks import check_compiler, check_network
from .hard_recipe import hard_config

STAGE = "student"
NEEDED_BYTES = 64 * 2**20  # for the run's small files; writing weights checks its own need


def train_elsewhere(options: StudentElsewhere, line: str) -> dict[str, Any]:
    """Train the requested students; returns the printed result, plain JSON.

    Raises ValueError or OSError, one clear line, for a manifest that lacks information, labels of
    other views, a model with other weights, or a machine that lacks what was requested.
    """
    with Report(options.out) as report:
        _require_apart(options.coreset, options.out)
        check_out(options.out, resume=True, overwrite=options.overwrite)
        if not options.overwrite:
            _require_own(options.out)
        coreset = open_coreset(options.coreset.expanduser())
        config = _student_config(coreset, options, report)
        val = _validation(options, report)
        with (
            full_disk_explained(options.out, NEEDED_BYTES),
            RunFolder(options.out, report, overwrite=options.overwrite) as run,
        ):
            report.open_log()
            students = run.stage(
                STAGE,
                _settings(coreset, options, config, val),
                lambda: _train(coreset, options, config, val, run, report, line),
            )
    accuracies = students["accuracies"]
    return {
        "run": str(options.out),
        "coreset": coreset.content_sha256,
        "method": coreset.settings["method"],
        "targets": config.targets,
        "validation_images": None if val is None else len(val),
        "accuracy": None if accuracies is None else mean_and_std(accuracies),
        "students": rounded({k: v for k, v in students.items() if k != "provenance"}),
    }


def _require_apart(coreset: Path, out: Path) -> None:
    """Raises ValueError if --coreset lies in --out, which --overwrite would empty."""
    if coreset.expanduser().resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--coreset {coreset} lies in --out {out}: choose another --out")


def _require_own(out: Path) -> None:
    """Raises ValueError for another run's folder, whose students have the same file names."""
    others = sorted({path.stem for path in (out / "stages").glob("*.json")} - {STAGE})
    if others:
        raise ValueError(
            f"--out {out} holds a run with the stage {others[0]}, and this command keeps students "
            "of its own: choose another --out"
        )


def _student_config(coreset: Coreset, options: StudentElsewhere, report: Report) -> StudentConfig:
    if options.student_compile:
        check_compiler()
    device = resolve_device(options.device)
    changes = {
        "network": options.student,
        "epochs": options.epochs,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "final_lr_fraction": options.final_lr_fraction,
        "weight_decay": options.weight_decay,
        "precision": options.student_precision,
        "compile": options.student_compile,
        "accumulate": options.accumulate,
        "overlap": options.overlap == "on",
    }
    if _targets(coreset, options, report) == "hard":
        config = hard_config(coreset, options, report, device=device, **changes)
    else:
        config = student_config(coreset, device=device, **changes)
        _refuse_what_hard_targets_take(options)
    check_network("--student", config.network, len(coreset.class_ids), config.size_px)
    return config


def _targets(coreset: Coreset, options: StudentElsewhere, report: Report) -> Targets:
    if options.targets is not None:
        return options.targets
    if coreset.soft_labels() is not None:
        return "soft"
    report.say("targets: hard, the classes alone, as the coreset holds no soft labels")
    return "hard"


def _refuse_what_hard_targets_take(options: StudentElsewhere) -> None:
    for name in ("recipe", "factor", "cutmix"):
        value = getattr(options, name)
        if value is not None:
            raise ValueError(
                f"--{name} {value}: the stored labels belong to the manifest's recipe and views: "
                "leave it out, or give --targets hard"
            )


def _validation(options: StudentElsewhere, report: Report) -> ImageSet | None:
    if options.data is None:
        report.say("accuracy: not measured, there is no --data")
        return None
    return open_image_set(data_folder(options.data, options.shapes_per_class, report), "val")


def _settings(
    coreset: Coreset, options: StudentElsewhere, config: StudentConfig, val: ImageSet | None
) -> dict[str, Any]:
    """Everything that decides the students and their reported results."""
    student = {k: v for k, v in asdict(config).items() if k not in CHANGES_NO_RESULT}
    return {
        "--coreset": coreset.content_sha256,
        "validation images": None if val is None else images_sha256(val),
        "--seeds": list(_seeds(coreset, options)),
        "--precision": options.precision,
        "--vae-precision": options.vae_precision,
        **settings_by_option("student", student),
    }


def _seeds(coreset: Coreset, options: StudentElsewhere) -> tuple[int, ...]:
    seed = coreset.settings["seed"] if options.seed is None else options.seed
    return student_seeds(seed, options.seeds)


def _train(
    coreset: Coreset,
    options: StudentElsewhere,
    config: StudentConfig,
    val: ImageSet | None,
    run: RunFolder,
    report: Report,
    line: str,
) -> StageResult:
    with open_recorded_source(coreset, options, options.backend, config) as source:
        hard = config.targets == "hard"
        labels = (
            HardLabels(source, config) if hard else fitting_labels(coreset, source, config, options)
        )
        results = train_students(
            source,
            labels,
            config,
            seeds=_seeds(coreset, options),
            val_set=val,
            folder=run.folder / "students",
            report=report,
            name=coreset.settings["method"],
        )
    described = {
        "accuracies": None if val is None else [result.accuracy for result in results],
        "losses": [list(result.losses) for result in results],
        "seeds": [result.seed for result in results],
        "render": source.describe(),
        "provenance": provenance(line, config.device),
    }
    return StageResult(described, [result.path for result in results])
