"""ONNX graphs and bundles: right, whole, and never mistaken for another."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from bundle_cases import KEY, fill
from patchbloom.export import bundle, to_ort
from patchbloom.export.bundle import (
    BundleError,
    ParityError,
    bundle_name,
    find_bundles,
    find_or_build,
    open_bundle,
)
from patchbloom.export.config import EngineSpec
from patchbloom.export.engines import engine_key
from patchbloom.export.graphs import Graph, make_graphs, vae_batch
from patchbloom.export.machine import gpu_identity
from patchbloom.export.models import ModelParts, Unavailable, find_model
from patchbloom.export.parity import Reference, check_parity, make_reference
from patchbloom.export.to_onnx import export_onnx
from patchbloom.export.to_ort import OrtSession, cuda_settings, require, run_one_node
from patchbloom.train.prior.model import new_parts


def small_parts(folder: Path) -> ModelParts:
    torch.manual_seed(0)
    parts = new_parts(32, folder, unet_channels=(16, 32, 64), vae_channels=(8, 16, 32))
    return ModelParts(parts.unet.eval(), parts.vae.eval())


@pytest.fixture
def decoder(tmp_path: Path) -> Graph:
    spec = EngineSpec(size_px=32, batch=4, images_per_prompt=2)
    return make_graphs(small_parts(tmp_path / "spelling"), spec, tokens=77)[2]


def test_graph_is_what_was_specified(decoder: Graph, tmp_path: Path):
    import onnx

    path = tmp_path / "decoder.onnx"
    export_onnx(decoder, path, native_group_norm=True)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "GroupNormalization" in operators
    export_onnx(decoder, path, native_group_norm=False)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "GroupNormalization" not in operators
    session = OrtSession(path, "cpu")
    assert check_parity(make_reference(decoder), session.run)["max_abs"] < 1e-4
    with pytest.raises(ValueError, match=r"latents must be \[4, 4, 8, 8\]"):
        session.run(torch.zeros(5, 4, 8, 8))

    wrong = dataclasses.replace(decoder.output, shape=(4, 3, 64, 64))
    with pytest.raises(RuntimeError, match="expected"):
        export_onnx(dataclasses.replace(decoder, output=wrong), path, native_group_norm=False)

    weight = next(decoder.module.parameters())
    weight.data[0, 0] += 0.5
    reference = make_reference(decoder)
    with pytest.raises(BundleError, match="differs from torch"):
        check_parity(reference, session.run)
    weight.data[0, 0] = torch.nan
    with pytest.raises(BundleError, match="torch's own decoder makes NaN"):
        make_reference(decoder)
    export_onnx(decoder, path, native_group_norm=False)
    with pytest.raises(BundleError, match="engine's decoder makes NaN or infinite"):
        check_parity(reference, OrtSession(path, "cpu").run)


@pytest.mark.parametrize(
    ("wrong", "by", "passes"),
    [
        (2, 1.0, True),  # two of 30,000 values
        (30, 1.0, False),
        (30_000, 0.005, True),
        (30_000, 0.03, False),  # 0.03 of a relative L2 of 1, though each error is within its limit
    ],
)
def test_single_values_in_half_precision_may_differ(wrong: int, by: float, passes: bool):
    expected = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    expected[0] = 4.0
    found = expected.clone()
    found[-wrong:] += by
    reference = Reference("decoder", "fp16", [], expected)
    if passes:
        assert check_parity(reference, lambda: found)["max_abs"] == pytest.approx(by, rel=1e-3)
    else:
        with pytest.raises(BundleError, match=r"differs from torch by .* in relative L2 by"):
            check_parity(reference, lambda: found)


@pytest.mark.parametrize(
    ("size_px", "batch", "images"),
    [
        (512, 32, 8),
        (224, 32, 32),
        (224, 64, 32),
        (512, 11, 6),
        (512, 31, 8),
        (1024, 33, 2),
        (4096, 4, 1),
    ],
)
def test_the_vae_runs_in_parts_that_fit(size_px: int, batch: int, images: int):
    """SDXL's feature maps of 256 channels: 32 images of 512 px have 2^31 elements."""
    spec, channels = EngineSpec(size_px=size_px, batch=batch), (128, 256, 512, 512)
    assert vae_batch(spec, channels) == images
    assert vae_batch(dataclasses.replace(spec, min_batch=1), channels) == batch


def test_a_key_does_not_hold_the_driver(monkeypatch: pytest.MonkeyPatch):
    """An update of the driver rebuilds nothing."""
    h200 = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: h200)
    assert gpu_identity("cuda") == {"gpu": "NVIDIA H200", "sm_count": 132}


def test_ort_computes_on_the_stream_and_device_it_is_given():
    stream: Any = SimpleNamespace(cuda_stream=94, device_index=1)
    settings = cuda_settings(stream)
    assert settings == {
        "user_compute_stream": "94",
        "device_id": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_ort_on_cuda_is_believed_once_it_has_computed(monkeypatch: Any, capsys: Any):
    """onnxruntime-gpu lists CUDA even where its libraries are missing; these are its own words."""
    missing = "libcurand.so.10: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: print(f"Failed to load libcurand.so.10: {missing}")
    )
    stream = SimpleNamespace(cuda_stream=94, device_index=0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    with pytest.raises(Unavailable, match=rf"\({missing}\): pip install 'patchbloom\[cuda\]'"):
        require("fp16", "cuda")
    assert capsys.readouterr().out == ""


def test_ort_computes_one_node_or_says_why_not(monkeypatch: Any):
    def no_cudnn(*_: Any) -> None:
        raise RuntimeError("CUDNN failure 1001:\nCUDNN_STATUS_NOT_INITIALIZED")

    run_one_node("cpu")
    monkeypatch.setattr(OrtSession, "run", no_cudnn)
    run_one_node("cpu")  # remembered
    run_one_node.cache_clear()
    with pytest.raises(Unavailable, match=r"on cpu \(CUDNN failure 1001: CUDNN_STATUS_NOT.*pip"):
        run_one_node("cpu")


@pytest.mark.gpu
def test_ort_waits_for_its_inputs(tmp_path: Path):
    """Inputs that torch's stream fills late, after long matmuls, are read once filled."""
    spec = EngineSpec(size_px=32, batch=4, images_per_prompt=2, device="cuda")
    parts = small_parts(tmp_path / "spelling")
    parts = ModelParts(parts.unet.cuda(), parts.vae.cuda())
    decoder = make_graphs(parts, spec, tokens=77)[2]
    path = tmp_path / "decoder.onnx"
    export_onnx(decoder, path, native_group_norm=True)
    session = OrtSession(path, "cuda")
    (latents,) = decoder.random_inputs(seed=2)
    expected = session.run(latents).clone()
    long = torch.randn(8192, 8192, device="cuda")
    for _ in range(3):
        late = torch.full_like(latents, torch.nan)
        torch.cuda.synchronize()
        for _ in range(4):
            long @ long
        late.copy_(latents)
        assert torch.equal(session.run(late), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_ort_on_the_cpu_is_fp32_only(precision: Any):
    with pytest.raises(Unavailable, match="--precision fp32"):
        require(precision, "cpu")


def test_a_key_does_not_ask_how_onnxruntime_was_installed(monkeypatch: pytest.MonkeyPatch):
    """onnxruntime-gpu installs the same module under another package name."""
    installed = to_ort.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(to_ort, "version", version)
    key = engine_key("ort", find_model("sdxl-tiny"), EngineSpec(size_px=64), tokens=77)
    assert key["libraries"]["onnxruntime"] == onnxruntime.__version__


def test_a_bundle_is_built_once_and_then_found(tmp_path: Path):
    first = find_or_build(tmp_path, KEY, fill)
    assert first.built
    assert first.size_bytes == 10
    second = find_or_build(tmp_path, KEY, fail)
    assert not second.built
    assert second.manifest == first.manifest
    other = {**KEY, "libraries": {"torch": "2.12"}}
    assert bundle_name(other) != bundle_name(KEY)
    assert find_or_build(tmp_path, other, fill).built


def fail(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"built again in {folder}")


def test_damage_is_named(tmp_path: Path):
    folder = find_or_build(tmp_path, KEY, fill).folder
    graph, manifest = folder / "graph.onnx", folder / "manifest.json"
    graph.write_bytes(b"01234")
    with pytest.raises(BundleError, match=r"graph\.onnx has 5 bytes, expected 10: remove"):
        find_or_build(tmp_path, KEY, fail)
    graph.write_bytes(b"0123456780")
    with pytest.raises(BundleError, match=r"graph\.onnx was changed"):
        find_or_build(tmp_path, KEY, fail)
    graph.unlink()
    with pytest.raises(BundleError, match=r"graph\.onnx is missing"):
        open_bundle(folder)
    graph.write_bytes(b"0123456789")
    assert open_bundle(folder, KEY).size_bytes == 10

    content = json.loads(manifest.read_text())
    content["key"]["batch"] = 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"manifest\.json was changed"):
        open_bundle(folder)
    manifest.write_text("{")
    with pytest.raises(BundleError, match=r"manifest\.json is not valid JSON"):
        open_bundle(folder)
    manifest.unlink()
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("gpu", "NVIDIA H100"), ("libraries", {"torch": "2.12"}), ("batch", 16), ("size_px", 224)],
)
def test_another_key_is_never_loaded(tmp_path: Path, field: str, value: Any):
    folder = find_or_build(tmp_path, KEY, fill).folder
    with pytest.raises(BundleError, match=f"was built for {field}"):
        open_bundle(folder, {**KEY, field: value})


def test_a_failed_build_leaves_nothing(tmp_path: Path):
    def full_disk(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BundleError, match=r"No space left on device.*--bundles"):
        find_or_build(tmp_path, KEY, full_disk)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert find_or_build(tmp_path, KEY, fill).built


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ParityError("differs", {"refused": {"graph": "decoder", "not_finite": 7}}), True),
        (BundleError("weights are NaN"), False),
        (KeyboardInterrupt(), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
    ],
)
def test_only_what_parity_refuses_is_kept(tmp_path: Path, error: BaseException, kept: bool):
    def refused(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise error

    name = f"{bundle_name(KEY)}.refused"
    with pytest.raises((OSError, KeyboardInterrupt)):
        find_or_build(tmp_path, KEY, refused)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # the second one replaces the first one
        with pytest.raises((OSError, KeyboardInterrupt), match=f"{name}," if kept else None):
            find_or_build(tmp_path, KEY, refused, keep_refused=True)
        assert [path.name for path in tmp_path.iterdir()] == [name] * kept
        for folder in tmp_path.iterdir():
            assert {path.name for path in folder.iterdir()} == {"graph.onnx", "refused.json"}
            (folder / "old").touch()
    assert find_or_build(tmp_path, KEY, fill).built
    assert find_bundles(tmp_path) == [tmp_path / bundle_name(KEY)]


def test_a_disk_that_fills_while_a_refused_engine_is_kept(tmp_path: Path, monkeypatch: Any):
    def refused(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise ParityError("differs", {})

    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(bundle, "write_durably", full_disk)
    with pytest.raises(BundleError, match=r"No space left on device.*--bundles"):
        find_or_build(tmp_path, KEY, refused, keep_refused=True)
    assert list(tmp_path.iterdir()) == []


def slow_fill(folder: Path) -> dict[str, Any]:
    fill(folder)
    (folder.parent / "started").touch()
    time.sleep(1.0)
    return {"parity": {}}


def build_slowly(bundles: Path, results: Any) -> None:
    results.put(find_or_build(bundles, KEY, slow_fill).built)


def start_builder(bundles: Path, results: Any) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(
        target=build_slowly, args=(bundles, results)
    )
    process.start()
    return process  # type: ignore[return-value]


def test_two_builders_at_once_make_one_bundle(tmp_path: Path):
    results = multiprocessing.get_context("fork").Queue()
    builders = [start_builder(tmp_path, results) for _ in range(2)]
    assert sorted(results.get(timeout=30) for _ in builders) == [False, True]
    for builder in builders:
        builder.join()


def test_a_killed_build_is_recovered_from(tmp_path: Path):
    builder = start_builder(tmp_path, multiprocessing.get_context("fork").Queue())
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert not (tmp_path / bundle_name(KEY)).exists()
    assert find_or_build(tmp_path, KEY, fill).built
    assert not list(tmp_path.glob(".*.partial"))
