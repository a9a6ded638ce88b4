"""int8 and fp8: what they round, what they leave, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_cases import write_small_model
from golden_cases import unpack
from patchbloom.engine import cli
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.expand.backends import (
    TorchBackend,
    choose_backend,
    plan_engine,
    require_backend,
)
from patchbloom.engine.expand.calibration import plan_calibration
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.fused_layers import fuse
from patchbloom.engine.expand.naming import prompts_of
from patchbloom.export import eight_bits, engines
from patchbloom.export.bundle import BundleError, open_bundle
from patchbloom.export.config import BackendName, EngineSpec, Precision
from patchbloom.export.eight_bits import (
    Calibration,
    EightBitLayer,
    fp8_product,
    quantise_graph,
    random_calibration,
    read_recipe,
)
from patchbloom.export.engines import engine_key, open_engine, require_engine
from patchbloom.export.graphs import Graph, make_graphs
from patchbloom.export.models import ModelError, Unavailable, find_model
from patchbloom.export.parity import in_precision, make_reference
from patchbloom.export.to_onnx import export_onnx
from small_networks import new_parts

SPEC = EngineSpec(size_px=32, batch=4, images_per_prompt=2, precision="int8")
TINY = find_model("sdxl-tiny")
SCHEDULES = (("rho", 0.4), ("steps", 4), ("mixup", False), ("seed", 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden runs, a small model and its engines."""
    folder = tmp_path_factory.mktemp("eight")
    unpack("runs", folder)
    write_small_model(folder)
    return folder


def expanded(folder: Path, **settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Images of the small model from a golden run's patches, and how they were made."""
    coreset = open_coreset(folder / "all" / "coreset")
    config = ExpandConfig(**{"size_px": 32, "batch": 4, "bundles": folder / "engines", **settings})
    given = {"patches_NHWC": coreset.patches(), "labels_N": coreset.labels_N}
    expander = Expander(
        find_model(folder / "model"), config, prompts_K=prompts_of(coreset), **given
    )
    images, described = expander.expand(range(len(coreset.labels_N)), 3), expander.describe()
    expander.close()
    return images, described


def psnr_db(images: torch.Tensor, others: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (images - others).square().mean()))


def test_an_engine_in_int8_makes_nearly_the_images_of_torch(folder: Path) -> None:
    exact, _ = expanded(folder, backend="eager")
    simulated, _ = expanded(folder, backend="eager", precision="int8")
    images, described = expanded(folder, backend="openvino", precision="int8")
    assert 30 < psnr_db(simulated, exact) < 60
    assert psnr_db(images, exact) > 30
    assert psnr_db(images, simulated) > 33
    again, same = expanded(folder, backend="openvino", precision="int8")
    assert same == described, "the stored engine is found again"
    assert torch.equal(again, images)
    assert cli.main(["verify", "--bundles", str(folder / "engines")]) == 0


def test_a_calibration_depends_on_patches_and_schedule(folder: Path) -> None:
    coreset = open_coreset(folder / "all" / "coreset")
    config = ExpandConfig(size_px=32, precision="int8")
    given: dict[str, Any] = {
        "patches_NHWC": coreset.patches(),
        "labels_N": coreset.labels_N.numpy(),
        "prompts_K": prompts_of(coreset),
    }

    def sha256(config: ExpandConfig = config, **changes: Any) -> str:
        return plan_calibration(Expander, TINY, config, **{**given, **changes}).sha256

    assert sha256() == sha256(replace(config, batch=7, backend="ort"))
    others = [sha256(replace(config, **{name: value})) for name, value in SCHEDULES]
    others.append(sha256(replace(config, conditioning_px=64)))
    others.append(sha256(patches_NHWC=255 - coreset.patches()))
    assert len({sha256(), *others}) == len(others) + 1
    noise = replace(config, start="noise")
    assert sha256(noise) == sha256(replace(noise, rho=0.4, mixup=False), patches_NHWC=None)


def test_fp8_rounds_linear_layers_alone(folder: Path) -> None:
    exact, _ = expanded(folder, backend="eager")
    simulated, _ = expanded(folder, backend="eager", precision="fp8")
    assert 30 < psnr_db(simulated, exact) < 60


@pytest.mark.parametrize(("precision", "layers"), [("int8", 63), ("fp8", 40)])
def test_layers_that_the_recipe_names_stay(precision: Precision, layers: int) -> None:
    encoder, denoiser, decoder = make_graphs(new_parts(), SPEC, tokens=77)
    denoiser.module.unused = torch.nn.Linear(4, 4)
    calibration = random_calibration(TINY)
    for graph in (encoder, denoiser, decoder):
        quantise_graph(graph, precision, precision, calibration)
    found = dict(denoiser.module.named_modules())
    assert sum(isinstance(each, EightBitLayer) for each in found.values()) == layers
    assert type(denoiser.module.unused) is torch.nn.Linear, "nothing is known of its inputs"
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_1"):
        assert not isinstance(found[f"unet.{name}"], EightBitLayer), name
    kinds = {type(each) for each in encoder.module.modules()}
    assert EightBitLayer not in kinds, "a patch is encoded once"
    assert type(decoder.module.decoder.conv_in) is type(decoder.module.decoder.conv_out)
    kinds = {type(each) for each in decoder.module.decoder.up_blocks.modules()}
    assert (EightBitLayer in kinds) == (precision == "int8"), "fp8 is for linear layers"


def test_weights_are_stored_in_eight_bits(tmp_path: Path) -> None:
    calibration = random_calibration(TINY)
    spec = replace(SPEC, calibration=calibration.sha256)
    bundle = open_engine("ort", TINY, new_parts(), spec, bundles=tmp_path, calibration=calibration)
    graph = onnx.load(bundle.folder / "denoiser.onnx").graph
    stored = {each.name: each for each in graph.initializer}
    rounded = [stored[node.input[0]] for node in graph.node if node.input[0] in stored]
    kinds = [each.data_type for each in rounded if len(each.dims) in (2, 4)]
    assert kinds.count(onnx.TensorProto.INT8) == 63
    assert bundle.manifest["report"]["left_out"] == read_recipe(TINY)
    assert bundle.manifest["report"]["parity"]["denoiser"]["relative_l2"] > 1e-3
    with pytest.raises(BundleError, match=r"precision int8 \(here fp32\)"):
        open_bundle(bundle.folder, engine_key("ort", TINY, replace(SPEC, precision="fp32")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_products_are_those_that_torch_simulates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).to(dtype).requires_grad_(False)
    x = torch.randn(3, 5, 64).to(dtype)
    rounded = EightBitLayer(layer, x.abs().amax() / 2, torch.float8_e4m3fn)  # some are cut off
    expected = rounded(x).float()
    scales = rounded.weight, rounded.input_scale, rounded.weight_scale
    found = fp8_product(x, *scales, rounded.bias).float()
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    assert float((expected - layer(x)).norm() / expected.norm()) > 1e-2


@pytest.mark.slow  # Inductor compiles for a minute
@pytest.mark.parametrize("unit", [False, True])
def test_compiled_blocks_compute_in_fp8(unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, precision="fp8")

    def quantise(graph: Graph) -> None:
        quantise_graph(graph, "fp8", "fp8", random_calibration(TINY))

    given: dict[str, Any] = {"tokens": 77, "quantise": quantise}
    eager = TorchBackend("eager", new_parts("bf16"), spec, **given)
    monkeypatch.setattr(eight_bits, "_has_fp8_unit", lambda device: unit)
    compiled = TorchBackend("compile", new_parts("bf16"), spec, **given)
    inputs = make_graphs(new_parts("bf16"), spec, tokens=77)[1].random_inputs(3)
    with torch.no_grad():
        found, expected = compiled.denoise(*inputs), eager.denoise(*inputs)
    assert float((found - expected).norm() / expected.norm()) < 5e-2


def test_a_graph_for_a_card_with_the_unit_keeps_its_roundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(eight_bits, "_has_fp8_unit", lambda device: True)
    _, denoiser, _ = make_graphs(new_parts(), SPEC, tokens=77)
    quantise_graph(denoiser, "fp8", "fp8", random_calibration(TINY))
    export_onnx(denoiser, tmp_path / "denoiser.onnx", native_group_norm=False)
    nodes = onnx.load(tmp_path / "denoiser.onnx").graph.node
    roundings = sum(node.op_type == "QuantizeLinear" for node in nodes)
    assert roundings == 32, "of 40 layers; Q, K and V of four blocks share one"


def test_a_transformers_end_is_rounded_on_a_gpu_too() -> None:
    parts = new_parts()
    fuse(parts)
    block: Any = next(each for each in parts.unet.modules() if hasattr(each, "proj_out"))
    block.proj_out = torch.nn.Identity()  # as quantise_graph replaces it, after `fuse`
    rows, image = torch.randn(2, 4, 8), torch.randn(2, 8, 2, 2)
    ended = block._get_output_for_continuous_inputs(rows, residual=image)
    torch.testing.assert_close(ended, rows.transpose(1, 2).unflatten(2, (2, 2)) + image)


def test_int8_on_a_gpu_is_for_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = EngineSpec(size_px=32, precision="int8", device="cuda")
    assert choose_backend(on_gpu) == "trt"
    assert choose_backend(replace(on_gpu, precision="fp8")) == "compile"
    with pytest.raises(Unavailable, match="the trt backend needs"):
        require_backend("auto", "int8", "cuda")
    monkeypatch.setattr(engines, "here", lambda: "sm80")
    for name in ("auto", "compile", "trt"):
        with pytest.raises(Unavailable, match="have no units for fp8"):
            require_backend(name, "fp8", "cuda")


def test_a_vae_that_asks_for_fp32_gets_it_beside_int8(tmp_path: Path) -> None:
    write_small_model(tmp_path)
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": True}))
    asked = ExpandConfig(size_px=32, backend="openvino", precision="int8")
    _, spec = plan_engine(find_model(tmp_path / "model"), asked, np.array([1]))
    assert spec.vae_precision == "fp32"


def test_only_rounded_graphs_may_differ_as_eight_bits_do() -> None:
    references = {
        graph.name: make_reference(graph) for graph in make_graphs(new_parts(), SPEC, tokens=77)
    }
    own = in_precision(references, "int8", "int8", tiny_decoder=False)
    assert [each.precision for each in own.values()] == ["bf16", "int8", "int8"]
    tiny = in_precision(references, "int8", "int8", tiny_decoder=True)
    assert tiny["decoder"].precision == "bf16"
    beside = in_precision(references, "int8", "fp32", tiny_decoder=False)
    assert [each.precision for each in beside.values()] == ["fp32", "int8", "fp32"]


def test_int8_has_a_scale_per_output_channel() -> None:
    layer = torch.nn.Conv2d(4, 3, 3, padding=1, bias=False).requires_grad_(False)
    layer.weight *= torch.tensor([1.0, 1e-3, 0.0])[:, None, None, None]
    x = torch.randn(2, 4, 5, 5)
    found, expected = EightBitLayer(layer, x.abs().amax(), torch.int8)(x), layer(x)
    error = (found - expected).flatten(2).norm(dim=(0, 2))
    size = expected.flatten(2).norm(dim=(0, 2))
    assert bool((error[:2] < 0.02 * size[:2]).all())
    assert float(error[2]) == 0


def test_a_calibration_with_nan_is_refused(tmp_path: Path) -> None:
    recipe = read_recipe(TINY)

    def inputs() -> Mapping[str, Any]:
        _, denoiser, _ = make_graphs(new_parts(), SPEC, tokens=77)
        first, *others = denoiser.random_inputs(0)
        first[0, 0, 0, 0] = torch.nan
        return {"denoiser": [(first, *others)]}

    calibration = Calibration({}, inputs, recipe)
    spec = replace(SPEC, calibration=calibration.sha256)
    with pytest.raises(BundleError, match=r"calibration inputs of the denoiser are NaN .* at unet"):
        open_engine("ort", TINY, new_parts(), spec, bundles=tmp_path, calibration=calibration)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(
    ("backend", "settings", "told"),
    [
        (
            "ort",
            {"precision": "fp8"},
            "ort backend runs fp32 and int8 on the CPU, .*not fp8",
        ),
        ("openvino", {"precision": "fp8"}, "the openvino backend runs fp32, bf16 or int8, not fp8"),
        ("inductor", {"precision": "int8"}, "has no int8: use --backend openvino"),
        (
            "trt",
            {"precision": "fp8", "device": "cuda", "targets": ("sm86", "sm89")},
            r"sm86 \(a6000, .*\) have no units for fp8.*use --precision int8",
        ),
    ],
)
def test_what_a_backend_cannot_do_is_refused(
    backend: BackendName, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(Unavailable, match=told):
        require_engine(backend, TINY, replace(SPEC, **settings))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--precision", "int8"), "--precision int8 is calibrated on patches: give a run or"),
        (("--calibrate", "runs/x"), "--calibrate is for --precision int8 or fp8: leave it out"),
        (("--precision", "int8", "--calibrate", "missing"), "missing"),
        (("--vae-precision", "int8"), "--vae-precision int8 goes with --precision int8, got fp32"),
    ],
)
def test_a_build_without_its_coreset_is_one_line(
    words: tuple[str, ...], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["build", "--model", "sdxl-tiny", "--backend", "ort", "--bundles", str(tmp_path)]
    assert cli.main([*given, *words]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("engine: error: ")
    assert told in last


def test_a_missing_modelopt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelopt.torch.quantization", None)
    with pytest.raises(Unavailable, match=r"pip install 'patchbloom\[eight-bits\]'"):
        eight_bits.require_modelopt()


@pytest.mark.parametrize("text", ["[denoiser", 'x = "y"', "[denoiser]\nconv = 3", "denoiser = 3"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "eight_bits.toml").write_text(text)
    with pytest.raises(ModelError, match=r"eight_bits.toml.*write lines 'pattern = reason' under"):
        read_recipe(replace(TINY, folder=tmp_path))
