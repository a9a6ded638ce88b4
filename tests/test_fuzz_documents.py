"""Documents with hostile content and the right hashes: read, or refused in our own words."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_cases import EXAMPLES, changed, nothing_else_opened, seeded
from golden_cases import unpack
from hypothesis import given
from hypothesis import strategies as st
from patchbloom.engine.builds.catalogue import engine_info, list_engines
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.manifest import MANIFEST, seal
from patchbloom.engine.coreset.shown import describe_views, stored_images
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.expand.naming import expand_config, named_model, prompts_of
from patchbloom.export.bundle import BundleError, open_bundle
from patchbloom.export.durable import json_sha256
from patchbloom.train.commands.prior import SETTINGS, WORK
from patchbloom.train.commands.prior import check_out as check_prior
from patchbloom.train.labels.targets import OnlineLabels
from patchbloom.train.methods.registry import method_of
from patchbloom.train.options import TrainCompare, TrainPrior
from patchbloom.train.prior.loop import Phase
from patchbloom.train.report.comparison import compare_runs
from patchbloom.train.report.page import SUMMARY, ReportError, write_report
from patchbloom.train.run.checkpoint import (
    CheckpointError,
    Checkpoints,
    read_tensors,
    write_tensors,
)
from patchbloom.train.run.folder import RunError, RunFolder, StageResult
from patchbloom.train.run.progress import Report
from patchbloom.train.run.world import ALONE
from patchbloom.train.students.from_manifest import student_config, view_config
from patchbloom.train.students.lockstep import Lockstep
from patchbloom.train.students.student import Student
from patchbloom.train.teacher.given import load_teacher
from student_cases import CONFIG

IDS = ("bars", "disc", "triangle")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    unpack("runs", folder)
    return folder


def written(path: Path, document: Any) -> None:
    """Sorted as manifests are; keys that JSON cannot sort or spell are left as they come."""
    path.write_bytes((json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii"))


def sealed(manifest: Any) -> Any:
    """With the hashes of its content, where it still has the shape to have any."""
    with suppress(AttributeError, TypeError, KeyError, ValueError):
        return seal(manifest, manifest.get("provenance"))
    return manifest


def read_coreset(folder: Path) -> None:
    coreset = open_coreset(folder)
    labels = coreset.soft_labels()
    assert len(coreset.patches()) == len(coreset.labels_N)
    coreset.doped()
    coreset.bytes()
    describe_views(coreset)
    if labels is not None:
        labels.recognised(0)
    for _ in stored_images(coreset, labels):
        pass
    method_of(coreset)
    if coreset.manifest["model"] is not None:
        named = named_model(coreset)
        prompts_of(coreset)
        expand_config(named, size_px=32, seed=0)
    if labels is not None:
        with suppress(ValueError):  # of a config whose fields contradict each other
            view_config(coreset, device="cpu")
            student_config(coreset, device="cpu")


@EXAMPLES
@pytest.mark.parametrize("name", ["pca/coreset", "topk/coreset", "all/coreset-doped"])
def test_manifests_of_coresets(runs: Path, tmp_path: Path, name: str, examples: int | None) -> None:
    folder = Path(shutil.copytree(runs / name, tmp_path / "coreset"))
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((folder / MANIFEST).read_bytes())

    @seeded(examples, 100)
    @given(changed(manifest))
    def hold(document: Any) -> None:
        written(folder / MANIFEST, sealed(document))
        with nothing_else_opened(folder), suppress(CoresetError):
            read_coreset(folder)

    hold()


@EXAMPLES
def test_manifests_of_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int | None
) -> None:
    unpack("engine", tmp_path)
    bundles = tmp_path / "bundles"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundles / "cache"))  # hashes.json may be opened
    (folder,) = bundles.iterdir()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    shutil.copytree(folder, bundles / folder.name.replace("32px", "64px"))
    list_engines(bundles)

    @seeded(examples, 100)
    @given(changed(manifest))
    def hold(document: Any) -> None:
        with suppress(AttributeError, KeyError, ValueError):
            document.pop("content_sha256")
            document["content_sha256"] = json_sha256(document)
        written(folder / MANIFEST, document)
        with nothing_else_opened(bundles):
            rows = {row["engine"]: row for row in list_engines(bundles)["engines"]}
            for read in (lambda: open_bundle(folder), lambda: engine_info(bundles, folder.name)):
                with suppress(BundleError):
                    read()
        assert len(rows) == 2
        assert "damaged" not in rows[folder.name.replace("32px", "64px")]

    hold()


@EXAMPLES
@pytest.mark.parametrize("stage", ["teacher", "coreset", "student-dace", "report"])
def test_stages_of_runs(runs: Path, tmp_path: Path, stage: str, examples: int | None) -> None:
    out = Path(shutil.copytree(runs / "dense", tmp_path / "run"))
    (tmp_path / "secret").write_text("secret")
    path = out / "stages" / f"{stage}.json"
    record = json.loads(path.read_bytes())
    others = len(list(path.parent.iterdir())) - 1

    @seeded(examples, 30)
    @given(changed(record))
    def hold(document: Any) -> None:
        written(path, document)
        with (
            nothing_else_opened(out),
            Report() as report,
            RunFolder(out, report) as run,
        ):
            assert len(run.seconds()) >= others
            with suppress(RunError):
                run.stage(stage, record["config"], lambda: StageResult({}), again=True)
        path.unlink()

    hold()


@EXAMPLES
def test_summaries(runs: Path, tmp_path: Path, examples: int | None) -> None:
    out = Path(shutil.copytree(runs / "dense", tmp_path / "run"))
    (tmp_path / "secret").write_text("secret")
    summary = json.loads((out / SUMMARY).read_bytes())

    @seeded(examples, 60)
    @given(changed(summary))
    def hold(document: Any) -> None:
        written(out / SUMMARY, document)
        with nothing_else_opened(out), suppress(ReportError):
            write_report(out)
        with suppress(ReportError):
            compare_runs(TrainCompare(runs=(out, runs / "pca"), out=tmp_path / "page.html"))

    hold()


@EXAMPLES
def test_metadata_of_teachers(runs: Path, tmp_path: Path, examples: int | None) -> None:
    tensors, metadata = read_tensors(runs / "dense/teacher/teacher.safetensors")
    path = tmp_path / "teacher.safetensors"

    @seeded(examples, 60)
    @given(changed(metadata))
    def hold(document: Any) -> None:
        write_tensors(path, tensors, document)
        with nothing_else_opened(tmp_path), suppress(CheckpointError):
            logits_NK = load_teacher(str(path), IDS, device="cpu").logits(torch.zeros(1, 3, 32, 32))
            assert logits_NK.shape == (1, len(IDS))

    hold()


@EXAMPLES
def test_checkpoints_of_students(tmp_path: Path, examples: int | None) -> None:
    config, identity = replace(CONFIG, network="convnet-d3-w4"), {"seeds": [0]}
    state, reached = Student(0, config, 10, torch.device("cpu")).state()
    checkpoints = Checkpoints(tmp_path, "student", 2)

    class Source:
        class_ids, samples = tuple("abcdefghij"), 40

    @seeded(examples, 60)
    @given(changed({"config": identity, "students": {"0": reached}}), changed_tensors(state))
    def hold(document: Any, tensors: dict[str, torch.Tensor]) -> None:
        checkpoints.remove()
        write_tensors(tmp_path / "student.checkpoint-000000.safetensors", tensors, document)
        source: Any = Source()
        with nothing_else_opened(tmp_path), suppress(CheckpointError), Report() as report:
            Lockstep(source, OnlineLabels, config, [0], checkpoints, identity, report, ALONE)  # pyright: ignore

    hold()


@EXAMPLES
def test_checkpoints_of_priors(tmp_path: Path, examples: int | None) -> None:
    path = tmp_path / "vae.safetensors"

    def new_phase() -> Phase[torch.nn.Linear]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Phase("vae", torch.nn.Linear(3, 2), 2, 1e-3, path)

    def go_on() -> None:
        def loss_of(module: torch.nn.Linear, generator: torch.Generator) -> torch.Tensor:
            return module(torch.rand(4, 3, generator=generator)).square().mean()

        new_phase().run(loss_of, seed=0, report=lambda line: None)

    go_on()
    state, reached = read_tensors(path)

    @seeded(examples, 100)
    @given(changed({**reached, "step": 1}), changed_tensors(state))
    def hold(document: Any, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(path, tensors, document)
        with nothing_else_opened(tmp_path), suppress(CheckpointError):
            go_on()

    hold()


@EXAMPLES
def test_settings_of_priors(tmp_path: Path, examples: int | None) -> None:
    command = TrainPrior(data="nowhere", out=tmp_path / "model", resume=True)
    settings = {**command.prior.as_dict(), "data": "0" * 64, "classes": list(IDS)}
    path = command.out / WORK / SETTINGS
    path.parent.mkdir(parents=True)

    @seeded(examples, 60)
    @given(changed(settings))
    def hold(document: Any) -> None:
        written(path, document)
        with nothing_else_opened(tmp_path), suppress(RunError):
            check_prior(command, settings)

    hold()


@st.composite
def changed_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, in one of two cases with one of them removed, renamed or of another shape."""
    tensors, name = dict(tensors), draw(st.sampled_from(sorted(tensors)))
    match draw(st.sampled_from(["", "", "", "remove", "rename", "reshape", "retype", "empty"])):
        case "remove":
            del tensors[name]
        case "rename":
            tensors[draw(st.sampled_from(["x", "0.opt.x.y", "0.opt.99.step", "0.net."]))] = (
                tensors.pop(name)
            )
        case "reshape":
            tensors[name] = tensors[name].unsqueeze(0)
        case "retype":
            tensors[name] = tensors[name].to(torch.int16)
        case "empty":
            tensors[name] = torch.empty(0)
    return tensors
