"""ONNX graphs: as specified, in either opset, in fp16, over a range of batches."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from patchbloom.export import to_ort
from patchbloom.export.config import EngineSpec
from patchbloom.export.graphs import Graph, make_graphs
from patchbloom.export.models import ModelParts
from patchbloom.export.ort_reference import run_on_cpu
from patchbloom.export.parity import check_parity, make_host_reference, make_reference
from patchbloom.export.to_onnx import export_onnx
from patchbloom.export.to_ort import OrtSession
from small_networks import new_parts


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    return new_parts()


def graphs_of(parts: ModelParts, **settings: Any) -> dict[str, Graph]:
    spec = EngineSpec(size_px=32, **settings)
    return {graph.name: graph for graph in make_graphs(parts, spec, tokens=77)}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("name", ["encoder", "denoiser", "decoder"])
@pytest.mark.parametrize("opset", [21, 23])
def test_either_opset_runs_and_equals_torch(
    parts: ModelParts, tmp_path: Path, name: str, opset: Any
):
    """export_onnx itself runs onnx.checker and checks names, shapes, types and opset."""
    graph = graphs_of(parts, batch=4, images_per_prompt=2)[name]
    path = tmp_path / "graph.onnx"
    export_onnx(graph, path, opset=opset, native_group_norm=False)
    assert check_parity(make_reference(graph), OrtSession(path, "cpu").run)["max_abs"] < 1e-4
    if name == "denoiser":
        assert ("Attention" in operators(path)) == (opset == 23)


def test_half_precision_weights_stay_so(tmp_path: Path):
    """ONNX Runtime has no fp16 kernels on the CPU: the graph is checked, not run."""
    half = graphs_of(new_parts("fp16"), batch=4, images_per_prompt=2, precision="fp16")
    for graph in half.values():
        path = tmp_path / f"{graph.name}.onnx"
        export_onnx(graph, path, native_group_norm=True)
        weights = [
            weight
            for weight in onnx.load(path).graph.initializer
            if weight.name.endswith(".weight") and len(weight.dims) > 1
        ]
        assert len(weights) > 10
        assert {weight.data_type for weight in weights} == {onnx.TensorProto.FLOAT16}
        assert "GroupNormalization" in operators(path)


def test_a_graph_for_ort_on_a_gpu_has_operators_that_ort_has_there(tmp_path: Path):
    """In half precision: ONNX Runtime computes the graph in fp32 on the CPU."""
    half = {"batch": 2, "images_per_prompt": 2, "precision": "fp16"}
    spec, path = EngineSpec(size_px=32, device="cuda", **half), tmp_path / "decoder.onnx"
    decoder = graphs_of(new_parts("fp16"), **half)["decoder"]
    reference = make_host_reference(decoder)
    to_ort.export_graph(decoder, tmp_path, spec)
    assert "InstanceNormalization" in operators(path)
    assert "GroupNormalization" not in operators(path)
    assert check_parity(reference, partial(run_on_cpu, path))["relative_l2"] < 2e-3


@pytest.mark.parametrize(("n", "least"), [(2, 2), (1, 3)])
def test_a_range_of_batches(parts: ModelParts, tmp_path: Path, n: int, least: int):
    """From the smallest batch to 70, past the 64 images at which diffusers' upsampler branches."""
    batches = {"images_per_prompt": n, "batch": 70}
    ranged = graphs_of(parts, **batches, min_batch=least)
    for name, graph in ranged.items():
        path = tmp_path / f"{name}.onnx"
        export_onnx(graph, path, native_group_norm=False)
        session = OrtSession(path, "cpu", (least // n, 70 // n))
        for batch in (least, 8, 70):
            reference = make_reference(graphs_of(parts, images_per_prompt=n, batch=batch)[name])
            found = check_parity(reference, session.run)
            assert found["max_abs"] < 1e-4
            assert session.run(*reference.inputs).shape == reference.expected.shape
        first = graph.inputs[0]
        for wrong in (least - 1, 70 + n, least + 1):
            if n == 1 and wrong == least + 1:
                continue
            values = [
                torch.zeros(wrong * port.per_prompt // n or 1, *port.shape[1:])
                for port in graph.inputs
            ]
            with pytest.raises(ValueError, match=rf"{first.name} must have {least} to 70 rows"):
                session.run(*values)


def test_a_range_is_of_whole_prompts():
    for least in (0, 3, 8):
        with pytest.raises(ValueError, match="min_batch must be a multiple of images_per_prompt"):
            EngineSpec(size_px=32, batch=8, images_per_prompt=2, min_batch=least)


def test_a_graph_that_is_not_as_specified_is_refused(parts: ModelParts, tmp_path: Path):
    decoder = graphs_of(parts, batch=4)["decoder"]
    wrong = dataclasses.replace(decoder.output, shape=(4, 3, 64, 64))
    with pytest.raises(RuntimeError, match="expected"):
        export_onnx(
            dataclasses.replace(decoder, output=wrong), tmp_path / "g.onnx", native_group_norm=True
        )
