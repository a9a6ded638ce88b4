"""A run's coresets, one per method: where they lie, and how they are made together.

RUN/coreset/           of the primary method: dace, if it is among them, else the first
RUN/coreset-METHOD/    of another
RUN/coreset…-doped/    with --dope beside each of these: the one that the students are of
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.select.patches import PatchSelection
from ...export.durable import json_sha256
from ..methods.dsco import PARTS, Optimised, optimise_images, write_optimised
from ..methods.patches import select, write_selected
from ..methods.t2i import ROUNDS, Generated, generate, write_generated
from ..options import GENERATED
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
        primary = "dace" if "dace" in methods else methods[0]
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
        plan, world = self._plan, self._run.world
        methods = plan.methods
        kinds = {
            method: "random" if method == "random" else plan.select
            for method in methods
            if method not in GENERATED
        }
        generated = generate(plan, self._run.folder, world, report) if "t2i" in methods else None
        selections = {
            kind: select(plan, kind, None if kind == "random" else teacher(), world, report)
            for kind in dict.fromkeys(kinds.values())
        }
        optimised = None
        if "dsco" in methods:
            optimised = optimise_images(plan, self._run.folder, world, report)
        if not world.leads:
            return StageResult({})
        chosen = {method: (kind, selections[kind]) for method, kind in kinds.items()}
        return self._write(chosen, generated, optimised, described, line)

    def _write(
        self,
        chosen: dict[str, tuple[str, PatchSelection]],
        generated: Generated | None,
        optimised: Optimised | None,
        teacher: dict[str, Any],
        line: str,
    ) -> StageResult:
        plan = self._plan
        result: dict[str, Any] = {}
        outputs: list[Path] = []
        for method in plan.methods:
            told: dict[str, Any] = {}
            folder = self.undoped_folder(method)
            made = {"teacher": teacher, "provenance": provenance(line, plan.device)}
            if method == "t2i" and generated is not None:
                coreset = write_generated(plan, generated, folder, **made)
                told = generated.describe()
            elif method == "dsco" and optimised is not None:
                coreset = write_optimised(plan, optimised, folder, **made)
            else:
                coreset = write_selected(plan, method, *chosen[method], folder, **made)
            patches = {k: v for k, v in coreset.manifest["files"].items() if k.endswith(".png")}
            outputs += [coreset.folder / name for name in patches]
            result[method] = {
                "patches_sha256": json_sha256(patches),
                "evals": coreset.manifest["model"]["evals"] if method == "dace" else 0,
                **told,
            }
        shown = open_coreset(self._run.folder / "coreset", verify=False)
        write_picture(self._run.folder, "coreset", coreset_sheet(shown))
        for parts in (ROUNDS, PARTS):
            shutil.rmtree(self._run.folder / parts, ignore_errors=True)
        return StageResult(result, outputs)
