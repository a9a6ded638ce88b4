"""`train student --coreset DIR`: students from a coreset folder alone, on any machine.

    OUT/stages/student.json, OUT/students/METHOD-seedS.safetensors, OUT/tensorboard/, OUT/log.jsonl

This needs neither the original images nor the teacher; --data adds a validation split to measure
accuracy on. Students learn the stored labels, or with hard targets the classes, which every coreset
has. With the same seeds, and the same engine on the same kind of device, they equal the students of
the coreset's own run: bit for bit on a CPU.

The manifest of a coreset with labels holds the recipe of its own students, which applies to hard
targets too. Without labels the manifest gives the size and number of images, and a named recipe
gives the rest as `train --targets hard` does: the same options give the same students, except for
--refresh, which only labels record.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.data.images import ImageSet, with_classes
from ...engine.expand.backends import resolve_device
from ...export.config import DeviceName
from ...export.durable import full_disk_explained
from ..config import CHANGES_NO_RESULT, StudentConfig, student_seeds, usual_recipe
from ..coreset_options import LabelsElsewhere, StudentElsewhere
from ..data.folder import check_content, images_sha256, validation_sha256
from ..data.forms import open_data
from ..labels.hard import HardLabels
from ..plugins import is_function
from ..report.summary import mean_and_std, provenance, rounded
from ..run.folder import RunFolder, StageResult, check_out
from ..run.progress import Report
from ..run.settings import settings_by_option
from ..students.from_manifest import (
    fitting_labels,
    open_recorded_source,
    student_config,
    unlabelled_config,
)
from ..students.loop import brief, described, train_students
from .checks import check_compiler, check_network
from .planning import recipe_or_default

STAGE = "student"
SAME = (
    *("epochs", "batch", "learning_rate", "final_lr_fraction", "weight_decay"),
    *("accumulate", "evaluate_every"),
)
"""Options that are fields of StudentConfig under the same name."""
NEEDED_BYTES = 64 * 2**20  # for the run's small files; writing weights checks its own need


def train_elsewhere(
    options: StudentElsewhere,
    line: str,
    config: StudentConfig | None = None,
    val_sha256: str | None = None,
) -> dict[str, Any]:
    """Train the requested students; returns the printed result, plain JSON.

    A `config` takes the place of what the options say about training; `val_sha256` is the expected
    folder.validation_sha256 of --data. Raises ValueError or OSError, one clear line, for a manifest
    that lacks information, labels of other views, other validation images, a model with other
    weights, or a machine that lacks what was requested.
    """
    with Report(options.out) as report:
        _check_folders(options)
        coreset = open_coreset(options.coreset.expanduser())
        config = config or _student_config(coreset, options, report)
        if is_function(config.network) and options.student is None:
            raise ValueError(
                f"{coreset.folder}: its students' network is a function, and a folder may not "
                f"choose code to run: give `train student` --student {config.network}"
            )
        check_network("--student", config.network, len(coreset.class_ids), config.size_px)
        seed = coreset.settings["seed"] if options.seed is None else options.seed
        seeds = student_seeds(seed, options.seeds)
        if options.data is None:
            report.say("accuracy: not measured, there is no --data")
            val = None
        else:
            given = (options.where, options.shapes_per_class)
            (val,) = open_data(options.data, ("val",), report, *given)
            val = with_classes(val, coreset.class_ids)
        student = {k: v for k, v in asdict(config).items() if k not in CHANGES_NO_RESULT}
        settings = {
            "--coreset": coreset.content_sha256,
            "validation images": None if val is None else images_sha256(val),
            "--seeds": list(seeds),
            "--precision": options.precision,
            "--vae-precision": options.vae_precision,
            **settings_by_option("student", student),
        }
        with (
            full_disk_explained(options.out, NEEDED_BYTES),
            RunFolder(options.out, report, overwrite=options.overwrite) as run,
        ):
            report.open_log()
            if val is not None:
                check_content(run.folder, (val,), report, begun=run.begun)
                if val_sha256 not in (None, found := validation_sha256(run.folder)):
                    raise ValueError(
                        f"--data {options.data}: expected the published validation images, sha256 "
                        f"{val_sha256[:16]}…, got {len(val)} others, {str(found)[:16]}…: give the "
                        "data that the card names"
                    )
            students = run.stage(
                STAGE,
                settings,
                lambda: _train(coreset, options, config, seeds, val, report, line),
            )
    accuracies = students["accuracies"]
    return {
        "run": str(options.out),
        "coreset": coreset.content_sha256,
        "method": coreset.settings["method"],
        "targets": config.targets,
        "validation_images": None if val is None else len(val),
        "accuracy": None if accuracies is None else mean_and_std(accuracies),
        "students": rounded(brief(students)),
    }


def _check_folders(options: StudentElsewhere) -> None:
    """Raises ValueError for an --out that holds the coreset or something else than such a run."""
    out = options.out
    if options.coreset.expanduser().resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--coreset {options.coreset} lies in --out {out}: choose another --out")
    check_out(out, resume=True, overwrite=options.overwrite)
    others = sorted({path.stem for path in (out / "stages").glob("*.json")} - {STAGE})
    if others and not options.overwrite:  # its students have the same file names
        raise ValueError(
            f"--out {out} holds a run with the stage {others[0]}, and this command keeps students "
            "of its own: choose another --out"
        )


def _student_config(coreset: Coreset, options: StudentElsewhere, report: Report) -> StudentConfig:
    """The recipe of the students.

    Raises ValueError for an option that contradicts the manifest; CoresetError for a manifest with
    labels but without a recipe.
    """
    if options.student_compile:
        check_compiler()
    device = resolve_device(options.device)
    given = {
        **{name: getattr(options, name) for name in SAME},
        "network": options.student,
        "precision": options.student_precision,
        "compile": options.student_compile,
        "overlap": options.overlap == "on",
    }
    changes = {name: value for name, value in given.items() if value is not None}
    hard, has_labels = options.targets == "hard", coreset.soft_labels() is not None
    if options.targets is None and not has_labels:
        report.say("targets: hard, the classes alone, as the coreset holds no soft labels")
        hard = True
    if not hard:
        config = student_config(coreset, device=device, **changes)
        reason = "the stored labels belong to the manifest's recipe and views"
        _refuse(options, ("recipe", "factor", "cutmix"), reason, ", or give --targets hard")
    elif has_labels:
        reason = (
            f"the manifest of {coreset.folder} holds the recipe of its students, and single "
            "options change it"
        )
        _refuse(options, ("recipe", "factor"), reason)
        config = student_config(coreset, device=device)
    else:
        config = without_labels(coreset, options, report, device)
    if hard:
        if options.cutmix is not None:
            changes["cutmix"] = options.cutmix == "on"
        if "precision" in changes:
            config = config.at(changes.pop("precision"))
        config = replace(config, targets="hard", temperature=1.0, **changes)
    return config


def _refuse(
    options: StudentElsewhere, names: tuple[str, ...], reason: str, way_out: str = ""
) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"--{name} {value}: {reason}: leave it out{way_out}")


def without_labels(
    coreset: Coreset,
    options: StudentElsewhere | LabelsElsewhere,
    report: Report,
    device: DeviceName,
) -> StudentConfig:
    """The named recipe, filled in as the run of this coreset would."""
    default = usual_recipe(coreset.settings["image_size_px"])
    recipe = recipe_or_default(options.recipe, default, report)
    named = {"factor": options.factor, "network": options.student}
    return unlabelled_config(coreset, recipe, device=device, **named)


def _train(
    coreset: Coreset,
    options: StudentElsewhere,
    config: StudentConfig,
    seeds: tuple[int, ...],
    val: ImageSet | None,
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
            seeds=seeds,
            val_set=val,
            folder=options.out / "students",
            report=report,
            name=coreset.settings["method"],
        )
    told = {"render": source.describe(), "provenance": provenance(line, config.device)}
    if val is None:
        told |= {"accuracies": None}
    else:
        mean, _ = mean_and_std([result.accuracy or 0.0 for result in results])
        report.outcome(coreset.settings["method"], asdict(config), mean)
    return StageResult(described(results) | told, [result.path for result in results])
