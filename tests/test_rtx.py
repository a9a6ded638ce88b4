"""TensorRT for RTX, the real library: engines for cards that this machine lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from cli_cases import write_small_model
from golden_cases import unpack
from onnx import TensorProto, helper, numpy_helper
from patchbloom.engine import cli
from patchbloom.export import engines, to_tensorrt, trt_build, trt_library
from patchbloom.export.bundle import Bundle, BundleError, open_bundle
from patchbloom.export.config import EngineSpec
from patchbloom.export.engines import open_engine
from patchbloom.export.graphs import GRAPHS
from patchbloom.export.models import Unavailable, find_model, load_parts
from patchbloom.export.parity import check_parity, make_reference
from patchbloom.export.trt_library import TARGETS, choose_library, parse_targets, trt_module
from trt_cases import new_graphs, played

CARDS = ("a100", "a6000", "rtx4090", "rtx-pro-6000")
ENDS = (".plan", ".json")
SPEC = EngineSpec(
    size_px=32,
    batch=4,
    images_per_prompt=2,
    precision="fp16",
    device="cuda",
    trt_library="rtx",
    targets=("sm86",),
)


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        missing = "TensorRT for RTX is not installed: run make setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


@pytest.fixture
def engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Runs one command on this test's own engines: (exit code, result or error, stdout)."""

    def run(command: str, *arguments: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = cli.main([command, *arguments, "--bundles", str(tmp_path / "bundles")])
        out, err = capfd.readouterr()
        return code, err.splitlines()[-1] if code else json.loads(out.splitlines()[-1]), out

    return run


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The real builder's configuration of each build."""
    trt, seen = trt_module(SPEC), []

    class Builder(trt.Builder):
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            seen.append((network, config))
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(trt, "Builder", Builder)
    return seen


@pytest.mark.parametrize(
    ("precision", "opset", "batches", "cards"),
    [
        ("int8", "21", ("--batch", "8"), CARDS),
        ("fp8", "23", ("--batch", "8", "--min-batch", "4"), CARDS[2:]),
    ],
)
def test_an_engine_for_cards_that_are_not_here(
    engine: Callable[..., tuple],
    configs: list[Any],
    precision: str,
    opset: str,
    batches: tuple[str, ...],
    cards: tuple[str, ...],
    tmp_path: Path,
) -> None:
    options = ("--model", "sdxl-tiny", "--backend", "trt", "--images-per-prompt", "4")
    options += ("--precision", precision, "--opset", opset, *batches)
    unpack("runs", tmp_path)
    options += ("--calibrate", str(tmp_path / "all"))
    code, built, out = engine("build", *options, "--for", *cards)
    assert code == 0
    trt = trt_module(SPEC)
    for network, config in configs:
        capabilities = [
            config.get_compute_capability(index).name
            for index in range(config.num_compute_capabilities)
        ]
        assert capabilities == ["SM80", "SM86", "SM89", "SM120"][-len(cards) :]
        assert not config.get_flag(trt.BuilderFlag.TF32)
        assert not config.get_flag(trt.BuilderFlag.STRIP_PLAN)
        assert config.max_aux_streams == 0
        shapes = [network.get_input(index).shape for index in range(network.num_inputs)]
        assert any(-1 in shape for shape in shapes) == ("--min-batch" in batches)
        assert config.num_optimization_profiles == ("--min-batch" in batches)
    assert len(configs) == 3

    (folder,) = (tmp_path / "bundles").glob("sdxl-tiny-trt-*sm89-sm120-*")
    files = {path.name for path in folder.iterdir()}
    assert files == {"manifest.json", *(f"{graph}{end}" for graph in GRAPHS for end in ENDS)}
    assert set(built["graph_parity"]) == set(GRAPHS)
    assert "parity" not in built
    first, second = parse_targets(cards[:2])
    assert re.search(rf"engine not yet run: no {first} \(.*, …\) or {second} \(", out)

    again = engine("build", *options, "--for", cards[1])
    assert again[1]["folder"] == str(folder), "one folder holds the plans of all"
    (row,) = engine("list")[1]["engines"]
    assert re.match(rf"it runs on {first} \(.*, …\) or {second}", row["misfit"][0])
    code, verified, out = engine("verify")
    assert code == 0
    assert verified["verified"][0]["parity"] is None
    assert "engine not yet run" in out
    assert "engine not yet run" in engine("info", "sdxl")[1]["not_run"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", ["224", "512"])
def test_sdxl_turbo_in_full_size(engine: Callable[..., tuple], size: str) -> None:
    """Takes 20 GB of memory and 6 minutes on two cores."""
    options = ("--model", "sdxl-turbo", "--weights", "random", "--backend", "trt", "--size", size)
    code, built, _ = engine("build", *options, "--for", "a6000")
    assert code == 0
    assert built["peak_host_bytes"] < 20e9
    assert 4e9 < built["bytes"] < 5.5e9
    assert set(built["graph_parity"]) == set(GRAPHS)


def test_the_reader_of_a_plan_without_its_card_is_told(tmp_path: Path) -> None:
    trt = trt_module(SPEC)
    write_graphs(tmp_path)
    to_tensorrt.compile_graphs(tmp_path, SPEC, lambda line: None)
    runtime = trt.Runtime(trt_build.make_log(trt))
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    for name in GRAPHS:
        plan = (tmp_path / f"{name}.plan").read_bytes()
        assert not runtime.get_engine_validity(plan)[1] & malformed
        assert runtime.get_engine_validity(plan[4:])[1] & malformed


def write_graphs(folder: Path, node: str = "Relu", rows: int = 4) -> None:
    """Write a graph of one operator under each name."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [4, 3]) for n in ("x", "y")]
    shape = numpy_helper.from_array(np.array([rows, 3]), "shape")
    operator = helper.make_node(node, ["x", "shape"] if node == "Reshape" else ["x"], ["y"])
    graph = helper.make_graph([operator], "graph", value[:1], value[1:], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    port = {"shape": [4, 3], "precision": "fp16", "per_prompt": 2}
    for name in GRAPHS:
        onnx.save(model, folder / f"{name}.onnx")
        ports = [port | {"name": "x"}, port | {"name": "y"}]
        (folder / f"{name}.json").write_text(json.dumps(ports))


@pytest.mark.parametrize(
    ("node", "rows", "told"),
    [
        ("NoSuchOperator", 4, r"does not take decoder\.onnx .*NoSuchOperator"),
        ("Reshape", 7, r"(does not take|could not compile the) .*decoder"),
        ("cut", 4, r"does not take decoder\.onnx"),
    ],
)
def test_what_the_real_parser_refuses_is_one_line(
    node: str, rows: int, told: str, tmp_path: Path
) -> None:
    write_graphs(tmp_path, "Relu" if node == "cut" else node, rows)
    if node == "cut":
        path = tmp_path / "decoder.onnx"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BundleError, match=told) as caught:
        to_tensorrt.compile_graphs(tmp_path, SPEC, lambda line: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_session_on_the_card_keeps_its_kernels(
    capturable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Stand-ins for what needs a card, with the real library's signatures."""
    monkeypatch.setattr(trt_library, "here", lambda: "sm86")
    spec, folder = replace(SPEC, device="cpu"), tmp_path / "engine"
    folder.mkdir()
    references = []
    for graph in new_graphs(spec):
        references.append(make_reference(graph))
        to_tensorrt.export_graph(graph, folder, spec)
    fake = played(trt_module(SPEC), "tensorrt_rtx", monkeypatch)
    fake.capturable = capturable
    to_tensorrt.compile_graphs(folder, spec, lambda line: None)
    for read in ([], [b"kernels"] * 3):
        sessions: Any = to_tensorrt.open_sessions(folder, spec)
        assert fake.kernels_read == read
        for reference in references:
            session = sessions[reference.graph]
            assert check_parity(reference, session.run)["max_abs"] < 1e-4
            assert (session._replay is not None) == capturable
            session.close()
    told = "cannot record this engine as a CUDA graph" in capfd.readouterr().err
    assert told != capturable
    assert len(list(tmp_path.glob(".engine.*-kernels"))) == 3


def test_the_first_opening_on_the_card_compares_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, precision="fp32", device="cpu", targets=("sm86", "sm89"))
    write_small_model(tmp_path)
    model, bundles = find_model(str(tmp_path / "model")), tmp_path / "bundles"
    fake = played(trt_module(SPEC), "tensorrt_rtx", monkeypatch)

    def opened(spec: EngineSpec) -> Bundle:
        parts = load_parts(model, precision="fp32", vae_precision="fp32", device="cpu")
        return open_engine("trt", model, parts, spec, bundles=bundles)

    built = opened(spec)
    assert built.built
    assert "parity" not in built.manifest["report"]
    monkeypatch.setattr(trt_library, "here", lambda: "sm86")
    monkeypatch.setattr(engines, "here", lambda: "sm86")
    fake.error = 1.0
    with pytest.raises(BundleError, match="the engine's encoder differs from torch by 1"):
        opened(replace(spec, targets=("sm86",)))
    fake.error = 0.0
    first = opened(replace(spec, targets=("sm86",)))
    assert first.folder == built.folder
    assert first.manifest["report"]["ran_on"] == ["sm86"]
    assert set(first.manifest["report"]["parity"]) == set(GRAPHS)
    assert open_bundle(built.folder).manifest == first.manifest
    fake.error = 1.0  # seen only by a comparison
    assert opened(replace(spec, targets=("sm86",))).manifest == first.manifest


def test_a_profile_that_fits_no_shape_is_one_line(tmp_path: Path) -> None:
    write_graphs(tmp_path)
    ranged = EngineSpec(**{**vars(SPEC), "min_batch": 2})
    with pytest.raises(BundleError, match="could not compile the decoder"):
        to_tensorrt.compile_graphs(tmp_path, ranged, lambda line: None)


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (("a6000",), ("sm86",)),
        (("RTX 4090", "sm86", "A6000"), ("sm86", "sm89")),
        (("NVIDIA-RTX-PRO-6000", "t4"), ("sm75", "sm120")),
    ],
)
def test_cards_have_names(names: tuple[str, ...], targets: tuple[str, ...]) -> None:
    assert parse_targets(names) == targets


def test_every_target_is_one_of_the_library() -> None:
    capabilities = trt_module(SPEC).ComputeCapability.__members__
    assert {target.upper() for target in TARGETS} == capabilities.keys() - {"NONE", "CURRENT"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--backend", "trt", "--for", "h100"), "does not build for sm90; install TensorRT on"),
        (("--backend", "trt", "--for", "voodoo2"), "expected a card or its compute capability"),
        (("--for", "a6000"), "--for is for --backend trt"),
        (("--backend", "ort", "--trt-library", "rtx"), "--trt-library is for --backend trt"),
        (("--backend", "trt", "--for", "a6000", "--export-only"), "--export-only does not"),
        (("--backend", "trt", "--for", "a6000", "--device", "cpu"), "--device cpu does not"),
        (
            ("--backend", "trt", "--trt-library", "tensorrt", "--for", "a6000"),
            "TensorRT builds for the GPU of this machine alone",
        ),
        (("--backend", "trt"), "needs an NVIDIA GPU .*`engine build --for CARD`"),
    ],
)
def test_what_cannot_be_built_is_refused(
    engine: Callable[..., tuple], options: tuple[str, ...], told: str
) -> None:
    code, error, _ = engine("build", *options)
    assert code == 2
    assert re.search(told, error), error


def test_the_library_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(sm="sm86")
    monkeypatch.setattr(trt_library, "here", lambda: card.sm)
    assert choose_library("auto") == ("rtx", ("sm86",))
    card.sm = "sm90"
    with pytest.raises(Unavailable, match=r"needs TensorRT 10\.15 to 11"):
        choose_library("auto")
    with pytest.raises(Unavailable, match="does not run on this GPU, sm90"):
        choose_library("rtx")
