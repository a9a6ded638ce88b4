"""A run folder and its stages: their settings, results and output files.

    run.json               marks a run folder
    stages/<stage>.json    {"config", "state": "begun" | "done", "seconds", "result", "outputs"}

Only rank 0 reads and writes the folder; the other ranks follow its decisions. Rank 0 runs a stage
alone while the others wait for its result, or all ranks run it together. Rank 0 raises the error
for an unusable folder or a refused stage; the others end with it (world.py).

A stage's file is written atomically when the stage begins, and when it ends or is stopped. The
result of a finished stage is reused if its outputs match their hashes; an unfinished stage runs
again and resumes from its own checkpoints. A changed config is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import BaseFileLock
from pydantic import BaseModel, Field

from ...engine.interrupts import safe_point
from ...export.documents import Finite, Inside, check_document, read_json
from ...export.durable import (
    differences,
    file_sha256,
    find_link,
    json_sha256,
    replace_json,
    sync,
    take_lock,
)
from .progress import Report, duration
from .settings import LEFT_OUT
from .world import ALONE, World

SCHEMA = "patchbloom.run/1"
MARK, STAGES = "run.json", "stages"
_OURS = re.compile(
    r"(run|config|environment|summary)\.json|log\.jsonl|report\.html|images\.safetensors|"
    r"stages|teacher|students|"
    r"pictures|tensorboard|"
    r"coreset(-[a-z0-9]+)*|\.coreset.*|.*\.partial"
)


class RunError(ValueError):
    """A run folder that cannot be used: expected, found, what to do."""


class _Begun(BaseModel):
    config: dict[str, Any]
    state: Literal["begun"]
    seconds: Finite


class _Done(_Begun):
    state: Literal["done"]  # pyright: ignore[reportIncompatibleVariableOverride]
    result: dict[str, Any]
    outputs: dict[Inside, str]


class _Teacher(BaseModel):
    sha256: str
    accuracy: Finite | None
    losses: list[Finite] = []


class _Coreset(BaseModel):
    patches_sha256: str
    evals: Finite


class _StudentsElsewhere(BaseModel):
    accuracies: list[Finite] | None


class _Students(BaseModel):
    accuracies: list[Finite]
    losses: list[list[Finite]]
    images_per_s: Finite | None


_Stage = Annotated[_Begun | _Done, Field(discriminator="state")]
_RESULTS = {
    "data": dict[str, list[str]],
    "teacher": _Teacher,
    "coreset": dict[str, _Coreset],
    "student": _StudentsElsewhere,
    "student-": _Students,
}
"""Shape of a stage's result by the begin of its name, as far as later stages read it."""


@dataclass(frozen=True)
class StageResult:
    """A stage's result, and its files, which must be unchanged on a resume."""

    result: dict[str, Any]
    """Plain JSON."""
    outputs: Iterable[Path] = ()


class RunFolder(AbstractContextManager["RunFolder"]):
    """One run folder, locked for a world."""

    def __init__(
        self, folder: Path, report: Report, world: World = ALONE, *, overwrite: bool = False
    ) -> None:
        """Lock the folder, then empty it with `overwrite`; never while another process uses it."""
        self.folder, self.world, self._report = folder, world, report
        self._results: dict[str, dict[str, Any]] = {}
        self._lock = self._prepare(overwrite) if world.leads else None

    def _prepare(self, overwrite: bool) -> BaseFileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        mark, lock = self.folder / MARK, _lock(self.folder)
        if not mark.stat().st_size:  # in place: a lock on a file that is replaced is lost
            mark.write_text(json.dumps({"schema": SCHEMA}, indent=1) + "\n")
            sync(mark)
        if overwrite:  # the mark stays, so that a killed removal can be repeated
            for entry in self.folder.iterdir():
                if entry.name != MARK:
                    is_folder = entry.is_dir() and not entry.is_symlink()
                    shutil.rmtree(entry) if is_folder else entry.unlink()
        refuse_links(self.folder)
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
        """The result of stage `name`, on every rank: from its file if it is done, else from `work`.

        Rank 0 works alone, and `work` must not call the world: the others wait for its end. With
        `together` all ranks work. `config` is plain JSON that holds everything that decides the
        result, and no path. Its keys are options ("--rho") where possible, because they appear in
        error messages. Raises RunError when the stage was begun with another config (with `again`
        it runs again instead) or its outputs changed.
        """
        safe_point()
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
        """The result in a stage's file; None when the stage has to run. Raises as `stage` does."""
        record = self.read(name)
        if record is None or (again and record["config"] != config):
            return None
        self._check_config(name, record["config"], config)
        if record["state"] != "done":
            return None
        self._check_outputs(name, record["outputs"])
        self._report.say(f"{name}: done before, in {duration(record['seconds'])}")
        return record["result"]

    def _run(
        self, name: str, config: dict[str, Any], work: Callable[[], StageResult]
    ) -> dict[str, Any]:
        """Run the stage and write its file; `seconds` includes earlier sessions."""
        record, began = self.read(name) or {}, time.monotonic()
        if record.get("config") != config:
            record = {}

        def write(state: str, **more: Any) -> None:
            seconds = round(record.get("seconds", 0.0) + time.monotonic() - began, 3)
            entry = {"config": config, "state": state, "seconds": seconds, **more}
            replace_json(self._file(name), entry)

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
        """The content of a stage's file. None: it never began, or this is not rank 0.

        Raises RunError for a damaged file.
        """
        path = self._file(name)
        if not (self.world.leads and path.is_file()):
            return None
        remedy = f"remove it, and the {name} stage runs again, or start again with --overwrite"
        record = read_json(path, RunError, remedy, _Stage)
        result = _RESULTS.get("".join(name.partition("-")[:2]))
        if record["state"] == "done" and result is not None:
            check_document(record["result"], f"{path}, result", RunError, remedy, result)
        return record

    @property
    def begun(self) -> bool:
        """Whether a stage has begun."""
        return any((self.folder / STAGES).glob("*.json"))

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each finished stage, in the order in which they ended.

        Includes all sessions of a resumed stage, except those that were killed before they wrote.
        Reports a stage whose file is damaged, and omits it.
        """
        files = sorted((self.folder / STAGES).glob("*.json"), key=lambda path: path.stat().st_mtime)
        seconds: dict[str, float] = {}
        for path in files:
            try:
                record = self.read(path.stem)
            except RunError as error:
                self._report.say(f"damaged: {error}")
                continue
            if record is not None and record["state"] == "done":
                seconds[path.stem] = record["seconds"]
        return seconds

    def _file(self, name: str) -> Path:
        return self.folder / STAGES / f"{name}.json"

    def _check_config(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        both = before.keys() & now.keys()
        # Keys of both come first: a key of only one config exists because of another choice.
        for key, _, _ in sorted(differences(before, now), key=lambda each: each[0] not in both):
            if key == "--data":
                raise RunError(
                    f"the images have changed since the {name} stage of {self.folder} was run: "
                    "give the same data to --resume, or start again with --overwrite"
                )
            was, requested = (settings.get(key, LEFT_OUT.get(key)) for settings in (before, now))
            raise RunError(
                f"the {name} stage of {self.folder} was run with {key} = {was}, "
                f"now asked for {requested}: give the same options to --resume, "
                "another --out, or --overwrite"
            )

    def _check_outputs(self, name: str, outputs: dict[str, str]) -> None:
        for relative, sha256 in outputs.items():
            path = self.folder / relative
            if path.is_file() and file_sha256(path) == sha256:
                continue
            found = "it was changed" if path.is_file() else "it is missing"
            raise RunError(
                f"{path} is not as the {name} stage left it ({found}): restore it, "
                "or start again with --overwrite"
            )


def check_out(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises RunError unless the folder is empty, or holds a run to resume or to overwrite."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(f"--out {folder} exists and is not a folder: choose another --out")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if names in ([], [f"{MARK}.partial"]):  # the second: an earlier version, killed at its start
        return
    if names == [MARK] and not (folder / MARK).stat().st_size:  # killed, or just now starting
        return
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign or not _is_run(folder / MARK):
        found = f"it holds {foreign[0]!r}" if foreign else f"it has no {MARK} of ours"
        raise RunError(f"--out {folder} is not empty and no run ({found}): choose another --out")
    if not (overwrite or resume):
        _lock(folder).release()
        raise RunError(
            f"--out {folder} is not empty: --resume goes on with that run, --overwrite replaces "
            "it, or choose another --out"
        )


def refuse_links(run: Path) -> None:
    """Raises RunError for a symbolic link inside a run: it may lead to anybody's files."""
    if (link := find_link(run)) is not None:
        raise RunError(
            f"{link} is a symbolic link, and a run holds plain files and folders only: remove it, "
            "or put a copy in its place"
        )


def _lock(folder: Path) -> BaseFileLock:
    """Lock a run folder by its mark; RunError when another process has it."""
    try:
        return take_lock(folder / MARK)
    except TimeoutError:
        raise RunError(f"another process works in {folder}: wait for it, or end it") from None


def _is_run(mark: Path) -> bool:
    try:
        return read_json(mark, RunError, "")["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError):
        return False
