"""A run folder and its stages: what is done, with which settings, and what it left on the disk.

    run.json               marks the folder as ours
    stages/<stage>.json    {"config", "state": "begun" | "done", "seconds", "result", "outputs"}

Rank 0 alone reads and writes the folder; the ranks that follow take its decisions. A stage is rank
0's alone, and the others wait for its result, or all ranks work together. A folder that rank 0
cannot use, or a stage that it refuses, is its error; the others end with it (world.py).

A stage's file is written when it begins and when it ends or is stopped, each time whole or not at
all. A stage that is done is taken over after its outputs were compared with their hashes; one that
was only begun runs again and picks up its own checkpoints. Another config than before is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from ...export.durable import differences, file_sha256, json_sha256, replace_json, take_lock
from .progress import Report
from .settings import LEFT_OUT
from .world import ALONE, World

SCHEMA = "patchbloom.run/1"
MARK, STAGES = "run.json", "stages"
_OURS = re.compile(
    r"(run|config|environment|summary)\.json|log\.jsonl|report\.html|stages|teacher|students|"
    r"pictures|tensorboard|"
    r"coreset(-[a-z0-9]+)*|\.coreset.*|.*\.partial"
)


class RunError(ValueError):
    """A run folder that cannot be used as asked: expected, found, what to do."""


@dataclass(frozen=True)
class StageResult:
    """What a stage hands on, and the files that must still be there, unchanged, after a resume."""

    result: dict[str, Any]
    """Plain JSON."""
    outputs: Iterable[Path] = field(default_factory=tuple)


class RunFolder(AbstractContextManager["RunFolder"]):
    """One run folder, locked for a world."""

    def __init__(
        self, folder: Path, report: Report, world: World = ALONE, *, overwrite: bool = False
    ) -> None:
        """Lock it, then, with `overwrite`, empty it: never under a process that works in it."""
        self.folder, self.world, self._report = folder, world, report
        self._results: dict[str, dict[str, Any]] = {}
        self._lock = self._prepare(overwrite) if world.leads else None

    def _prepare(self, overwrite: bool) -> BaseFileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / MARK
        if not mark.exists():
            replace_json(mark, {"schema": SCHEMA})
        try:
            lock = take_lock(mark)
        except TimeoutError:
            told = f"another process works in {self.folder}: wait for it, or end it"
            raise RunError(told) from None
        if overwrite:
            _remove_all_but_the_mark(self.folder)
        (self.folder / STAGES).mkdir(exist_ok=True)
        return lock

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def stage(
        self,
        name: str,
        config: dict[str, Any],
        work: Callable[[], StageResult],
        *,
        again: bool = False,
        together: bool = False,
    ) -> dict[str, Any]:
        """The result of stage `name`, on every rank: from its file if it is done, else of `work`.

        Rank 0 does the work alone, and must not ask anything of the world: the others wait for its
        end. With `together` all ranks do it. `config` is plain JSON, holds all that decides the
        result, and no path. Its keys are options ("--rho") where there is one, because they appear
        in the message of a refusal. Raises RunError when the stage was begun with another config
        (with `again` it is then done again) or its outputs changed.
        """
        if name not in self._results:
            config = json.loads(json.dumps(config))
            result = self.world.once(lambda: self._done(name, config, again))
            if result is None:
                if self.world.leads:
                    result = self._run(name, config, work)
                elif together:
                    work()
                result = self.world.same(result)
            assert result is not None
            self._results[name] = result
        return self._results[name]

    def _done(self, name: str, config: dict[str, Any], again: bool) -> dict[str, Any] | None:
        """The result in a stage's file, None when the stage is to be run; RunError: see `stage`."""
        record = self.read(name)
        if record is None or (again and record["config"] != config):
            return None
        self._check_config(name, record["config"], config)
        if record["state"] != "done":
            return None
        self._check_outputs(name, record["outputs"])
        self._report.say(f"{name}: done before, in {record['seconds']:.1f} s")
        return record["result"]

    def _run(
        self, name: str, config: dict[str, Any], work: Callable[[], StageResult]
    ) -> dict[str, Any]:
        """Do the work and write its stage's file, with the seconds of earlier sessions added."""
        record, began = self.read(name) or {}, time.monotonic()
        if record.get("config") != config:
            record = {}

        def write(state: str, **more: Any) -> None:
            seconds = round(record.get("seconds", 0.0) + time.monotonic() - began, 3)
            told = {"config": config, "state": state, "seconds": seconds, **more}
            replace_json(self._file(name), told)

        write("begun")
        try:
            ended = work()
        except BaseException:
            with suppress(OSError):  # a full disk may be why the work ended
                write("begun")
            raise
        result = json.loads(json.dumps(ended.result))
        write(
            "done",
            config_sha256=json_sha256(config),
            resumed=bool(record),
            result=result,
            outputs={
                path.relative_to(self.folder).as_posix(): file_sha256(path)
                for path in ended.outputs
            },
        )
        return result

    def read(self, name: str) -> dict[str, Any] | None:
        """The file of a stage; None when it never began, and on the ranks that follow."""
        path = self._file(name)
        return json.loads(path.read_bytes()) if self.world.leads and path.is_file() else None

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each stage that is done, in the order in which they ended.

        A stage that was stopped and resumed has those of all its sessions, except for sessions that
        were killed before they could write.
        """
        files = sorted((self.folder / STAGES).glob("*.json"), key=lambda path: path.stat().st_mtime)
        records = {path.stem: json.loads(path.read_bytes()) for path in files}
        return {
            name: record["seconds"] for name, record in records.items() if record["state"] == "done"
        }

    def _file(self, name: str) -> Path:
        return self.folder / STAGES / f"{name}.json"

    def _check_config(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        both = before.keys() & now.keys()
        # What both have comes first: a setting that is there for one choice only follows from it.
        for key, _, _ in sorted(differences(before, now), key=lambda each: each[0] not in both):
            if key == "--data":
                raise RunError(
                    f"the images have changed since the {name} stage of {self.folder} was run: "
                    "give the same data to --resume, or start again with --overwrite"
                )
            was, asked = (settings.get(key, LEFT_OUT.get(key)) for settings in (before, now))
            raise RunError(
                f"the {name} stage of {self.folder} was run with {key} = {was}, "
                f"now asked for {asked}: give the same options to --resume, "
                "another --out, or --overwrite"
            )

    def _check_outputs(self, name: str, outputs: dict[str, str]) -> None:
        for relative, sha256 in outputs.items():
            path = self.folder / relative
            if not path.is_file():
                found = "it is missing"
            elif file_sha256(path) != sha256:
                found = "it was changed"
            else:
                continue
            raise RunError(
                f"{path} is not as the {name} stage left it ({found}): restore it, "
                "or start again with --overwrite"
            )


def check_out(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that is not empty, unless a run of ours is to be resumed or replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(f"--out {folder} exists and is not a folder: choose another --out")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if names in ([], [f"{MARK}.partial"]):  # the second: killed in its first millisecond
        return
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign or not _is_run(folder / MARK):
        found = f"it holds {foreign[0]!r}" if foreign else f"it has no {MARK} of ours"
        raise RunError(f"--out {folder} is not empty and no run ({found}): choose another --out")
    if not (overwrite or resume):
        raise RunError(
            f"--out {folder} is not empty: --resume goes on with that run, --overwrite replaces "
            "it, or choose another --out"
        )


def _is_run(mark: Path) -> bool:
    try:
        return json.loads(mark.read_bytes())["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_all_but_the_mark(folder: Path) -> None:
    """Remove the run that `check_out` found there; the mark stays, so a stopped removal goes on."""
    for entry in folder.iterdir():
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
