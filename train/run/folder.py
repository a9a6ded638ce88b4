"""A run folder and its stages: what is done, with which settings, and what it left on the disk.

    run.json               marks the folder as ours
    stages/<stage>.json    {"config", "state": "begun" | "done", "seconds", "result", "outputs"}

A stage's file is written when it begins, then every CLOCK_EVERY_S with the seconds so far, and when
it ends, each time whole or not at all. A stage that is done is taken over after its outputs were
compared with their hashes; one that was only begun runs again and picks up its own checkpoints.
Another config than before is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ...export.durable import replace_file
from .progress import Report

SCHEMA = "patchbloom.run/1"
MARK, STAGES = "run.json", "stages"
CLOCK_EVERY_S = 10.0  # of a stage's seconds, what a kill loses at most
OPTION_OF = {
    "teacher.network": "--teacher",
    "teacher.epochs": "--teacher-epochs",
    "teacher.size_px": "--image-size",
    "teacher.seed": "--seed",
    "teacher.device": "--device",
    "student.network": "--student",
    "student.epochs": "--epochs",
    "student.batch": "--batch",
    "student.learning_rate": "--learning-rate",
    "student.final_lr_fraction": "--final-lr-fraction",
    "student.cutmix": "--cutmix",
    "student.weight_decay": "--weight-decay",
    "student.views": "--student-precision",
    "student.precision": "--student-precision",
    "student.compile": "--student-compile",
    "student.targets": "--targets",
    "student.size_px": "--image-size",
    "student.seed": "--seed",
    "student.device": "--device",
    "dsco.name": "--model",
    "dsco.prompt": "--prompt",
    "dsco.prompts": "--prompts",
    "dsco.steps": "--steps",
    "dsco.precision": "--precision",
    "dsco.vae_precision": "--vae-precision",
    "model.name": "--model",
    "model.prompt": "--prompt",
    "model.prompts": "--prompts",
    "model.start": "--start",
    "model.steps": "--steps",
    "model.rho": "--rho",
    "model.mixup": "--mixup",
    "model.mixup_weight": "--mixup-weight",
    "model.precision": "--precision",
    "model.vae_precision": "--vae-precision",
    "t2i.name": "--model",
    "t2i.prompt": "--prompt",
    "t2i.prompts": "--prompts",
    "t2i.steps": "t2i's --steps",
    "t2i.generate_size": "--generate-size",
    "t2i.precision": "--precision",
    "t2i.vae_precision": "--vae-precision",
}
"""Settings that an option decides; the others follow from --recipe and from these."""
LEFT_OUT = {"--mixup-weight": "uniform"}
"""What a setting is where a config leaves it out (naming.describe_mixup)."""
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
    """One run folder, locked for this process."""

    def __init__(self, folder: Path, report: Report, *, overwrite: bool = False) -> None:
        """Lock it, then, with `overwrite`, empty it: never under a process that works in it."""
        self.folder, self._report = folder, report
        self._results: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).exists():
            _write_json(folder / MARK, {"schema": SCHEMA})
        self._lock = os.open(folder / MARK, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunError(f"another process works in {folder}: wait for it, or end it") from None
        if overwrite:
            _remove_all_but_the_mark(folder)
        (folder / STAGES).mkdir(exist_ok=True)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def stage(
        self,
        name: str,
        config: dict[str, Any],
        work: Callable[[], StageResult],
        *,
        again: bool = False,
    ) -> dict[str, Any]:
        """The result of stage `name`: from its file if it is done, else of `work`.

        `config` is plain JSON, holds all that decides the result, and no path. Its keys are
        options ("--rho") where there is one, because they appear in the message of a refusal.
        Raises RunError when the stage was begun with another config (with `again` it is then done
        again) or its outputs changed.
        """
        if name in self._results:
            return self._results[name]
        self._results[name] = self._run(name, json.loads(json.dumps(config)), work, again)
        return self._results[name]

    def _run(
        self, name: str, config: dict[str, Any], work: Callable[[], StageResult], again: bool
    ) -> dict[str, Any]:
        record = self.read(name)
        if again and record is not None and record["config"] != config:
            record = None
        if record is not None:
            self._check_config(name, record["config"], config)
            if record["state"] == "done":
                self._check_outputs(name, record["outputs"])
                self._report.say(f"{name}: done before, in {record['seconds']:.1f} s")
                return record["result"]
        before = 0.0 if record is None else record.get("seconds", 0.0)
        with self._clock(name, config, before) as seconds:
            ended = work()
        done = {
            "config": config,
            "config_sha256": config_sha256(config),
            "state": "done",
            "seconds": seconds(),
            "resumed": record is not None,
            "result": ended.result,
            "outputs": {
                path.relative_to(self.folder).as_posix(): _file_sha256(path)
                for path in ended.outputs
            },
        }
        self._write(name, done)
        return json.loads(json.dumps(ended.result))

    @contextmanager
    def _clock(
        self, name: str, config: dict[str, Any], before: float
    ) -> Iterator[Callable[[], float]]:
        """Keep the seconds of a begun stage in its file; yields what tells them."""
        began, ended = time.monotonic(), Event()

        def seconds() -> float:
            return round(before + time.monotonic() - began, 3)

        def write() -> None:
            self._write(name, {"config": config, "state": "begun", "seconds": seconds()})

        def tick() -> None:
            while not ended.wait(CLOCK_EVERY_S):
                with suppress(OSError):  # a full disk: the stage itself meets it, and tells
                    write()

        write()
        ticking = Thread(target=tick, name=f"clock-{name}", daemon=True)
        ticking.start()
        try:
            yield seconds
        finally:
            ended.set()
            ticking.join()
            with suppress(OSError):
                write()

    def read(self, name: str) -> dict[str, Any] | None:
        """The file of a stage; None when it never began."""
        path = self.folder / STAGES / f"{name}.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def forget(self, name: str, leftovers: Iterable[Path]) -> None:
        """A stage that never ended is as if it had not begun; its `leftovers` go first."""
        for path in (*leftovers, self.folder / STAGES / f"{name}.json"):
            path.unlink(missing_ok=True)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each stage that is done, in the order in which they ended.

        Of a stage that was stopped and resumed, those of all its sessions together.
        """
        files = sorted((self.folder / STAGES).glob("*.json"), key=lambda path: path.stat().st_mtime)
        records = {path.stem: json.loads(path.read_bytes()) for path in files}
        return {
            name: record["seconds"] for name, record in records.items() if record["state"] == "done"
        }

    def _write(self, name: str, record: dict[str, Any]) -> None:
        _write_json(self.folder / STAGES / f"{name}.json", record)

    def _check_config(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        # What both have comes first: a setting that is there for one choice only follows from it.
        for key in sorted(
            before.keys() | now.keys(), key=lambda k: (k not in before.keys() & now.keys(), k)
        ):
            if before.get(key) != now.get(key):
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
            elif _file_sha256(path) != sha256:
                found = "it was changed"
            else:
                continue
            raise RunError(
                f"{path} is not as the {name} stage left it ({found}): restore it, "
                "or start again with --overwrite"
            )


def settings_by_option(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under the option that decides them, or else under `part.name`."""
    return {OPTION_OF.get(f"{part}.{name}", f"{part}.{name}"): v for name, v in settings.items()}


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


def config_sha256(config: dict[str, Any]) -> str:
    """One name for a stage's settings."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
