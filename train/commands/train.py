"""`train` and its stages: teacher → coresets → labels → students → report; each stage resumes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.builds.cards import card_here
from ...engine.console import print_table
from ...engine.data.crops import stream_center
from ...engine.data.images import ImageSet, check_no_class_emptied
from ...export.documents import check_document, read_json
from ...export.durable import full_disk_explained, replace_json
from ...export.hashes import forget_hashes
from ...export.terminal import visible
from ..data.folder import check_content, images_sha256
from ..options import RunOptions, Train, TrainCoreset, TrainLabels, TrainTeacher
from ..plan import Plan
from ..report.page import PICTURES, SUMMARY, ReportError, Summary, accuracy_rows, write_report
from ..report.pictures import draw_curves
from ..report.summary import REAL, make_summary, provenance, rounded
from ..run.folder import RunError, RunFolder, StageResult, check_out
from ..run.progress import Report
from ..run.world import open_world
from ..students.loop import brief
from .checks import check_images_per_class
from .engines import build_only, methods_with_engines
from .pipeline import Distillation
from .planning import make_plan

CONFIG, ENVIRONMENT = "config.json", "environment.json"
NEEDED_BYTES = 64 * 2**20  # for a run's small files; writing labels or weights checks its own need
LEARNED = {"soft": "KL to the teacher", "hard": "cross-entropy minus the target's entropy"}


def run_stages(options: RunOptions, line: str) -> dict[str, Any]:
    """Run the stages of one command; `line` is that command, for the provenance.

    A sub-command resumes the run in its folder; `train` does so only with --resume. Returns the
    command's result, plain JSON. Raises ValueError or OSError, one clear line, for bad input.
    """
    resumes = options.resume or not (isinstance(options, Train) or options.overwrite)
    with (
        open_world(options.device, options.start_timeout) as world,
        Report(options.out if world.leads else None) as report,
    ):
        if options.verify:  # in every process: each opens its own engines
            forget_hashes()
        cards = world.all_gather(card_here()) if world.device.type == "cuda" else []
        if options.build_only is not None:
            plan = world.in_turn(lambda: make_plan(options, report, cards))
            return world.once(lambda: build_only(plan, options))
        world.once(lambda: check_out(options.out, resume=resumes, overwrite=options.overwrite))
        plan = world.in_turn(lambda: make_plan(options, report, cards))
        with (
            full_disk_explained(options.out, NEEDED_BYTES),
            RunFolder(options.out, report, world, overwrite=options.overwrite) as run,
        ):
            if world.leads:
                _write_settings(run.folder, options, plan, line)
                report.open_log()
                check_content(run.folder, (plan.train, plan.val), report, begun=run.begun)
            skipped: dict[str, int] = {}
            if options.skip_corrupt:
                plan, skipped = _omit_damaged(plan, run, report)
            return _run(Distillation(plan, run, report, line), options, skipped)


def _write_settings(folder: Path, options: RunOptions, plan: Plan, line: str) -> None:
    """Write, for people, the first session's options and configs, and where each session ran.

    A resumed run has the same settings, or its stages refuse it.
    """
    if not (folder / CONFIG).is_file():
        filled_in = {kind: asdict(getattr(plan, kind)) for kind in ("teacher", "student", "expand")}
        given = asdict(options)
        for settings in (given, filled_in["expand"]):
            del settings["trt_library"], settings["cuda_graph"]  # they belong to one start
        del given["start_timeout"], given["build_only"], given["verify"]
        given |= {name: value for name, value in given.pop("where").items() if value is not None}
        replace_json(folder / CONFIG, {"options": given, **filled_in}, default=str)
    path = folder / ENVIRONMENT
    remedy = "remove it: a new one is begun"
    sessions = read_json(path, RunError, remedy, list[Any]) if path.is_file() else []
    replace_json(path, [*sessions, provenance(line, plan.device)], default=str)


def _omit_damaged(plan: Plan, run: RunFolder, report: Report) -> tuple[Plan, dict[str, int]]:
    """--skip-corrupt: the plan without images that cannot be decoded, and their number per split.

    A stage of its own decodes every file once, so later stages see valid images only. Raises
    InputError when a class has none left, ValueError when it has too few, RunError for a run that
    was started with images that are now omitted.
    """

    def find() -> StageResult:
        return StageResult({s.split: _damaged(s, plan, report) for s in (plan.train, plan.val)})

    found = run.stage("data", {"--data": plan.data_sha256}, find)
    train, val = (_without(images, found[images.split]) for images in (plan.train, plan.val))
    remaining = replace(
        plan,
        train=train,
        val=val,
        data_sha256=images_sha256(train, val),
        damaged=tuple(found["train"]),
    )
    check_images_per_class(remaining)
    for name in ("teacher", "coreset") if any(found.values()) else ():
        record = run.read(name)
        if record is not None and record["config"].get("--data") == plan.data_sha256:
            raise RunError(
                f"the {name} stage of {run.folder} was run with images that --skip-corrupt leaves "
                "out: start again with --overwrite, or choose another --out"
            )
    return remaining, {split: len(paths) for split, paths in found.items()}


def _damaged(images: ImageSet, plan: Plan, report: Report) -> list[str]:
    stream = stream_center(images, size_px=plan.image_size, device=plan.device, skip_corrupt=True)
    done = 0
    for batch in stream:
        done += len(batch.labels_B)
        report.progress(f"decode {images.split}", done, len(images), "images")
    for place in sorted(images.place(index) for index in stream.skipped):
        report.say(f"skipped, it cannot be decoded: {place}")
    return sorted(images.paths[index] for index in stream.skipped)


def _without(images: ImageSet, paths: list[str]) -> ImageSet:
    omitted = set(paths)
    kept = images.taken(np.flatnonzero([path not in omitted for path in images.paths]))
    check_no_class_emptied(images, kept.labels)
    return kept


def _run(job: Distillation, options: RunOptions, skipped: dict[str, int]) -> dict[str, Any]:
    out = {"run": str(options.out), "skipped_images": skipped}
    job.prepare_engines(methods_with_engines(options))
    teacher = job.teacher_stage()
    if isinstance(options, TrainTeacher):
        return {**out, "teacher": rounded(teacher)}
    job.coreset_stage()
    for method in options.methods if options.dope else ():
        job.doping_stage(method)
    if isinstance(options, TrainLabels) or options.labels == "stored":
        for method in options.methods:
            job.labels_stage(method)
    if isinstance(options, TrainCoreset | TrainLabels):
        return {**out, "coresets": job.run.world.once(job.coresets)}
    students = {method: job.student_stage(method) for method in options.methods}
    if options.ceiling:
        students[REAL] = job.student_stage(REAL)
    if isinstance(options, Train):
        return _report(job, students, skipped)
    return {**out, "students": rounded({name: brief(told) for name, told in students.items()})}


def _panels(students: dict[str, Any], learned: str) -> dict[str, dict[str, Any]]:
    """Curves of the students' means: losses by epoch, and accuracy where it was measured."""
    losses = {name: enumerate(np.mean(s["losses"], 0), 1) for name, s in students.items()}
    panels = {f"students: {learned}": losses}
    curves = {name: np.mean(each.get("curves", [[]]), 0) for name, each in students.items()}
    measured = {name: points for name, points in curves.items() if len(points) > 1}
    return {"students: accuracy, %": measured} | panels if measured else panels


def _report(job: Distillation, students: dict[str, Any], skipped: dict[str, int]) -> dict[str, Any]:
    """The last stage: summary.json, curves, report.html; returns the most important numbers."""
    folder = job.run.folder

    def work() -> StageResult:
        summary = make_summary(
            job.plan,
            command=job.line,
            teacher=job.teacher_stage(),
            students=students,
            coresets=job.coresets(),
            seconds=job.run.seconds(),
            skipped=skipped,
        )
        panels = _panels(students, LEARNED[job.plan.student.targets])
        if summary["teacher"].get("losses"):
            panels["teacher: cross-entropy"] = {
                "teacher": enumerate(summary["teacher"]["losses"], 1)
            }
        draw_curves(folder, panels)
        ceiling = {REAL: summary["ceiling"]} if summary["ceiling"] else {}
        for name, (mean, _) in (summary["accuracy"] | ceiling).items():
            picture = folder / PICTURES / f"rendered-{name}.png"
            job.report.outcome(name, summary["settings"], mean, picture)
        replace_json(folder / SUMMARY, summary)
        write_report(folder)
        return StageResult(summary)

    summary = job.run.stage("report", {"students": students}, work, again=True)
    check_document(summary, str(folder), ReportError, "start again with --overwrite", Summary)
    print_table([("method", "accuracy, %", "share of ceiling"), *accuracy_rows(summary)])
    print(f"report: {visible(str(folder / 'report.html'))}")
    first = ("accuracy", "ceiling", "share_of_ceiling", "seconds", "images_per_s", "bytes")
    return {
        "run": str(folder),
        "report": str(folder / "report.html"),
        **{key: summary[key] for key in (*first, "content_sha256", "skipped_images")},
    }
