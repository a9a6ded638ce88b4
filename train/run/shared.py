"""A run folder in which all ranks of a world take the same decisions; rank 0 alone writes.

A stage is rank 0's alone, and the others wait for its result, or all ranks work `together`; which
files are written is rank 0's matter in both. A folder that rank 0 cannot use, or a stage that it
refuses, is its error; the others end with it (run/world.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .folder import RunFolder, StageResult
from .progress import Report
from .world import World


class SharedRun(AbstractContextManager["SharedRun"]):
    """One run folder, locked for this world."""

    def __init__(
        self, folder: Path, report: Report, world: World, *, overwrite: bool = False
    ) -> None:
        """As stages.RunFolder, by rank 0."""
        self.folder, self.world = folder, world
        self._own = RunFolder(folder, report, overwrite=overwrite) if world.leads else None
        self._results: dict[str, dict[str, Any]] = {}

    def __exit__(self, *raised: object) -> None:
        if self._own is not None:
            self._own.__exit__(*raised)

    def stage(
        self,
        name: str,
        config: dict[str, Any],
        work: Callable[[], StageResult],
        *,
        again: bool = False,
        together: bool = False,
    ) -> dict[str, Any]:
        """stages.RunFolder.stage, on every rank; with `together` all of them do the work.

        Work that is rank 0's alone must not ask anything of the world: the others wait for its end.
        """
        if name not in self._results:
            if self._own is None:
                self._follow(work if together else None)
                result: dict[str, Any] = {}
            else:
                result = self._lead(self._own, name, config, work, again, together)
            self._results[name] = self.world.same(result)
        return self._results[name]

    def _lead(
        self,
        own: RunFolder,
        name: str,
        config: dict[str, Any],
        work: Callable[[], StageResult],
        again: bool,
        together: bool,
    ) -> dict[str, Any]:
        begun = False

        def begin() -> StageResult:
            nonlocal begun
            begun = True
            if together:
                self.world.same(begun)
            return work()

        result = own.stage(name, config, begin, again=again)
        if together and not begun:
            self.world.same(begun)
        return result

    def _follow(self, work: Callable[[], StageResult] | None) -> None:
        if work is not None and self.world.same(False):
            work()

    def read(self, name: str) -> dict[str, Any] | None:
        """Of stages.RunFolder; None on the ranks that follow."""
        return None if self._own is None else self._own.read(name)

    def seconds(self) -> dict[str, float]:
        """Of stages.RunFolder; nothing on the ranks that follow."""
        return {} if self._own is None else self._own.seconds()
