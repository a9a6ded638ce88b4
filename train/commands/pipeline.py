"""A run's stages, and what decides each: teacher, a coreset per method, its labels, its students.

All ranks of a world share the scoring of patches, the making and rendering of images, the labels,
the students, and the accuracy of a provided teacher. Rank 0 alone writes, and it alone trains a
teacher or a doping network, because their bits name a coreset.

    RUN/teacher/
    RUN/coreset/           of the primary method: the first that renders by a model, else the first
    RUN/coreset-METHOD/    of each other method
    RUN/coreset…-doped/    with --dope, beside each of these: the one that students train on
    RUN/students/METHOD-seedS.safetensors
    RUN/pictures/
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset, write_coreset
from ...export.durable import json_sha256
from ..config import CHANGES_NO_RESULT
from ..labels.run_labels import RunLabels, label_settings
from ..methods.method import Made, Making
from ..methods.open import open_source
from ..methods.patches import selection_settings
from ..methods.registry import METHODS
from ..methods.source import ImageSource
from ..plan import Plan
from ..plugins import is_function
from ..report.pictures import draw_coreset, draw_images
from ..report.summary import REAL, provenance
from ..run.folder import RunFolder, StageResult
from ..run.progress import Report
from ..run.settings import settings_by_option
from ..students.loop import described, train_students
from ..teacher.given import load_teacher, teacher_id
from ..teacher.teacher import Teacher
from ..teacher.training import TEACHER, measure, train_teacher, training_losses
from .doping import dope
from .engines import find_or_build_engines


class Distillation:
    """One run: its plan, its folder, and its report; `line` is the command."""

    def __init__(self, plan: Plan, run: RunFolder, report: Report, line: str) -> None:
        self.plan, self.run, self.report, self.line = plan, run, report, line
        self._verified: set[Path] = set()

    def _folder(self, method: str) -> Path:
        """Folder of the coreset that the method's students train on."""
        folder = self._undoped_folder(method)
        return folder.with_name(f"{folder.name}-doped") if self.plan.dope else folder

    def _undoped_folder(self, method: str) -> Path:
        """Folder of the coreset that the method itself makes."""
        methods = self.plan.methods
        primary = next((m for m in methods if METHODS[m].model == "rendered"), methods[0])
        return self.run.folder / ("coreset" if method == primary else f"coreset-{method}")

    def _open(self, method: str) -> Coreset:
        """The coreset in `_folder(method)`. Raises CoresetError as open_coreset does.

        Rank 0 verifies each coreset once: labels of a thousand classes take minutes to read.
        """
        folder = self._folder(method)
        verify = self.run.world.leads and folder not in self._verified
        self._verified.add(folder)
        return open_coreset(folder, verify=verify)

    def prepare_engines(self, methods: Sequence[str]) -> None:
        """Find or build the engines of unfinished stages; from here on all ranks use these.

        Finished stages are read first: a resumed run with other options is refused before a build.
        """
        world = self.run.world
        rendered = {m: METHODS[m].model == "rendered" for m in methods}
        opening = {m: f"student-{m}" if rendered[m] else "coreset" for m in methods}
        stages = ("teacher", "coreset", *opening.values())
        done = world.once(lambda: [stage for stage in stages if self._is_done(stage)])
        if "teacher" in done:
            self.coreset_stage() if "coreset" in done else self.teacher_stage()
        waiting = [method for method, stage in opening.items() if stage not in done]
        if not waiting:
            return
        found = world.once(lambda: find_or_build_engines(self.plan, waiting))
        use = dict(self.plan.use)
        for method, each in found.items():
            chosen = {"backend": each["backend"], "trt_library": each["trt_library"]}
            use[method] = replace(use[method], **chosen)
            if rendered[method]:
                self.plan = replace(self.plan, expand=use[method])
        self.plan = replace(self.plan, use=use)

    def _is_done(self, stage: str) -> bool:
        record = self.run.read(stage)
        return record is not None and record["state"] == "done"

    def teacher_stage(self) -> dict[str, Any]:
        """Train or load the teacher; returns its description."""
        plan = self.plan
        settings = settings_by_option("teacher", plan.teacher.settings())
        config = {"--data": plan.data_sha256, **settings}
        provided = plan.teacher_source
        if provided is not None:
            config["--teacher"] = teacher_id(provided)
            if is_function(provided):
                config["the teacher's weights"] = self.teacher.sha256
        return self.run.stage("teacher", config, self._make_teacher, together=provided is not None)

    def _make_teacher(self) -> StageResult:
        plan, folder = self.plan, self.run.folder / "teacher"
        if plan.teacher_source is not None:
            self.run.world.in_turn(lambda: self.teacher)  # may download it
            accuracy = measure(self.teacher, plan.val, self.run.world, self.report)
            return StageResult({**self.teacher.describe(), "accuracy": accuracy})
        teacher = train_teacher(plan.train, plan.val, plan.teacher, folder, self.report)
        losses = training_losses(folder)
        return StageResult({**teacher.describe(), "losses": losses}, [folder / TEACHER])

    @cached_property
    def teacher(self) -> Teacher:
        """The run's teacher, in memory."""
        plan = self.plan
        return load_teacher(
            plan.teacher_source or str(self.run.folder / "teacher" / TEACHER),
            plan.train.class_ids,
            network=plan.teacher.network,
            size_px=plan.image_size,
            device=plan.device,
        )

    def coreset_stage(self) -> dict[str, Any]:
        """Write a coreset per method, without labels; returns {method: what it holds}."""
        plan = self.plan
        config = {
            "--data": plan.data_sha256,
            "--method": list(plan.methods),
            "--class-names": list(plan.class_names),
            "teacher": self.teacher_stage()["sha256"],
            **selection_settings(plan),
        }
        for method in METHODS.values():
            config |= method.settings(plan) if method.name in plan.methods else {}
        return self.run.stage("coreset", config, self._make_coresets, together=True)

    def _make_coresets(self) -> StageResult:
        """Raises ValueError for too small a budget, networks that overflow, or a teacher that
        cannot take patches."""
        plan, run = self.plan, self.run
        parts = {method: run.folder / f"{method}.partial" for method in plan.methods}
        making = Making(
            plan=plan, world=run.world, report=self.report, teacher=lambda: self.teacher
        )
        made = {method: METHODS[method].make(making, part) for method, part in parts.items()}
        if not run.world.leads:
            return StageResult({})
        result: dict[str, Any] = {}
        outputs: list[Path] = []
        for method, each in made.items():
            coreset = self._write_coreset(method, each)
            patches = {k: v for k, v in coreset.manifest["files"].items() if k.endswith(".png")}
            outputs += [coreset.folder / file for file in patches]
            result[method] = {
                "patches_sha256": json_sha256(patches),
                "evals": 0 if each.model is None else each.model["evals"],
                **each.told,
            }
        draw_coreset(run.folder, open_coreset(run.folder / "coreset", verify=False))
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
        return StageResult(result, outputs)

    def _write_coreset(self, method: str, made: Made) -> Coreset:
        plan = self.plan
        return write_coreset(
            self._undoped_folder(method),
            patches_NHWC=made.images_NHWC,
            class_ids=plan.train.class_ids,
            class_names=plan.class_names,
            settings={
                "method": method,
                "seed": plan.seed,
                "image_size_px": plan.image_size,
                "data_sha256": plan.data_sha256,
                **({"val_fraction": plan.val_fraction} if plan.val_fraction else {}),
                **made.settings,
            },
            model=made.model,
            teacher={k: v for k, v in self.teacher_stage().items() if k != "losses"},
            provenance={**provenance(self.line, plan.device), **made.provenance},
            overwrite=True,  # replaces what a killed run left
        )

    def doping_stage(self, method: str) -> dict[str, Any]:
        """Write a method's coreset again with the real images that a network trained on it is
        least sure of."""
        return self.run.stage(
            f"doping-{method}",
            {**self._undoped_settings(method), "--dope": self.plan.dope},
            lambda: dope(
                *(self.plan, self.run, self.report, self.teacher),
                coreset=open_coreset(self._undoped_folder(method)),
                folder=self._folder(method),
                provenance=provenance(self.line, self.plan.device),
            ),
            together=True,
        )

    def coresets(self) -> dict[str, Any]:
        """{method: the coreset stage's result, and the coreset's folder, hash and so on}.

        Sizes and hash include the stored labels.
        """
        described = {}
        for method, result in self.coreset_stage().items():
            coreset = open_coreset(self._folder(method))
            described[method] = {
                **result,
                "folder": coreset.folder.name,
                "images": len(coreset.labels_N),
                "settings": coreset.settings,
                "content_sha256": coreset.content_sha256,
                "bytes": coreset.bytes(),
            }
        return described

    def labels_stage(self, method: str) -> dict[str, Any]:
        """Store the teacher's labels for every view of every epoch, without training a student."""
        settings = self._student_settings(method)
        return self.run.stage(
            f"labels-{method}", settings, lambda: self._make_labels(method), together=True
        )

    def _make_labels(self, method: str) -> StageResult:
        coreset = self._open(method)
        with open_source(self.plan, coreset, self.run.world) as source:
            labels = self._labels(method, source, coreset)
            labels.keep(labels.choose())
        return StageResult({"content_sha256": self._open(method).content_sha256})

    def _labels(self, method: str, source: ImageSource, coreset: Coreset | None) -> RunLabels:
        return RunLabels(
            plan=self.plan,
            run=self.run,
            report=self.report,
            teacher=lambda: self.teacher,
            method=method,
            source=source,
            coreset=coreset,
        )

    def student_stage(self, method: str) -> dict[str, Any]:
        """Train the students of a method, or of `real`; returns accuracies, losses and so on."""
        settings = self._student_settings(method) | {"--seeds": list(self.plan.student_seeds)}
        return self.run.stage(
            f"student-{method}", settings, lambda: self._make_students(method), together=True
        )

    def _student_settings(self, method: str) -> dict[str, Any]:
        """Everything that decides the labels and students of a method."""
        settings = self._undoped_settings(method)
        if self.plan.dope:
            settings["--dope"] = self.plan.dope
        if method == REAL:
            return settings
        doping = self.doping_stage(method) if self.plan.dope else {}
        return settings | doping | label_settings(self.plan)

    def _undoped_settings(self, method: str) -> dict[str, Any]:
        """Everything that decides what students of a method's undoped coreset learn, except how
        labels are kept."""
        plan = self.plan
        student = {k: v for k, v in asdict(plan.student).items() if k not in CHANGES_NO_RESULT}
        settings = {
            "--data": plan.data_sha256,
            "teacher": self.teacher_stage()["sha256"],
            **settings_by_option("student", student),
        }
        if method == REAL:
            return settings
        settings["patches"] = self.coreset_stage()[method]["patches_sha256"]
        return settings | METHODS[method].rendering(plan)

    def _make_students(self, method: str) -> StageResult:
        plan = self.plan
        coreset = None if method == REAL else self._open(method)
        with open_source(plan, coreset, self.run.world) as source:
            if self.run.world.leads:
                draw_images(
                    self.run.folder, method, source, coreset, plan.class_names, self.teacher
                )
            run_labels = self._labels(method, source, coreset)
            labels = run_labels.choose()
            results = train_students(
                source,
                labels,
                plan.student,
                seeds=plan.student_seeds,
                val_set=plan.val,
                folder=self.run.folder / "students",
                report=self.report,
                name=method,
                world=self.run.world,
            )
            run_labels.keep(labels)
        told = {"images_per_s": results[0].images_per_s, "render": source.describe()}
        return StageResult(described(results) | told, [result.path for result in results])
