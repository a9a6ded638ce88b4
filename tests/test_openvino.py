"""OpenVINO equals torch in fp32 and bf16, on the CPU, at one batch; or says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.engine.expand.backends import CompiledBackend
from patchbloom.export import to_openvino
from patchbloom.export.config import EngineSpec, Precision
from patchbloom.export.engines import open_engine, require_engine
from patchbloom.export.graphs import make_graphs
from patchbloom.export.models import Unavailable, find_model
from patchbloom.export.parity import check_parity, make_reference
from small_networks import new_parts

HAS_BF16 = "BF16" in to_openvino._capabilities(to_openvino._core())


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="no bf16 units"))],
)
def test_an_engine_equals_torch(tmp_path: Path, precision: Precision) -> None:
    spec = EngineSpec(size_px=32, batch=4, images_per_prompt=2, precision=precision)
    references = [make_reference(g) for g in make_graphs(new_parts(precision), spec, tokens=77)]
    model = find_model("sdxl-tiny")
    bundle = open_engine("openvino", model, new_parts(precision), spec, bundles=tmp_path)
    assert {path.suffix for path in bundle.folder.iterdir()} == {".blob", ".json"}
    backend = CompiledBackend(bundle, spec)
    for reference in references:
        session = backend._sessions[reference.graph]
        measured = check_parity(reference, session.run)
        assert measured["relative_l2"] < (1e-5 if precision == "fp32" else 2e-2)
        # Inputs of another dtype are temporary, and must live until the call ends.
        first, *rest = reference.inputs
        before = session.run(first, *rest).clone()
        assert torch.equal(session.run(first.double(), *(each.double() for each in rest)), before)
        assert not torch.allclose(session.run(first + 1, *rest), before, atol=1e-3)
        with pytest.raises(ValueError, match=r"must be \[4, .*, the engine's shape, got \[3, "):
            session.run(first[:3], *rest)
    backend.close()


def test_a_large_graph_stays_onnx(tmp_path: Path, monkeypatch: Any) -> None:
    spec = EngineSpec(size_px=32, batch=2)
    encoder, *_ = make_graphs(new_parts("fp32"), spec, tokens=77)
    to_openvino.export_graph(encoder, tmp_path, spec)
    monkeypatch.setattr(to_openvino, "GRAPHS", ("encoder",))
    monkeypatch.setattr(to_openvino, "STORED_BYTES", 0)
    to_openvino.compile_graphs(tmp_path, spec, print)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.onnx", "encoder.json"}
    (session,) = to_openvino.open_sessions(tmp_path, spec).values()
    check_parity(make_reference(encoder), session.run)
    monkeypatch.undo()
    monkeypatch.setattr(to_openvino, "GRAPHS", ("encoder",))
    (tmp_path / "encoder.onnx.data").touch()  # as a graph of more than 1.5 GB has
    to_openvino.compile_graphs(tmp_path, spec, print)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.blob", "encoder.json"}


@pytest.mark.parametrize(
    ("precision", "device", "told"),
    [("fp32", "cuda", "use --device cpu"), ("fp16", "cpu", "use --precision bf16")],
)
def test_what_it_cannot_do_is_refused(precision: Precision, device: str, told: str) -> None:
    with pytest.raises(Unavailable, match=told):
        to_openvino.require(precision, device)


def test_a_range_of_batches_is_refused() -> None:
    spec = EngineSpec(size_px=32, batch=4, min_batch=2)
    with pytest.raises(Unavailable, match="leave out --min-batch"):
        require_engine("openvino", find_model("sdxl-tiny"), spec)


def test_bf16_is_refused_where_it_would_be_computed_in_fp32(monkeypatch: Any) -> None:
    monkeypatch.setattr(to_openvino, "_capabilities", lambda core: ["FP32", "INT8"])
    to_openvino.require("fp32", "cpu")
    with pytest.raises(Unavailable, match=r"no units for bf16.*use --precision fp32"):
        to_openvino.require("bf16", "cpu")


@pytest.mark.parametrize(
    ("found", "told"), [(None, "needs OpenVINO: pip install"), ("2024.6.0", "got 2024.6.0")]
)
def test_a_library_that_is_missing_or_old_is_told(
    found: str | None, told: str, monkeypatch: Any
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise to_openvino.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(to_openvino, "version", version)
    to_openvino._core.cache_clear()
    with pytest.raises(Unavailable, match=told):
        to_openvino.require("fp32", "cpu")
