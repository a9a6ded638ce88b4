"""Guards documents that are damaged, or sealed with wrong content: refused by name, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Command
from golden_cases import unpack
from patchbloom.engine.builds.catalogue import list_engines
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.manifest import MANIFEST, seal, spelled
from patchbloom.engine.data.names import display_names
from patchbloom.engine.errors import CoresetError
from patchbloom.export.bundle import BundleError, read_manifest
from patchbloom.export.documents import MOST_NESTED, parse_json
from patchbloom.export.durable import json_sha256
from patchbloom.train.report.page import SUMMARY, ReportError, write_report
from patchbloom.train.run.checkpoint import CheckpointError, read_tensors, write_tensors
from patchbloom.train.run.folder import RunError, RunFolder
from patchbloom.train.run.progress import Report
from patchbloom.train.teacher.given import load_teacher

DAMAGES = {
    "cut short": b'{"a": ',
    "deep": b"[" * 10**5,
    "deep but parsed": b'{"a":' * 200 + b"1" + b"}" * 200,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "NaN": b'{"a": NaN}',
    "beyond a float": b'{"a": 1e999}',
    "too many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list": b"[1, 2]",
    "null": b"null",
    "empty object": b"{}",
}
damaged = pytest.mark.parametrize("damage", DAMAGES)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and an engine; tests copy what they change."""
    folder = tmp_path_factory.mktemp("golden")
    for name in ("runs", "engine"):
        unpack(name, folder / name)
    return folder


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "runs" / "topk", tmp_path / "run"))


@pytest.fixture
def bundles(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "engine" / "bundles", tmp_path / "bundles"))


def refused(error: type[Exception], path: Path, read: Callable[[], Any]) -> str:
    """The one line in which `read` refuses `path`."""
    with pytest.raises(error) as caught:
        read()
    told = str(caught.value)
    assert str(path) in told
    assert "\n" not in told
    assert len(told) < 1000
    return told


@damaged
def test_a_damaged_manifest_of_a_coreset(run: Path, damage: str) -> None:
    path = run / "coreset" / MANIFEST
    path.write_bytes(DAMAGES[damage])
    refused(CoresetError, path, lambda: open_coreset(path.parent))


@damaged
def test_a_damaged_manifest_of_an_engine(bundles: Path, damage: str) -> None:
    (folder,) = bundles.iterdir()
    (folder / MANIFEST).write_bytes(DAMAGES[damage])
    refused(BundleError, folder / MANIFEST, lambda: read_manifest(folder))


@damaged
def test_a_damaged_file_of_a_stage(run: Path, damage: str) -> None:
    path = run / "stages" / "teacher.json"
    path.write_bytes(DAMAGES[damage])
    said: list[str] = []
    with Report() as report, RunFolder(run, report) as folder:
        report.say = said.append
        refused(RunError, path, lambda: folder.read("teacher"))
        assert folder.seconds().keys() == {"coreset", "student-upsample", "report"}
    assert len(said) == 1
    assert said[0].startswith(f"damaged: {path}")


@damaged
def test_a_damaged_summary(run: Path, damage: str) -> None:
    (run / SUMMARY).write_bytes(DAMAGES[damage])
    refused(ReportError, run / SUMMARY, lambda: write_report(run))


@damaged
def test_damaged_metadata_of_a_teacher(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "teacher.safetensors"
    metadata = {"patchbloom": DAMAGES[damage].decode("utf-8", "replace")}
    if damage == "no UTF-8":
        metadata["patchbloom"] = "\ufffd"
    save_file({"a": torch.zeros(1)}, path, metadata)
    refused(CheckpointError, path, lambda: load_teacher(str(path), "abc"))


@damaged
def test_a_damaged_file_of_names(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "names.json"
    path.write_bytes(DAMAGES[damage])
    refused(ValueError, path, lambda: display_names("abc", path))


def test_null_sessions_are_named(golden: Path, tmp_path: Path, train: Command, monkeypatch) -> None:
    from golden_cases import RUNS, SMALL

    shutil.copytree(golden / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    Path("topk/environment.json").write_text("null")
    told = train(*SMALL, "--out", "topk", *RUNS["topk"], "--resume").error
    assert "topk/environment.json: expected a valid list, found None: remove it" in told


SETTINGS, LABELLED = ("settings",), ("labels",)


@pytest.mark.parametrize(
    ("way", "value", "told"),
    [
        (("files", "patches/bars/000000.png"), None, "files.patches/bars/000000.png"),
        (("files", "patches/bars/000000.png", "bytes"), -1, "bytes"),
        (("files", "patches/bars/000000.png", "sha256"), 7, "sha256"),
        (("classes",), [], "classes"),
        (("classes", 1, "name"), None, "classes.1.name"),
        (("classes", 1, "name"), "half a character: \ud800", "classes.1.name"),
        (("classes", 1, "id"), 3, "classes.1.id"),
        (("classes", 1, "index"), 0, "expected the indices 0, 1, 2"),
        (("classes", 1, "patches"), 3, "expected 4 patches"),
        (("classes", 1, "patches"), 10**12, "expected 4 patches"),
        ((*SETTINGS, "ipc"), 10**12, "patches"),
        ((*SETTINGS, "seed"), -1, "settings.seed"),
        ((*SETTINGS, "patch_px"), 10**9, "settings.patch_px"),
        ((*SETTINGS, "method"), None, "settings.method"),
        (SETTINGS, [], "settings"),
        (("model",), [1], "model"),
        (("model",), {"weights_bytes": "many"}, "model.weights_bytes"),
        (("model",), {"prompt": "\udfff"}, "model.prompt"),
        (("model",), {"prompts": {"a": "\udfff"}}, "model.prompts.a"),
        (("teacher",), "one", "teacher"),
        ((*LABELLED, "epochs"), 0, "epochs"),
        ((*LABELLED, "epochs"), True, "epochs"),
        ((*LABELLED, "classes"), 4, "expected 3 classes"),
        ((*LABELLED, "temperature"), 0, "temperature"),
        ((*LABELLED, "codec"), "zip", "'zip'"),
        ((*LABELLED, "k"), None, "k"),
        ((*LABELLED, "settings"), None, "settings"),
        ((*LABELLED, "settings", "views"), {"cutmix": True}, "the pool that CutMix"),
        ((*LABELLED, "settings", "student"), {}, "student.batch"),
        (("provenance",), 1, "provenance"),
    ],
)
def test_a_sealed_manifest_of_wrong_content(
    run: Path, way: tuple[Any, ...], value: Any, told: str
) -> None:
    path = run / "coreset" / MANIFEST
    document = holder = json.loads(path.read_bytes())
    for step in way[:-1]:
        holder = holder[step]
    holder[way[-1]] = value
    path.write_bytes(spelled(seal(document, document["provenance"])))
    assert told in refused(CoresetError, path, lambda: open_coreset(path.parent, verify=False))


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", None), ("images_per_prompt", 0), ("batch", "4"), ("libraries", []), ("gpu", 3)],
)
def test_an_engine_with_a_wrong_key_is_listed_as_damaged(
    bundles: Path, field: str, value: Any
) -> None:
    (whole,) = bundles.iterdir()
    folder = Path(shutil.copytree(whole, bundles / whole.name.replace("32px", "64px")))
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["content_sha256"]
    manifest["key"][field] = value
    manifest["content_sha256"] = json_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(BundleError, folder / MANIFEST, lambda: read_manifest(folder))
    other, wrong = list_engines(bundles)["engines"]
    assert "damaged" not in other
    assert f"key.{field}: " in wrong["damaged"]


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd"])
def test_an_output_outside_the_run_is_not_opened(run: Path, outside: str) -> None:
    path = run / "stages" / "coreset.json"
    record = json.loads(path.read_bytes())
    record["outputs"] = {outside: "0" * 64}
    path.write_text(json.dumps(record))
    with Report() as report, RunFolder(run, report) as folder:
        told = refused(RunError, path, lambda: folder.read("coreset"))
    assert "expected a path inside the folder" in told


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("architecture", "convnet-d3-w99999", "do not fit the network"),
        ("architecture", "no such", "is unknown"),
        ("size_px", 10**6, "size_px"),
        ("normalisation", {"mean": [0.5] * 3, "std": [0.2, 0.0, 0.2]}, "std.1"),
        ("normalisation", {"mean": [0.5] * 2, "std": [0.2] * 3}, "mean"),
        ("accuracy", "good", "accuracy"),
        ("class_ids", None, "class_ids"),
    ],
)
def test_a_teacher_with_wrong_metadata(run: Path, field: str, value: Any, told: str) -> None:
    path = run / "teacher" / "teacher.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, field: value})
    ids = ("bars", "disc", "triangle")
    assert told in refused(CheckpointError, path, lambda: load_teacher(str(path), ids))


def test_a_checkpoint_without_students(
    golden: Path, tmp_path: Path, train: Command, monkeypatch
) -> None:
    from golden_cases import SMALL, STOPPED

    shutil.copytree(golden / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    (path,) = Path("stopped/students").glob("*.checkpoint-*.safetensors")
    tensors, metadata = read_tensors(path)
    del metadata["students"]
    write_tensors(path, tensors, metadata)
    told = train(*SMALL, "--out", "stopped", *STOPPED["stopped"], "--resume").error
    assert f"{path}: expected students, found none: it is not a patchbloom checkpoint" in told


def test_a_document_may_be_nested_as_deep_as_is_allowed() -> None:
    deep = b"[" * MOST_NESTED + b"1" + b"]" * MOST_NESTED
    assert parse_json(deep, "deep", ValueError, "") == json.loads(deep)
    with pytest.raises(ValueError, match="deep is not valid JSON"):
        parse_json(b"[" + deep + b"]", "deep", ValueError, "")
