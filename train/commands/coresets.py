"""A run's coresets, one per method: where they lie, and how they are made together.

RUN/coreset/           of the primary method: one that renders by a model, else the first
RUN/coreset-METHOD/    of another
RUN/coreset…-doped/    with --dope beside each of these: the one that the students are of
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset, write_coreset
from ...export.durable import json_sha256
from ..methods.method import Made, Making
from ..methods.registry import METHODS
from ..plan import Plan
from ..report.pictures import coreset_sheet, write_picture
from ..report.summary import provenance
from ..run.folder import RunFolder, StageResult
from ..run.progress import Report
from ..teacher.teacher import Teacher


class RunCoresets:
    """The coresets in the folder of one run."""

    def __init__(self, plan: Plan, run: RunFolder) -> None:
        self._plan, self._run = plan, run
        self._verified: set[Path] = set()

    def folder(self, method: str) -> Path:
        """Where the coreset of a method lies, of which its students are."""
        folder = self.undoped_folder(method)
        return folder.with_name(f"{folder.name}-doped") if self._plan.dope else folder

    def undoped_folder(self, method: str) -> Path:
        """Where the coreset lies that the method itself made."""
        methods = self._plan.methods
        primary = next((m for m in methods if METHODS[m].model == "rendered"), methods[0])
        return self._run.folder / ("coreset" if method == primary else f"coreset-{method}")

    def open(self, method: str) -> Coreset:
        """The one in `folder(method)`; CoresetError as open_coreset has it.

        Every byte of it is read once, by rank 0: labels of a thousand classes take minutes.
        """
        folder = self.folder(method)
        verify = self._run.world.leads and folder not in self._verified
        self._verified.add(folder)
        return open_coreset(folder, verify=verify)

    def describe(self, method: str) -> dict[str, Any]:
        """The name, the hash and the sizes in bytes of the one in `folder(method)`; plain JSON."""
        coreset = open_coreset(self.folder(method))
        return {
            "folder": coreset.folder.name,
            "content_sha256": coreset.content_sha256,
            "bytes": coreset.bytes(),
        }

    def make(
        self,
        report: Report,
        *,
        teacher: Callable[[], Teacher],
        described: dict[str, Any],
        line: str,
    ) -> StageResult:
        """Make the coreset of every method, without labels; the result is {method: what it holds}.

        `teacher` loads the teacher, where a method asks it; `described` is what manifests say of
        it, and `line` the command. All ranks of the run's world call it. ValueError: a budget that
        is too small, networks that overflow, or a teacher that cannot take patches.
        """
        making = Making(plan=self._plan, world=self._run.world, report=report, teacher=teacher)
        made = {name: METHODS[name].make(making, self._parts(name)) for name in self._plan.methods}
        if not self._run.world.leads:
            return StageResult({})
        result: dict[str, Any] = {}
        outputs: list[Path] = []
        for name, each in made.items():
            coreset = self._write(name, each, described, provenance(line, self._plan.device))
            patches = {k: v for k, v in coreset.manifest["files"].items() if k.endswith(".png")}
            outputs += [coreset.folder / file for file in patches]
            result[name] = {
                "patches_sha256": json_sha256(patches),
                "evals": 0 if each.model is None else each.model["evals"],
                **each.told,
            }
        shown = open_coreset(self._run.folder / "coreset", verify=False)
        write_picture(self._run.folder, "coreset", coreset_sheet(shown))
        for name in made:
            shutil.rmtree(self._parts(name), ignore_errors=True)
        return StageResult(result, outputs)

    def _parts(self, method: str) -> Path:
        """Where a method keeps what it made, until all is written."""
        return self._run.folder / f"{method}.partial"

    def _write(
        self, method: str, made: Made, teacher: dict[str, Any], made_with: dict[str, Any]
    ) -> Coreset:
        """In place of what a killed run left."""
        plan = self._plan
        return write_coreset(
            self.undoped_folder(method),
            patches_NHWC=made.images_NHWC,
            class_ids=plan.train.class_ids,
            class_names=plan.class_names,
            settings={
                "method": method,
                "seed": plan.seed,
                "image_size_px": plan.image_size,
                "data_sha256": plan.data_sha256,
                **made.settings,
            },
            model=made.model,
            teacher=teacher,
            provenance={**made_with, **made.provenance},
            overwrite=True,
        )
