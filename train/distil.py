"""The stages' work: one teacher, a coreset per method, its labels, its students.

All ranks of a world share the scoring of patches, the making and the rendering of images, the
labels, the students and the accuracy of a teacher that was brought along; rank 0 alone trains a
teacher, or a network for doping, whose bits name a coreset, and writes.

RUN/teacher/, RUN/coreset/ of the primary method (dace, if it is among them, else the first) and
RUN/coreset-METHOD/ of the others, with --dope the same with -doped beside them, of which the
students are; RUN/students/METHOD-seedS.safetensors, RUN/pictures/.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engine.coreset import Coreset, attach_labels, open_coreset, write_coreset
from ..engine.manifest import DOPED, CoresetError, canonical
from ..engine.patches import PatchSelection, select_patches
from .commands import GENERATED
from .config import CHANGES_NO_RESULT
from .doping import dope
from .dsco import Optimised, discard_parts, dsco_settings, optimise_images, write_optimised
from .evaluation import accuracies
from .generated import Generated, generate, generation_settings, write_generated
from .hard_labels import HardLabels
from .labels import (
    Labels,
    OnlineLabels,
    RecordedLabels,
    StoredLabels,
    discard_recorded,
    record_labels,
)
from .loop import train_students
from .methods import Expansions, ImageSource
from .normalisation import IMAGENET
from .patch_teacher import patch_teacher
from .pictures import (
    coreset_sheet,
    expansion_sheet,
    one_sample_per_class,
    rendered_sheet,
    write_picture,
)
from .plan import Plan
from .record import Report
from .shared_run import SharedRun
from .sources import describe_model, open_source, own_part, rendering_rate
from .stages import StageResult, settings_by_option
from .summary import REAL, provenance
from .teacher import Teacher, load_teacher
from .teacher_training import TEACHER, train_teacher, training_losses


class Distillation:
    """One run: what was planned, the folder it fills, and who is told."""

    def __init__(self, plan: Plan, run: SharedRun, report: Report, line: str) -> None:
        self.plan, self.run, self.report, self.line = plan, run, report, line
        self._verified: set[Path] = set()

    def teacher_stage(self) -> dict[str, Any]:
        """Train or load the teacher; returns its description."""
        plan = self.plan
        config = {
            "--data": plan.data_sha256,
            **settings_by_option("teacher", asdict(plan.teacher)),
        }
        if plan.teacher_source is not None:
            config["--teacher"] = _named(plan.teacher_source)
        together = plan.teacher_source is not None
        return self.run.stage("teacher", config, self._make_teacher, together=together)

    def _make_teacher(self) -> StageResult:
        plan, folder = self.plan, self.run.folder / "teacher"
        if plan.teacher_source is not None:
            self.run.world.in_turn(lambda: self.teacher)  # a download, maybe
            return StageResult({**self.teacher.describe(), "accuracy": self._measured()})
        teacher = train_teacher(plan.train, plan.val, plan.teacher, folder, self.report)
        losses = training_losses(folder)
        return StageResult({**teacher.describe(), "losses": losses}, [folder / TEACHER])

    def _measured(self) -> float:
        """Accuracy of a teacher that was brought along, on this validation split."""
        teacher, val = self.teacher, self.plan.val
        own = teacher.normalisation
        (accuracy,) = accuracies(
            [lambda inputs_BCHW: teacher.logits(inputs_BCHW, own)],
            val,
            size_px=teacher.size_px,
            device=teacher.device,
            normalisation=own,
            world=self.run.world,
        )
        self.report.say(f"teacher: {accuracy:.1f} % of {len(val)} validation images")
        return accuracy

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

    def coreset_folder(self, method: str) -> Path:
        """Where the coreset of a method lies, of which its students are."""
        folder = self.undoped_folder(method)
        return folder.with_name(f"{folder.name}-doped") if self.plan.options.dope else folder

    def undoped_folder(self, method: str) -> Path:
        """Where the coreset lies that the method itself made."""
        methods = self.plan.options.methods
        primary = "dace" if "dace" in methods else methods[0]
        return self.run.folder / ("coreset" if method == primary else f"coreset-{method}")

    def coreset_stage(self) -> dict[str, Any]:
        """Write a coreset per method, without labels; returns {method: what it holds}."""
        plan = self.plan
        config = {
            "--data": plan.data_sha256,
            "--method": list(plan.options.methods),
            "--class-names": list(plan.class_names),
            "teacher": self.teacher_stage()["sha256"],
            **{f"--{name.replace('_', '-')}": value for name, value in self._sizes().items()},
            **(self._model_settings() if "dace" in plan.options.methods else {}),
            **(generation_settings(plan) if "t2i" in plan.options.methods else {}),
            **(dsco_settings(plan) if "dsco" in plan.options.methods else {}),
        }
        return self.run.stage("coreset", config, self._make_coresets, together=True)

    def _sizes(self) -> dict[str, Any]:
        """Settings that all methods share, as options name them."""
        plan = self.plan
        return {
            "seed": plan.options.seed,
            "ipc": plan.options.ipc,
            "factor": plan.factor,
            "image_size": plan.image_size,
            "crops": plan.recipe.crops,
            "pool_per_class": plan.recipe.pool_per_class,
            "scoring": plan.scoring,
            "select": plan.options.select,
            "candidates": plan.options.candidates,
        }

    def _model_settings(self) -> dict[str, Any]:
        model = describe_model(self.plan, self.plan.expand)
        return {} if model is None else settings_by_option("model", model)

    def _make_coresets(self) -> StageResult:
        methods = self.plan.options.methods
        kinds = {
            method: "random" if method == "random" else self.plan.options.select
            for method in methods
            if method not in GENERATED
        }
        generated = None
        if "t2i" in methods:
            generated = generate(self.plan, self.run.world, self.report)
        selections = {kind: self._select(kind) for kind in dict.fromkeys(kinds.values())}
        optimised = None
        if "dsco" in methods:
            optimised = optimise_images(self.plan, self.run.folder, self.run.world, self.report)
        if not self.run.world.leads:
            return StageResult({})
        return self._write_all(kinds, selections, generated, optimised)

    def _write_all(
        self,
        kinds: dict[str, str],
        selections: dict[str, PatchSelection],
        generated: Generated | None,
        optimised: Optimised | None,
    ) -> StageResult:
        result: dict[str, Any] = {}
        outputs: list[Path] = []
        for method in self.plan.options.methods:
            told: dict[str, Any] = {}
            if method == "t2i" and generated is not None:
                coreset, told = self._write_generated(generated), generated.describe()
            elif method == "dsco" and optimised is not None:
                coreset = self._write_optimised(optimised)
            else:
                coreset = self._write(method, kinds[method], selections[kinds[method]])
            patches = {k: v for k, v in coreset.manifest["files"].items() if k.endswith(".png")}
            outputs += [coreset.folder / name for name in patches]
            result[method] = {
                "patches_sha256": hashlib.sha256(canonical(patches)).hexdigest(),
                "evals": coreset.manifest["model"]["evals"] if method == "dace" else 0,
                **told,
            }
        shown = open_coreset(self.run.folder / "coreset", verify=False)
        write_picture(self.run.folder, "coreset", coreset_sheet(shown))
        discard_parts(self.run.folder)
        return StageResult(result, outputs)

    def _select(self, kind: Any) -> PatchSelection:
        plan = self.plan
        teacher = None if kind == "random" else self.teacher
        asked, diversity = None, None
        if teacher is not None:
            asked, diversity = patch_teacher(
                teacher, plan.options.select, plan.scoring, plan.patch_px, plan.options.candidates
            )
        return select_patches(
            plan.train,
            asked,
            ipc=plan.options.ipc,
            factor=plan.factor,
            image_size_px=plan.image_size,
            crops=plan.recipe.crops,
            pool_per_class=plan.recipe.pool_per_class,
            seed=plan.options.seed,
            method="random" if kind == "random" else "lowest-loss",
            diversity=diversity,
            scoring=plan.scoring,
            device=plan.device,
            threads=self.run.world.threads,
            peers=self.run.world,
            progress=lambda done, total: self.report.progress(
                f"patches, {kind}", done, total, "images"
            ),
            canvas_rgb=(IMAGENET if teacher is None else teacher.normalisation).rgb(),
        )

    def _write(self, method: str, kind: str, selection: PatchSelection) -> Coreset:
        plan, sizes = self.plan, self._sizes()
        return write_coreset(
            self.undoped_folder(method),
            patches_NHWC=selection.patches_NHWC,
            labels_N=selection.labels_N,
            class_ids=plan.train.class_ids,
            class_names=plan.class_names,
            settings={
                "method": method,
                "seed": sizes["seed"],
                "image_size_px": sizes["image_size"],
                "factor": sizes["factor"],
                "patch_px": plan.patch_px,
                "ipc": sizes["ipc"],
                "data_sha256": plan.data_sha256,
                "selection": kind,
                "crops": 1 if kind == "random" else sizes["crops"],
                "pool_per_class": None if kind == "random" else sizes["pool_per_class"],
                "scoring": None if kind == "random" else sizes["scoring"],
                **(
                    {} if kind in ("random", "lowest-loss") else {"candidates": sizes["candidates"]}
                ),
            },
            model=describe_model(plan, plan.expand) if method == "dace" else None,
            teacher=self._described_teacher(),
            provenance={
                **provenance(self.line, plan.device),
                "patches": self._origins(selection),
                "skipped_images": list(selection.skipped),
            },
            overwrite=True,  # of what a killed run left: the folder of a run is ours
        )

    def _write_generated(self, generated: Generated) -> Coreset:
        return write_generated(
            self.plan,
            generated,
            self.undoped_folder("t2i"),
            teacher=self._described_teacher(),
            provenance=provenance(self.line, self.plan.device),
        )

    def _write_optimised(self, optimised: Optimised) -> Coreset:
        return write_optimised(
            self.plan,
            optimised,
            self.undoped_folder("dsco"),
            teacher=self._described_teacher(),
            provenance=provenance(self.line, self.plan.device),
        )

    def _described_teacher(self) -> dict[str, Any]:
        return {k: v for k, v in self.teacher_stage().items() if k != "losses"}

    def _origins(self, selection: PatchSelection) -> list[dict[str, Any]]:
        """Of every patch, in sample order: its image, where it was cut, and the teacher's loss."""
        rows = zip(
            selection.source_index_N.tolist(),
            selection.boxes_N4.tolist(),
            selection.losses_N.tolist(),
            strict=True,
        )
        return [
            {
                "image": self.plan.train.paths[index],
                "top_left_height_width": box,
                "loss": None if math.isnan(loss) else round(loss, 6),
            }
            for index, box, loss in rows
        ]

    def doping_stage(self, method: str) -> dict[str, Any]:
        """Train a network on a method's coreset, and write the coreset with the real images that it
        is least sure of."""
        return self.run.stage(
            f"doping-{method}",
            {**self._undoped_settings(method), "--dope": self.plan.options.dope},
            lambda: self._dope(method),
            together=True,
        )

    def _dope(self, method: str) -> StageResult:
        doped = dope(
            self.plan,
            self.run,
            self.report,
            self.teacher,
            coreset=open_coreset(self.undoped_folder(method)),
            folder=self.coreset_folder(method),
            provenance=provenance(self.line, self.plan.device),
        )
        if doped is None:
            return StageResult({})
        images = {k: v for k, v in doped.manifest["files"].items() if k.startswith(f"{DOPED}/")}
        named = {"doped_sha256": hashlib.sha256(canonical(images)).hexdigest()}
        return StageResult(named, [doped.folder / name for name in images])

    def coresets(self) -> dict[str, Any]:
        """{method: what its coreset holds, its size and its name}, labels included."""
        described = {}
        for method, result in self.coreset_stage().items():
            coreset = open_coreset(self.coreset_folder(method))
            described[method] = {
                **result,
                "folder": coreset.folder.name,
                "content_sha256": coreset.content_sha256,
                "bytes": coreset.bytes(),
            }
        return described

    def labels_stage(self, method: str) -> dict[str, Any]:
        """Store the teacher's answers to every view of every epoch, and train nobody."""
        return self.run.stage(
            f"labels-{method}",
            self._student_settings(method),
            lambda: self._make_labels(method),
            together=True,
        )

    def _make_labels(self, method: str) -> StageResult:
        coreset = self._coreset(method)
        with open_source(self.plan, coreset, self.run.world) as source:
            if self._stored(method, source, coreset) is None:
                self._attach(method, source, self._recorded(method, source))
                coreset = self._coreset(method)
        return StageResult({"content_sha256": coreset.content_sha256})

    def _recorded(self, method: str, source: ImageSource) -> RecordedLabels:
        plan, path = self.plan, self._recording(method)
        codec, k = plan.options.codec, plan.options.top_k
        return RecordedLabels(
            *(self.teacher, source, plan.student, path, self.report),
            codec=codec,
            k=k,
            world=self.run.world,
        )

    def _stored(self, method: str, source: ImageSource, coreset: Coreset) -> StoredLabels | None:
        """Those that the coreset has; CoresetError when --codec asks for others."""
        stored = coreset.soft_labels()
        if stored is None:
            return None
        options = self.plan.options
        asked = _codec_options(options.codec, options.top_k)
        kept = _codec_options(stored.codec, stored.k)
        if kept != asked:
            raise CoresetError(
                f"{coreset.folder} holds labels of {kept}, asked for {asked}: "
                f"give {kept}, or another --out"
            )
        if self.run.world.leads:
            discard_recorded(self._recording(method))  # of a run that was killed in between
        return StoredLabels(stored, source, self.plan.student)

    def _recording(self, method: str) -> Path:
        return self.run.folder / "students" / f"{method}.labels.partial"

    def _attach(self, method: str, source: ImageSource, labels: RecordedLabels) -> None:
        """Put recorded labels into the coreset, after asking for those that are missing."""
        if not labels.is_complete():
            record_labels(source, labels, self.plan.student, self.report)
        if self.run.world.leads:
            attach_labels(self.coreset_folder(method), labels.block())
            labels.discard()
        self.run.world.barrier()

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
        if self.plan.options.dope:
            settings["--dope"] = self.plan.options.dope
            if method != REAL:
                settings |= self.doping_stage(method)
        return settings | (self._label_settings() if method != REAL else {})

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
        if method == "dace":
            settings["--refresh"] = plan.options.refresh
        if method != REAL:
            settings["patches"] = self.coreset_stage()[method]["patches_sha256"]
        return settings | (self._model_settings() if method == "dace" else {})

    def _label_settings(self) -> dict[str, Any]:
        """`stored` and `record` make the same labels and students."""
        options = self.plan.options
        if options.targets == "hard":
            return {}
        if options.labels == "online":
            return {"--labels": "online"}
        kept = {"--labels": "record or stored", "--codec": options.codec}
        return kept | ({"--top-k": options.top_k} if options.codec == "topk" else {})

    def _make_students(self, method: str) -> StageResult:
        plan, folder = self.plan, self.run.folder / "students"
        coreset = None if method == REAL else self._coreset(method)
        with open_source(plan, coreset, self.run.world) as source:
            rate = rendering_rate(source)
            if self.run.world.leads:
                self._draw(method, own_part(source), coreset)
            labels = self._labels(method, source, coreset)
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
            if isinstance(labels, RecordedLabels):
                self._attach(method, source, labels)
        described = {
            "accuracies": [result.accuracy for result in results],
            "losses": [list(result.losses) for result in results],
            "seeds": [result.seed for result in results],
            "images_per_s": rate,
            "render": source.describe(),
        }
        return StageResult(described, [result.path for result in results])

    def _labels(self, method: str, source: ImageSource, coreset: Coreset | None) -> Labels:
        """Stored ones where the coreset has them, else the teacher's, kept if that is asked for.

        With hard targets the classes, and the coreset's labels stay as they are.
        """
        if self.plan.options.targets == "hard":
            return HardLabels(source, self.plan.student)
        if coreset is None or self.plan.options.labels == "online":
            return OnlineLabels(self.teacher, self.plan.student.temperature, self.run.world)
        stored = self._stored(method, source, coreset)
        return self._recorded(method, source) if stored is None else stored

    def _draw(self, method: str, source: ImageSource, coreset: Coreset | None) -> None:
        samples = one_sample_per_class(source.labels_N)
        write_picture(self.run.folder, f"rendered-{method}", rendered_sheet(source, samples))
        if coreset is not None and isinstance(source, Expansions):
            sheet = expansion_sheet(source.expander, coreset.patches(), samples)
            write_picture(self.run.folder, "expansions", sheet)

    def _coreset(self, method: str) -> Coreset:
        """Every byte of it is read once, by rank 0: labels of a thousand classes take minutes."""
        folder = self.coreset_folder(method)
        verify = self.run.world.leads and folder not in self._verified
        self._verified.add(folder)
        return open_coreset(folder, verify=verify)


def _codec_options(codec: str, k: int | None) -> str:
    return f"--codec {codec}" + (f" --top-k {k}" if codec == "topk" else "")


def _named(teacher_source: str) -> str:
    """torchvision:NAME as it is; a file by its content."""
    path = Path(teacher_source).expanduser()
    if not path.is_file():
        return teacher_source
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
