"""`train publish` and `train check`: a folder from which others can check the numbers of a run.

    manifest.json            sha256 of every other file; accuracies, students' config, machine
    README.md, pictures/     the card
    coreset-METHOD/          a coreset, with its labels if it has some
    teacher.safetensors

It is written under a temporary name and renamed last. Absolute paths in a provenance lose their
folders; the content of a coreset, and so its content_sha256, stays as it is.

A check trains the students again. On the CPU that trained them, with its number of threads and its
versions of libraries, their weights must come out bit for bit. Elsewhere, or with other options,
the means may differ by as much as chance explains in 99 of 100 checks of a method:

    |mean now - mean then| <= t · sqrt(std_now² / n_now + std_then² / n_then)

t is Student's 99.5 % quantile of n_now + n_then - 2 degrees of freedom: 4.6 for 3 and 3 students.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, Field

from ...engine.coreset import manifest
from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.coreset.hub import published_before, upload
from ...engine.coreset.manifest import MANIFEST
from ...engine.coreset.schema import File
from ...engine.errors import CoresetError
from ...engine.expand.backends import resolve_device
from ...export.config import BackendName
from ...export.documents import Finite, Inside, Positive, Sha256, check_fields, read_json
from ...export.durable import differences, full_disk_explained, replacing, write_durably
from ...export.hub import HUB
from ...export.terminal import say
from ..config import StudentConfig
from ..coreset_options import RenderOptions, StudentElsewhere, TrainCheck
from ..data.folder import validation_sha256
from ..options import NOT_STATED, TrainPublish
from ..report.page import PICTURES, SUMMARY, Summary, write_card
from ..report.pictures import draw_coreset
from ..report.summary import mean_and_std, provenance
from ..run.checkpoint import read_tensors, weights_sha256
from ..run.folder import MARK, STAGES, RunError, RunFolder
from ..run.progress import Report
from ..teacher.training import TEACHER
from .student_from_coreset import STAGE, train_elsewhere
from .train import CONFIG, ENVIRONMENT

SCHEMA = "patchbloom.published/1"
CARD_BYTES = 4 * 2**20  # with its pictures
RESUME, AGAIN = "finish the run with --resume", "publish the run again"
_STUDENT = tuple(field.name for field in fields(StudentConfig))


class _Config(BaseModel):
    options: dict[str, Any]
    student: dict[str, Any]


class _Method(BaseModel):
    content_sha256: Sha256
    accuracies: list[Finite] = Field(min_length=1)
    students_sha256: list[Sha256]


class _Publication(BaseModel):
    files: dict[Inside, File]
    methods: dict[Inside, _Method]
    seeds: Positive
    student: dict[Literal[*_STUDENT], Any]  # pyright: ignore[reportInvalidTypeForm]
    backend: BackendName
    engine_batch: Positive | None
    shapes_per_class: Positive
    validation_sha256: Sha256 | None
    machine: dict[str, Any] | None  # None for a run that went on elsewhere


def publish_run(options: TrainPublish, line: str) -> dict[str, Any]:
    """Write the publication, to a folder or the hub; returns its hash and accuracies, plain JSON.

    Raises ValueError or OSError, one clear line, for a run that is unfinished or was changed, a
    folder or repository that exists, a full disk, or what the hub refuses.
    """
    if (name := str(options.to)).startswith(HUB):
        return _publish_on_hub(options, line, name)
    run, to = options.run.expanduser(), options.to.expanduser()
    for name in (MARK, SUMMARY):
        if not (run / name).is_file():
            raise RunError(f"{run} has no {name}: give the folder of a finished run, or {RESUME}")
    summary = read_json(run / SUMMARY, RunError, RESUME, Summary)
    for method in options.method:
        if method not in summary["accuracy"]:
            known = ", ".join(summary["accuracy"])
            raise ValueError(f"--method {method}: expected one or several of {known}")
    if to.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--to {options.to} lies in the run itself: choose another --to")
    kind = ("a publication", MANIFEST, "patchbloom.published/")
    manifest.require_replaceable(to, options.overwrite, *kind, option="--to")
    for key in ("accuracy", "bytes"):
        summary[key] = {m: summary[key][m] for m in options.method or summary["accuracy"]}
    with Report() as report, RunFolder(run, report) as opened:
        coresets = {method: _coreset(run, method, summary) for method in summary["accuracy"]}
        content, teacher = _content(options, opened, coresets, summary, report)
        made = {"published": provenance(line, "cpu"), "run": summary["provenance"]}
        content["provenance"] = _without_folders(made)
        copied = [path for each in coresets.values() for path in each.folder.rglob("*")]
        needed = CARD_BYTES + sum(path.stat().st_size for path in (*copied, *teacher))
        with (
            full_disk_explained(to, needed, "choose a --to"),
            replacing(to, options.overwrite) as new,
        ):
            written = _write(new, run, content, coresets, teacher, summary)
    told = {key: written[key] for key in ("content_sha256", "methods")}
    return {"publication": str(to), **told}


def _publish_on_hub(options: TrainPublish, line: str, name: str) -> dict[str, Any]:
    before = published_before(name, options.overwrite)
    with TemporaryDirectory(prefix="publish-") as folder:
        to = Path(folder, "publication")
        told = publish_run(replace(options, to=to), line)
        content = read_json(to / MANIFEST, RunError, AGAIN)
        needed = ("data", "generator") if content["generator"] else ("data",)
        for kind in needed:
            if content["licences"][kind] == NOT_STATED:
                raise ValueError(f"--to {name} needs --{kind}-licence, for those who will use it")
        message = f"patchbloom: {', '.join(told['methods'])} of {told['content_sha256'][:16]}"
        commit = upload(to, name, before, private=options.private, message=message)
    pinned = f"{name}@{commit}"
    also = f"/coreset-{next(iter(told['methods']))}" if len(told["methods"]) > 1 else ""
    say(f'it opens with patchbloom.open("{pinned}{also}")')
    return told | {"publication": pinned}


def _coreset(run: Path, method: str, summary: dict[str, Any]) -> Coreset:
    """The coreset that the method's students learnt from, by its hash; every file is checked."""
    wanted = summary["content_sha256"][method]
    for path in sorted(run.glob(f"coreset*/{MANIFEST}")):
        if manifest.read_manifest(path.parent)["content_sha256"] == wanted:
            return open_coreset(path.parent)
    raise RunError(f"{run}: its coreset of {method}, sha256 {wanted[:16]}…, is gone: restore it")


def _content(
    options: TrainPublish,
    run: RunFolder,
    coresets: dict[str, Coreset],
    summary: dict[str, Any],
    report: Report,
) -> tuple[dict[str, Any], list[Path]]:
    """The manifest without files and provenance; the file of the teacher, if there is one."""
    stages = {name: _finished(run, name) for name in ("teacher", "report")}
    config = read_json(run.folder / CONFIG, RunError, RESUME, _Config)
    sessions = read_json(run.folder / ENVIRONMENT, RunError, RESUME, list[dict[str, Any]])
    machines = [_machine(session) for session in sessions]
    given, data = config["options"], {"name": options.data_name} if options.data_name else {}
    told = {key: value for key, value in stages["teacher"]["result"].items() if key != "losses"}
    path, recipe = _teacher(run.folder, given["teacher"], told, report)
    models = [coreset.manifest["model"] for coreset in coresets.values()]
    content = {
        "schema": SCHEMA,
        "data": summary["data"] | data,
        "validation_sha256": validation_sha256(run.folder),
        "licences": {"data": options.data_licence, "generator": options.generator_licence},
        "generator": next(filter(None, models), None),
        "teacher": {"file": TEACHER if path else None, **told, "recipe": recipe},
        "student": config["student"],
        **{name: given[name] for name in ("seeds", "engine_batch", "shapes_per_class")},
        "backend": summary["settings"]["backend"],
        "machine": machines[0] if all(each == machines[0] for each in machines) else None,
        "methods": {m: _method(run, m, coreset, config) for m, coreset in coresets.items()},
    }
    return content, [path] if path else []


def _finished(run: RunFolder, stage: str) -> dict[str, Any]:
    record = run.read(stage)
    if record is None or record["state"] != "done":
        raise RunError(f"{run.folder} is unfinished, its {stage} stage is not done: {RESUME}")
    return record


def _method(
    run: RunFolder, method: str, coreset: Coreset, config: dict[str, Any]
) -> dict[str, Any]:
    """Raises RunError for students that nobody can train again from the coreset."""
    stage, hard = _finished(run, f"student-{method}"), config["student"]["targets"] == "hard"
    if coreset.soft_labels() is None and not (hard and config["options"]["refresh"] == 1):
        raise RunError(
            f"{coreset.folder} holds no soft labels, and nobody can train its students again "
            "without: run with --labels record, or with --targets hard and without --refresh"
        )
    return {
        "content_sha256": coreset.content_sha256,
        "accuracies": stage["result"]["accuracies"],
        "students_sha256": _students_sha256(run.folder, stage),
    }


def _machine(made: dict[str, Any]) -> dict[str, Any]:
    """The part of a provenance that decides the bits of a training on a CPU."""
    named = {key: made.get(key) for key in ("device", "threads", "world_size")}
    return named | made.get("versions", {})


def _students_sha256(run: Path, stage: dict[str, Any]) -> list[str]:
    return [weights_sha256(read_tensors(run / path)[0]) for path in stage["outputs"]]


def _teacher(
    run: Path, given: str | None, told: dict[str, Any], report: Report
) -> tuple[Path | None, dict[str, Any] | None]:
    """The teacher's file and recipe; neither where it was given as anything but safetensors."""
    path = run / "teacher" / TEACHER
    if not path.is_file():
        path = Path(given or path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        report.say(f"teacher: not published, as {path} is no safetensors file here")
        return None, None
    tensors, metadata = read_tensors(path)
    if weights_sha256(tensors) != told["sha256"]:
        raise RunError(f"{path}: expected the run's teacher, sha256 {told['sha256'][:16]}…")
    return path, metadata.get("config")


def _write(
    new: Path,
    run: Path,
    content: dict[str, Any],
    coresets: dict[str, Coreset],
    teacher: list[Path],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Fill the folder `new`, the manifest last; returns the manifest."""
    for method, coreset in coresets.items():
        to, made = new / f"coreset-{method}", coreset.manifest["provenance"]
        for name in coreset.manifest["files"]:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(coreset.folder / name, to / name)
        _seal(to, coreset.manifest | {"provenance": _without_folders(made)})
        draw_coreset(new, coreset, f"coreset-{method}")
        if (shown := run / PICTURES / f"rendered-{method}.png").is_file():
            shutil.copyfile(shown, new / PICTURES / shown.name)
    for path in teacher:
        shutil.copyfile(path, new / TEACHER)
    write_card(new, content, summary)
    paths = sorted(path for path in new.rglob("*") if path.is_file())
    files = {path.relative_to(new).as_posix(): manifest.file_entry(path) for path in paths}
    return _seal(new, content | {"files": files})


def _seal(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    sealed = manifest.seal(content, content["provenance"])
    write_durably(folder / MANIFEST, manifest.spelled(sealed))
    return sealed


def _without_folders(value: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON in which an absolute path keeps its last name alone."""
    text = re.sub(r'"/(?:[^"/]+/)*(?=[^"/])', '"', json.dumps(value))
    text = re.sub(r"'[^'\"]*'", lambda quoted: _folders(r"[^'/]").sub("", quoted[0]), text)
    return json.loads(_folders(r"[^\s/]").sub("", text))


def _folders(letter: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.:/~])/(?:{letter}+/)*(?={letter})")


def check_publication(options: TrainCheck, line: str) -> dict[str, Any]:
    """Check the files, train again unless --files-only, and compare; returns plain JSON.

    Raises CoresetError for a file or an accuracy that does not agree, ValueError for data or
    options that cannot be used, and what `train_elsewhere` raises.
    """
    folder = options.folder.expanduser()
    published = _open(folder)
    result = {"publication": published["content_sha256"], "files": len(published["files"])}
    if options.files_only:
        return result
    if options.out and options.out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {options.out} lies in the publication: choose another --out")
    here = _machine(provenance(line, resolve_device(options.device)))
    changed = [key for key, *_ in differences(published["machine"] or {}, here)]
    asked = ("backend", "engine_batch", "precision", "vae_precision")
    changed += [f"--{name}" for name in asked if getattr(options, name) is not None]
    kept = nullcontext(options.out) if options.out else TemporaryDirectory(prefix="check-")
    with Report() as report, kept as out:
        if changed:
            report.say(f"the bits may differ, as these do: {', '.join(changed)}")
        for method, told in published["methods"].items():
            student, config = _student(folder, method, published, options, Path(out))
            train_elsewhere(student, line, config, published["validation_sha256"])
            exact = not changed and config.device == "cpu"
            result[method] = _compare(told, student.out, exact)
            report.say(f"{method}: {result[method]['told']}")
    for method in published["methods"]:
        if result[method]["agrees"] is False:
            raise CoresetError(f"{folder}: {method} does not agree: {result[method]['told']}")
    return result


def _open(folder: Path) -> dict[str, Any]:
    """The manifest. Raises CoresetError, which names the first file that is not as published."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CoresetError(f"{folder} has no {MANIFEST}: give what `train publish` wrote")
    published = manifest.read_sealed(path, (SCHEMA,), _Publication, "publication")
    check_fields(published["student"], StudentConfig, f"{path}, student", CoresetError, AGAIN)
    manifest.check_files(folder, published, "publication")
    for method, told in published["methods"].items():
        found = open_coreset(folder / f"coreset-{method}", verify=False).content_sha256
        if found != told["content_sha256"]:
            expected = f"coreset-{method} with content sha256 {told['content_sha256'][:16]}…"
            raise CoresetError(f"{path}: expected {expected}, found {found[:16]}…: {AGAIN}")
    return published


def _student(
    folder: Path, method: str, published: dict[str, Any], options: TrainCheck, out: Path
) -> tuple[StudentElsewhere, StudentConfig]:
    """A training from the coreset. Another kind of device keeps to its own engines."""
    recipe = asdict(StudentConfig()) | published["student"]
    device = resolve_device(options.device)
    render = {field.name: getattr(options, field.name) for field in fields(RenderOptions)}
    backend, compiled = options.backend or "auto", False
    if device == recipe["device"]:
        render["engine_batch"] = options.engine_batch or published["engine_batch"]
        backend, compiled = options.backend or published["backend"], recipe["compile"]
    changed = {"device": device, "compile": compiled, "crop_scale": tuple(recipe["crop_scale"])}
    student = StudentElsewhere(
        coreset=folder / f"coreset-{method}",
        out=out / method,
        data=options.data,
        where=options.where,
        shapes_per_class=published["shapes_per_class"],
        seeds=published["seeds"],
        backend=backend,
        **render,
    )
    return student, StudentConfig(**recipe | changed)


def _compare(told: dict[str, Any], run: Path, exact: bool) -> dict[str, Any]:
    """Accuracies in percent of a method, whether they agree, and a line that says so."""
    stage = read_json(run / STAGES / f"{STAGE}.json", RunError, "remove it")
    now, then = stage["result"]["accuracies"], told["accuracies"]
    equal = _students_sha256(run, stage) == told["students_sha256"] and now == then
    agrees, reason = within_chance(now, then)
    if equal or exact:
        agrees, reason = equal, "equal bit for bit"
    if not agrees and exact:
        reason = "expected equal bits, as the CPU, its threads and all versions are those published"
    said = f"{_plus_minus(now)} % now, {_plus_minus(then)} % published: {reason}"
    return {"published": then, "now": now, "bit_for_bit": equal, "agrees": agrees, "told": said}


def within_chance(now: list[float], then: list[float]) -> tuple[bool | None, str]:
    """Whether the means agree by the rule above, and why; None for a single student."""
    if min(len(now), len(then)) < 2:
        return None, "a single student has no ±, and is not judged"
    difference = statistics.fmean(now) - statistics.fmean(then)
    error = math.sqrt(sum(statistics.variance(each) / len(each) for each in (now, then)))
    allowed = error * _student_quantile(0.995, len(now) + len(then) - 2)
    told = f"difference {difference:+.2f}, chance explains {allowed:.2f}"
    return abs(difference) <= allowed, told


def _student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, within 5 % from two degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**k for k, term in enumerate(terms, 1))


def _plus_minus(accuracies: list[float]) -> str:
    return " ± ".join(f"{value:.2f}" for value in mean_and_std(accuracies) if value is not None)
