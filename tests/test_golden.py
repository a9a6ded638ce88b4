"""Compares output with an earlier version's, and reads that version's files.

tests/golden holds JSON files, which golden_cases.py recomputes, and archives of runs and of an
engine, which golden_fixtures.py wrote once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Command
from golden_cases import (
    RUNS,
    SMALL,
    STOPPED,
    contents,
    coresets,
    describes,
    engines,
    frozen,
    prior,
    run_all,
    run_of,
    stages,
    students_elsewhere,
    told_scalars,
    unpack,
)
from patchbloom.engine.builds.catalogue import spec_of
from patchbloom.export.bundle import Bundle, BundleError, find_or_build, open_bundle
from patchbloom.export.engines import engine_key, verify_engine
from patchbloom.export.models import find_model, load_parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden run, run again."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all()
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden runs in the current folder."""
    unpack("runs", tmp_path)
    monkeypatch.chdir(tmp_path)


YOUNGER = {
    *("by_class", "class_accuracies", "class_names", "compute", "curve", "curves"),
    *("evaluate_every", "precision", "teacher_precision"),
}


def plain(value: Any) -> Any:
    """`value` as read back from JSON."""
    return json.loads(json.dumps(value))


def as_before(now: Any, before: Any) -> Any:
    """`now` without the entries that are younger than the golden files."""
    if isinstance(now, list):
        return [each for each in now if not str(each).startswith("The teacher names ")]
    if not (isinstance(now, dict) and isinstance(before, dict)):
        return now
    kept = {key: value for key, value in now.items() if key in before or key not in YOUNGER}
    return {key: as_before(value, before.get(key)) for key, value in kept.items()}


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("describes", describes),
        ("stages", stages),
        ("prior", prior),
        ("elsewhere", students_elsewhere),
        ("engines", engines),
    ],
)
def test_what_is_said_is_what_was_said(name: str, compute: Callable[[], Any]) -> None:
    now = plain(compute())
    if name == "prior":
        younger = {"vae_factor": 4, "latent_channels": 8, "patch_factor": 2, "parts": 4}
        assert {key: now.pop(key, None) for key in younger} == younger
    assert as_before(now, frozen(name)) == frozen(name)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_what_it_wrote(made: Path, name: str) -> None:
    now, before = plain(run_of(made / name)), frozen("runs")[name]
    younger = {f"pictures/gallery.{ending}" for ending in ("json", "webp")}
    now["contents"].pop("pictures/gallery.json", None)
    assert [each for each in now["names"] if each not in younger] == before["names"]
    assert now["scalars"] == before["scalars"]
    for file, content in before["contents"].items():
        assert as_before(now["contents"][file], content) == content, file
    assert now["contents"].keys() == before["contents"].keys()


@pytest.mark.usefixtures("runs")
def test_the_golden_runs_are_those_of_the_golden_files() -> None:
    for name in RUNS:
        assert plain(contents(Path(name))) == frozen("runs")[name]["contents"]


def test_coresets_hold_what_they_held() -> None:
    """Output of `engine coreset`, and labels as students and a loader read them."""
    now, before = coresets(), frozen("coresets")
    for name, said in before.items():
        stored, read = said.pop("probabilities", []), now[name].pop("probabilities", [])
        torch.testing.assert_close(torch.tensor(read), torch.tensor(stored), atol=1e-6, rtol=0)
    assert plain(now) == before


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_taken_over(train: Command, name: str) -> None:
    files = {path: path.read_bytes() for path in Path(name, "stages").iterdir()}
    told = train(*SMALL, "--out", name, *RUNS[name], "--resume")
    assert told.result["run"] == name
    for path, before in files.items():
        assert f"{path.stem}: done before" in told.err
        assert path.read_bytes() == before
    assert sorted(Path(name, "stages").iterdir()) == sorted(files)


@pytest.mark.usefixtures("runs")
def test_stopped_students_go_on_from_their_checkpoint(train: Command) -> None:
    (checkpoint,) = contents(Path("stopped/students")).keys() - {"upsample.labels.partial.json"}
    assert checkpoint == "upsample.checkpoint-000000.safetensors"
    told = train(*SMALL, "--out", "stopped", *STOPPED["stopped"], "--resume")
    assert told.result["accuracy"].keys() == {"upsample"}
    assert [step for tag, step in told_scalars(Path("stopped")) if tag == "upsample/loss"] == [4, 5]
    stage = json.loads(Path("stopped/stages/student-upsample.json").read_bytes())
    assert stage["resumed"]
    first = [losses[:2] for losses in stage["result"]["losses"]]
    assert first == [
        [0.001102579136689504, 0.002385785182317098],
        [0.0014320264259974163, 0.0018779660264650981],
    ]
    assert [path.suffix for path in Path("stopped/students").iterdir()] == [".safetensors"] * 2


@pytest.mark.usefixtures("runs")
def test_a_stopped_teacher_goes_on_from_its_checkpoint(train: Command) -> None:
    out = Path("stopped-teacher")
    told = train(*SMALL, "--out", out, *STOPPED["stopped-teacher"], "--resume")
    assert told.result["accuracy"].keys() == {"random"}
    assert [step for tag, step in told_scalars(out) if tag == "teacher/loss"] == [1, 2]
    assert [path.name for path in (out / "teacher").iterdir()] == ["teacher.safetensors"]


@pytest.fixture
def engine(tmp_path: Path) -> Bundle:
    """The golden engine in bundles/, beside its model."""
    unpack("engine", tmp_path)
    (folder,) = (tmp_path / "bundles").iterdir()
    return open_bundle(folder)


def _key_here(engine: Bundle) -> dict[str, Any]:
    """The engine's key computed here, with the code hash and library versions of its build."""
    model = find_model(engine.folder.parent.parent / "model")
    key = engine_key("ort", model, spec_of(engine.key), tokens=77)
    return {**key, **{name: engine.key[name] for name in ("exporter_sha256", "libraries")}}


def test_the_engine_is_found_by_its_key_and_is_still_right(engine: Bundle) -> None:
    def build(folder: Path) -> dict[str, Any]:
        raise AssertionError(f"built again in {folder}")

    key = _key_here(engine)
    assert key == engine.key
    found = find_or_build(engine.folder.parent, key, build)
    assert not found.built
    model, spec = find_model(engine.folder.parent.parent / "model"), spec_of(key)
    parts = load_parts(
        model, precision=spec.precision, vae_precision=spec.vae_precision, device=spec.device
    )
    assert verify_engine(found, parts, spec).keys() == engine.manifest["report"]["parity"].keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [("exporter_sha256", "0"), ("batch", 4), ("opset", 23), ("gpu", "NVIDIA H200")],
)
def test_the_engine_of_another_key_is_refused(engine: Bundle, field: str, value: Any) -> None:
    with pytest.raises(BundleError, match=f"was built for {field}"):
        open_bundle(engine.folder, {**_key_here(engine), field: value})


def test_a_changed_engine_is_refused(engine: Bundle) -> None:
    shutil.copy(engine.folder / "encoder.onnx", engine.folder / "decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx has"):
        open_bundle(engine.folder)
