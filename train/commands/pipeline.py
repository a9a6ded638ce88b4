"""A run's stages, and what decides each: teacher, a coreset per method, its labels, its students.

All ranks of a world share the scoring of patches, the making and the rendering of images, the
labels, the students and the accuracy of a teacher that was brought along; rank 0 alone trains a
teacher, or a network for doping, whose bits name a coreset, and writes.

RUN/teacher/, RUN/coreset…/ (coresets.py), RUN/students/METHOD-seedS.safetensors, RUN/pictures/.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.coreset.manifest import DOPED
from ...export.durable import json_sha256
from ..config import CHANGES_NO_RESULT
from ..labels.keep import RunLabels, label_settings
from ..methods.open import open_source, own_part
from ..methods.patches import selection_settings
from ..methods.registry import METHODS
from ..methods.source import Expansions, ImageSource
from ..plan import Plan
from ..report.pictures import expansion_sheet, one_sample_per_class, rendered_sheet, write_picture
from ..report.summary import REAL, provenance
from ..run.folder import RunFolder, StageResult, settings_by_option
from ..run.progress import Report
from ..students.loop import train_students
from ..teacher.brought import measure, name_of
from ..teacher.teacher import Teacher, load_teacher
from ..teacher.training import TEACHER, train_teacher, training_losses
from .coresets import RunCoresets
from .doping import dope


class Distillation:
    """One run: what was planned, the folder it fills, and who is told."""

    def __init__(self, plan: Plan, run: RunFolder, report: Report, line: str) -> None:
        self.plan, self.run, self.report, self.line = plan, run, report, line
        self._coresets = RunCoresets(plan, run)

    def teacher_stage(self) -> dict[str, Any]:
        """Train or load the teacher; returns its description."""
        plan = self.plan
        config = {
            "--data": plan.data_sha256,
            **settings_by_option("teacher", asdict(plan.teacher)),
        }
        if plan.teacher_source is not None:
            config["--teacher"] = name_of(plan.teacher_source)
        together = plan.teacher_source is not None
        return self.run.stage("teacher", config, self._make_teacher, together=together)

    def _make_teacher(self) -> StageResult:
        plan, folder = self.plan, self.run.folder / "teacher"
        if plan.teacher_source is not None:
            self.run.world.in_turn(lambda: self.teacher)  # a download, maybe
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
        described = {k: v for k, v in self.teacher_stage().items() if k != "losses"}
        return self._coresets.make(
            self.report, teacher=lambda: self.teacher, described=described, line=self.line
        )

    def doping_stage(self, method: str) -> dict[str, Any]:
        """Train a network on a method's coreset, and write the coreset with the real images that it
        is least sure of."""
        return self.run.stage(
            f"doping-{method}",
            {**self._undoped_settings(method), "--dope": self.plan.dope},
            lambda: self._dope(method),
            together=True,
        )

    def _dope(self, method: str) -> StageResult:
        doped = dope(
            self.plan,
            self.run,
            self.report,
            self.teacher,
            coreset=open_coreset(self._coresets.undoped_folder(method)),
            folder=self._coresets.folder(method),
            provenance=provenance(self.line, self.plan.device),
        )
        if doped is None:
            return StageResult({})
        images = {k: v for k, v in doped.manifest["files"].items() if k.startswith(f"{DOPED}/")}
        named = {"doped_sha256": json_sha256(images)}
        return StageResult(named, [doped.folder / name for name in images])

    def coresets(self) -> dict[str, Any]:
        """{method: what its coreset holds, its size and its name}, labels included."""
        return {
            method: {**result, **self._coresets.describe(method)}
            for method, result in self.coreset_stage().items()
        }

    def labels_stage(self, method: str) -> dict[str, Any]:
        """Store the teacher's answers to every view of every epoch, and train nobody."""
        return self.run.stage(
            f"labels-{method}",
            self._student_settings(method),
            lambda: self._make_labels(method),
            together=True,
        )

    def _make_labels(self, method: str) -> StageResult:
        coreset = self._coresets.open(method)
        with open_source(self.plan, coreset, self.run.world) as source:
            labels = self._labels(method, source, coreset)
            labels.keep(labels.choose())
        return StageResult({"content_sha256": self._coresets.open(method).content_sha256})

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
        """Train the students of a method, or `real` ones; returns their accuracies and losses."""
        return self.run.stage(
            f"student-{method}",
            {**self._student_settings(method), "--seeds": list(self.plan.student_seeds)},
            lambda: self._make_students(method),
            together=True,
        )

    def _student_settings(self, method: str) -> dict[str, Any]:
        """All that decides labels and students of a method."""
        settings = self._undoped_settings(method)
        if self.plan.dope:
            settings["--dope"] = self.plan.dope
            if method != REAL:
                settings |= self.doping_stage(method)
        if method == REAL:
            return settings
        return settings | label_settings(self.plan)

    def _undoped_settings(self, method: str) -> dict[str, Any]:
        """All that decides what a student of a method's own coreset learns; of labels, who makes
        them."""
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
        plan, folder = self.plan, self.run.folder / "students"
        coreset = None if method == REAL else self._coresets.open(method)
        with open_source(plan, coreset, self.run.world) as source:
            if self.run.world.leads:
                self._draw(method, own_part(source), coreset)
            run_labels = self._labels(method, source, coreset)
            labels = run_labels.choose()
            results = train_students(
                source,
                labels,
                plan.student,
                seeds=plan.student_seeds,
                val_set=plan.val,
                folder=folder,
                report=self.report,
                name=method,
                world=self.run.world,
            )
            run_labels.keep(labels)
        described = {
            "accuracies": [result.accuracy for result in results],
            "losses": [list(result.losses) for result in results],
            "seeds": [result.seed for result in results],
            "images_per_s": results[0].images_per_s,
            "render": source.describe(),
        }
        return StageResult(described, [result.path for result in results])

    def _draw(self, method: str, source: ImageSource, coreset: Coreset | None) -> None:
        samples = one_sample_per_class(source.labels_N)
        write_picture(self.run.folder, f"rendered-{method}", rendered_sheet(source, samples))
        if coreset is not None and isinstance(source, Expansions):
            sheet = expansion_sheet(source.expander, coreset.patches(), samples)
            write_picture(self.run.folder, "expansions", sheet)
