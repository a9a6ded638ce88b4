"""`engine` on the command line: build, verify, list, remove; one line per error."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import unpack
from patchbloom.engine import cli
from patchbloom.engine import options as commands
from patchbloom.engine.builds import doctor
from patchbloom.engine.builds.build import _plan as plan_build
from patchbloom.engine.builds.needs import check_room, engine_needs
from patchbloom.engine.expand import backends
from patchbloom.export import parity, to_ort
from patchbloom.export.bundle_key import bundle_name
from patchbloom.export.config import EngineSpec
from patchbloom.export.graphs import Graph
from patchbloom.export.models import Unavailable, find_model
from patchbloom.train.config import RECIPES
from patchbloom.train.prior.model import new_parts, save_parts
from safetensors.torch import load_file, save_file

BUILD = ("--backend", "ort", "--device", "cpu", "--batch", "4", "--images-per-prompt", "2")


@dataclass
class Outcome:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout; the command must have succeeded."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The last line of stderr, which must be the only error line."""
        assert self.code == 2, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("engine: error: ")]
        assert [self.err.splitlines()[-1]] == lines
        return lines[0]


@pytest.fixture
def engine(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Runs one command on this test's own engines."""

    def run(command: str, *arguments: str) -> Outcome:
        capfd.readouterr()
        code = cli.main([command, *arguments, "--bundles", str(tmp_path / "bundles")])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(autouse=True)
def exported_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph is exported once in this file, which takes most of a build, and copied later."""
    export = to_ort.export_graph

    def export_or_copy(graph: Graph, folder: Path, spec: EngineSpec) -> None:
        weights = sum(float(each.double().abs().sum()) for each in graph.module.parameters())
        kept = EXPORTED.get((graph.name, spec, weights))
        if kept is None:
            export(graph, folder, spec)
            kept = EXPORTED[graph.name, spec, weights] = tmp_path_factory.mktemp("exported")
            shutil.copy(folder / f"{graph.name}.onnx", kept)
        shutil.copy(kept / f"{graph.name}.onnx", folder)

    monkeypatch.setattr(to_ort, "export_graph", export_or_copy)


EXPORTED: dict[tuple[str, EngineSpec, float], Path] = {}


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    parts = new_parts(32, folder / "spelling", unet_channels=(16, 32, 64), vae_channels=(8, 16, 32))
    save_parts(parts, folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 px; tests only read it."""
    folder = tmp_path_factory.mktemp("engines") / "small"
    save_model(folder)
    return folder


def build(engine: Callable[..., Outcome], model: Path, *arguments: str) -> Outcome:
    return engine("build", "--model", str(model), *BUILD, *arguments)


def stored(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "bundles").iterdir())


OPTIONS = {
    commands.EngineBuild: [
        *("model", "backend", "size", "batch", "min_batch", "images_per_prompt"),
        *(
            "precision",
            "vae_precision",
            "calibrate",
            "opset",
            "device",
            "trt_library",
            "targets",
            "weights",
        ),
        *("export_only", "verify", "keep_refused", "bundles", "json"),
    ],
    commands.EngineVerify: ["names", "bundles", "json"],
    commands.EngineList: ["bundles", "json"],
    commands.EngineInfo: ["name", "bundles", "json"],
    commands.EngineRemove: ["names", "all", "bundles", "json"],
    commands.EngineDoctor: ["bundles", "json"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_stable(command: Any):
    assert [field.name for field in fields(command)] == OPTIONS[command]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("buidl", "unrecognized: buidl. Perhaps you meant: build"),
        ("coreset inf X", "unrecognized: inf X. Perhaps you meant: coreset info"),
        ("corset info X", "unrecognized: corset. Perhaps you meant: coreset info"),
        ("paint", "unrecognized: paint. Commands: build, verify,"),
        ("build --batchs 2", "unrecognized: --batchs 2. Perhaps you meant: --batch"),
        ("build --batch", "--batch INT: the value is missing"),
        ("build --size two", "--size: expected INT, got 'two'"),
        ("build --backend onnx", "invalid choice 'onnx' for argument '--backend': expected auto, "),
        ("build --batch 0", "--batch 0: expected 1 or more"),
        ("coreset export X", "engine coreset export needs --to {imagefolder,webdataset,parquet,"),
        ("info", "engine info needs NAME: Name of an engine"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, told: str
):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"engine: error: {told}")
    assert line.endswith("--help)")


def test_help_is_quick():
    script = (
        "import sys; from patchbloom.engine import cli\n"
        "try: cli.main(['build', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--images-per-prompt" in done.stdout


def test_from_build_to_remove(
    engine: Callable[..., Outcome],
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    first = build(engine, model)
    name = first.json["engine"]
    assert first.json["built"]
    assert first.json["size_px"] == 32
    assert first.json["precision"] == "fp32"
    assert set(first.json["parity"]) == {"encoder", "denoiser", "decoder"}
    assert "PSNR" in first.out
    assert stored(tmp_path) == [name]

    again = build(engine, model)
    assert not again.json["built"]
    assert "already built" in again.out

    verified = engine("verify", name[:12])
    (result,) = verified.json["verified"]
    assert result["engine"] == name
    assert result["parity"]["decoder"]["max_abs"] <= 1e-4
    assert result["parity"]["decoder"]["psnr_db"] > 80
    assert engine("verify").json == engine("verify", "all").json == verified.json

    listed = engine("list")
    (row,) = listed.json["engines"]
    assert (row["engine"], row["batch"], row["misfit"]) == (name, "2x2", [])
    assert row["bytes"] > first.json["bytes"] > 1e5
    assert f"{name}" in listed.out
    assert "1 engine, " in listed.out
    assert len(engine("list", "--json").out.splitlines()) == 1

    info = engine("info", name).json
    assert info["misfit"] == []
    assert info["command"].startswith("engine build --model ")
    assert f"--bundles {tmp_path / 'bundles'}" in info["command"]
    assert cli.main(shlex.split(info["command"])[1:]) == 0
    rebuilt = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (rebuilt["engine"], rebuilt["built"]) == (name, False)
    assert f"`{info['command']}`" in first.err

    removed = engine("remove", name)
    assert removed.json["removed"] == [name]
    assert removed.json["freed_bytes"] == row["bytes"]
    assert stored(tmp_path) == []
    assert engine("list").json["engines"] == []
    assert engine("verify").json["verified"] == []


def test_what_is_not_there_is_named(engine: Callable[..., Outcome], model: Path):
    for command in ("verify", "info", "remove"):
        assert "no engine in" in engine(command, "sdxl").error
    assert "--all" in engine("remove").error
    name = build(engine, model).json["engine"]
    assert f"there is: {name}" in engine("info", "other").error
    assert "not both" in engine("remove", name, "--all").error


def test_graphs_alone(engine: Callable[..., Outcome], model: Path):
    """fp16, as for a GPU; no graph is run and no engine is built."""
    built = build(engine, model, "--export-only")
    assert (built.json["backend"], built.json["precision"]) == ("onnx", "fp16")
    assert "nothing was run" in built.out
    (verified,) = engine("verify").json["verified"]
    assert verified["parity"] is None
    (row,) = engine("list").json["engines"]
    assert (row["backend"], row["misfit"]) == ("onnx", [])
    assert "inductor" in build(engine, model, "--export-only", "--backend", "inductor").error


def test_damage_is_named(engine: Callable[..., Outcome], model: Path, tmp_path: Path):
    name = build(engine, model).json["engine"]
    folder = tmp_path / "bundles" / name
    graph, manifest = folder / "denoiser.onnx", folder / "manifest.json"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-100])
    assert (
        f"{graph} has {len(whole) - 100} bytes, expected {len(whole)}" in build(engine, model).error
    )
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{graph} was changed after the build: remove it with" in engine("verify").error
    graph.write_bytes(whole)
    assert engine("verify").json

    manifest.write_text(manifest.read_text().replace('"batch": 4', '"batch": 8'))
    assert f"{manifest} was changed" in engine("verify").error
    listed = engine("list")
    assert listed.json["engines"][0]["misfit"] == ["damaged"]
    assert "no: damaged" in listed.out
    assert engine("remove", name).json["removed"] == [name]
    assert build(engine, model).json["built"]


def test_a_refused_engine_is_kept_on_request(
    engine: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The graphs are those of the golden engine: exporting them again takes most of a build."""
    unpack("engine", tmp_path)
    golden = next((tmp_path / "bundles").iterdir()).rename(tmp_path / "golden")
    monkeypatch.setattr(
        to_ort,
        "export_graph",
        lambda graph, folder, spec: shutil.copy(golden / f"{graph.name}.onnx", folder),
    )
    monkeypatch.setattr(to_ort, "compile_graphs", lambda *_: {"passes": 3})
    monkeypatch.setitem(parity.RELATIVE_TOLERANCE, "fp32", 0.0)
    options = ("--backend", "ort", "--device", "cpu", "--batch", "2", "--keep-refused")
    error = engine("build", "--model", str(tmp_path / "model"), *options).error
    (name,) = stored(tmp_path)
    refused = tmp_path / "bundles" / name
    assert "the engine's encoder differs from torch by" in error
    assert error.endswith(f"; kept in {refused}, for study only: never used")
    assert {"encoder.onnx", "denoiser.onnx", "decoder.onnx"} <= {p.name for p in refused.iterdir()}
    told = json.loads((refused / "refused.json").read_text())
    assert told["refusal"] in error
    assert bundle_name(told["key"]) == name.removesuffix(".refused")
    assert told["report"]["passes"] == 3
    assert told["report"]["refused"]["graph"] == "encoder"
    assert 0 < told["report"]["refused"]["relative_l2"] < 1e-4
    assert engine("list").json["engines"] == []
    assert engine("remove", "--all").json["removed"] == []
    assert "no engine in" in engine("verify", name).error
    assert stored(tmp_path) == [name]


def test_another_machine_or_version(
    engine: Callable[..., Outcome], model: Path, monkeypatch: pytest.MonkeyPatch
):
    name = build(engine, model).json["engine"]
    libraries = to_ort.libraries()
    monkeypatch.setattr(to_ort, "libraries", lambda: libraries | {"onnxruntime": "9.9.0"})
    difference = f"libraries.onnxruntime {libraries['onnxruntime']} (here 9.9.0)"
    assert difference in engine("verify", name).error
    assert "`engine build --model " in engine("verify", name).error
    assert engine("list").json["engines"][0]["misfit"] == [difference]
    rebuilt = build(engine, model)
    assert rebuilt.json["built"]
    assert rebuilt.json["engine"] != name
    assert f"the nearest one, {name}, differs in {difference}" in rebuilt.err


def test_a_range_is_held_at_both_ends(engine: Callable[..., Outcome], model: Path):
    built = build(engine, model, "--min-batch", "2")
    graphs = ("encoder", "denoiser", "decoder")
    both = {*graphs, *(f"{graph}, smallest batch" for graph in graphs)}
    assert set(built.json["parity"]) == both
    assert engine("verify").json["verified"][0]["parity"].keys() == both


def test_a_name_that_would_hide_an_engine(engine: Callable[..., Outcome], tmp_path: Path):
    folder = tmp_path / f".mine {'x' * 200}"
    save_model(folder)
    name = build(engine, folder, "--export-only").json["engine"]
    assert name.startswith("mine-xxx")
    assert engine("list").json["engines"][0]["engine"] == name


def test_a_file_too_many_is_named(engine: Callable[..., Outcome], model: Path, tmp_path: Path):
    name = build(engine, model, "--export-only").json["engine"]
    other = tmp_path / "bundles" / name / "other.bin"
    other.touch()
    assert f"{other} is not of this engine" in engine("verify").error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("Failed to allocate 4 GB")],
)
def test_full_memory_is_told(
    engine: Callable[..., Outcome],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(to_ort, "export_graph", full)
    assert f"memory is full ({error}): close" in build(engine, model).error
    assert stored(tmp_path) == []


def test_a_full_disk_elsewhere_is_named(
    engine: Callable[..., Outcome], model: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/x.so")

    monkeypatch.setattr(to_ort, "export_graph", full)
    told = build(engine, model).error
    assert "No space left on device for /elsewhere/x.so" in told
    assert "TMPDIR" in told


def test_weights_of_nan_make_no_engine(engine: Callable[..., Outcome], tmp_path: Path):
    save_model(tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "conv_out.weight"
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, path)
    assert "torch's own denoiser makes NaN" in build(engine, tmp_path / "model").error
    assert stored(tmp_path) == []
    wrong = build(engine, tmp_path / "model", "--export-only").error
    assert "UNet2DConditionModel's conv_out.weight holds NaN" in wrong
    assert stored(tmp_path) == []


def test_weights_that_changed_are_told_of(engine: Callable[..., Outcome], tmp_path: Path):
    save_model(tmp_path / "model")
    build(engine, tmp_path / "model")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "decoder.conv_out.bias"
    save_file(weights | {name: weights[name] + 1}, path)
    assert "have changed since it was built" in engine("verify").error
    assert build(engine, tmp_path / "model").json["built"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "30"), "--size 30: expected a multiple of 4"),
        (("--batch", "0"), "--batch 0: expected 1 or more"),
        (("--images-per-prompt", "3"), "images_per_prompt must divide the batch of 4"),
        (("--precision", "fp16"), "the ort backend runs fp32 and int8 on the CPU"),
        (("--precision", "int4"), "--precision"),
        (("--min-batch", "1"), "min_batch must be a multiple of images_per_prompt"),
        (("--backend", "eager"), "has nothing to build"),
        (("--backend", "inductor", "--min-batch", "2"), "leave out --min-batch"),
        (("--backend", "inductor", "--opset", "23"), "leave out --min-batch and --opset"),
        (("--vae-precision", "bf16"), "encoder and decoder in bf16 (--vae-precision): the ort"),
        (("--model", "sdxl-huge"), "sdxl-huge"),
    ],
)
def test_what_does_not_fit_is_one_line(
    engine: Callable[..., Outcome], model: Path, arguments: tuple[str, ...], told: str
):
    assert told in build(engine, model, *arguments).error


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_trt_names_what_is_missing(engine: Callable[..., Outcome]):
    told = engine("build", "--model", "sdxl-tiny", "--backend", "trt").error
    assert "needs an NVIDIA GPU" in told
    assert "engine build --for CARD" in told
    assert "CUDA" in engine("build", "--device", "cuda", "--backend", "ort").error


def test_a_build_that_cannot_fit_is_refused_first(
    engine: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
):
    from patchbloom.engine.builds import needs

    monkeypatch.setattr(needs, "free_host_bytes", lambda: 1 << 20)
    told = engine("build", "--model", "sdxl-tiny", *BUILD).error
    assert "memory" in told


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ({"size_px": 512, "batch": 32}, True),
        ({"size_px": 512, "batch": 32, "min_batch": 16}, False),
        ({"size_px": 512, "batch": 32, "min_batch": 16, "trt_library": "rtx"}, True),
        ({"size_px": 1024, "batch": 128}, False),
    ],
)
def test_tensors_that_tensorrt_does_not_take_are_refused_first(
    shapes: Any, fits: bool, tmp_path: Path
):
    turbo, shapes = find_model("sdxl-turbo", "random"), {"trt_library": "tensorrt", **shapes}
    needs = engine_needs(turbo, EngineSpec(precision="fp16", device="cuda", **shapes), "trt")
    assert (needs.refused_elements == 0) is fits
    if not fits:
        with pytest.raises(Unavailable, match=r"fewer than 2\^31 elements, .* smaller \(--batch"):
            check_room(needs, "cpu", tmp_path)


def test_an_engine_has_the_size_that_train_uses():
    command = commands.EngineBuild(model="sdxl-turbo", weights="random", export_only=True)
    _, model, spec = plan_build(command)
    assert spec.size_px == RECIPES["dace"].image_size != model.trained_px()


def test_doctor_says_what_works(engine: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch):
    examined = engine("doctor")
    works = {(b["backend"], b["device"]): b["works"] for b in examined.json["backends"]}
    assert works["eager", "cpu"]
    assert works["ort", "cpu"]
    assert {row["model"] for row in examined.json["needs"]} == {"sdxl-tiny", "sdxl-turbo"}
    for backend in examined.json["backends"]:
        assert backend["works"] or backend["missing"] in examined.out
    monkeypatch.setattr(backends, "resolve_device", _fail)
    assert "no backend works here: broken" in engine("doctor").error


def test_doctor_says_how_to_get_ort_on_cuda(monkeypatch: pytest.MonkeyPatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (needed,) = project["optional-dependencies"]["cuda"]
    monkeypatch.setattr(doctor, "requires", lambda _: [f"{needed}; extra == 'cuda'"])
    monkeypatch.setattr(doctor, "_installed", lambda _: None)
    (library,) = doctor.examine(Path())["libraries"]
    assert (library["only_for"], library["mend"]) == ("cuda", f"pip install '{needed}'")


def _fail(device: str) -> str:
    raise OSError("broken")
