"""AOTInductor packages equal torch, for one batch, on the machine that compiled them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.engine.expand import backends
from patchbloom.export import machine, to_inductor, to_openvino
from patchbloom.export.config import EngineSpec, Precision
from patchbloom.export.graphs import make_graphs
from patchbloom.export.models import Unavailable
from patchbloom.export.parity import check_parity, make_reference
from small_networks import new_parts


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("fp32", "denoiser"),
        ("fp32", "decoder"),
        pytest.param("bf16", "denoiser", marks=pytest.mark.slow),
    ],
)
def test_a_package_equals_torch(tmp_path: Path, precision: Precision, name: str):
    """A package holds its own weights: the module's are zeroed before it runs."""
    spec = EngineSpec(size_px=32, batch=4, images_per_prompt=2, precision=precision)
    graphs = make_graphs(new_parts(precision), spec, tokens=77)
    graph = next(graph for graph in graphs if graph.name == name)
    reference, key = make_reference(graph), to_inductor.flags(spec)
    to_inductor.export_graph(graph, tmp_path, spec)
    assert to_inductor.flags(spec) == key
    assert {path.name for path in tmp_path.iterdir()} <= {name, f"{name}.pt2", f"{name}.json"}
    for weights in graph.module.parameters():
        weights.data.zero_()
    session = to_inductor.PackageSession(tmp_path, name, "cpu")
    assert session.run(*reference.inputs).is_contiguous()
    measured = check_parity(reference, session.run)
    assert precision == "bf16" or measured["max_abs"] < 1e-5
    first, *rest = reference.inputs
    assert torch.equal(session.run(*reference.inputs), session.run(first.double(), *rest))
    assert not torch.allclose(session.run(first + 1, *rest).float(), reference.expected, atol=0.01)
    with pytest.raises(ValueError, match=r"must be \[4, .*, the engine's shape, got \[3, "):
        session.run(first[:3], *rest)
    session.close()


def test_what_it_needs_is_asked_for(monkeypatch: Any):
    to_inductor.require("bf16", "cpu")
    with pytest.raises(Unavailable, match="use --precision bf16"):
        to_inductor.require("fp16", "cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="install g\\+\\+"):
        to_inductor.require("fp32", "cpu")


def test_auto_takes_it_in_bf16_where_there_is_a_compiler(monkeypatch: Any):
    bf16 = EngineSpec(size_px=32, precision="bf16")
    assert backends.choose_backend(bf16) == "inductor"
    assert backends.choose_backend(EngineSpec(size_px=32)) == "ort"
    monkeypatch.setattr(backends, "cxx_compiler", lambda: None)
    monkeypatch.setattr(to_openvino, "_capabilities", lambda core: ["BF16", "FP32"])
    assert backends.choose_backend(bf16) == "openvino"
    monkeypatch.setattr(to_openvino, "_capabilities", lambda core: ["FP32"])
    assert backends.choose_backend(bf16) == "eager"


def test_another_processor_is_another_engine(monkeypatch: Any):
    spec = EngineSpec(size_px=32)
    here = to_inductor.flags(spec)
    assert here == to_inductor.flags(spec)
    monkeypatch.setattr(to_inductor, "cpu_instructions", lambda: ["sse", "another"])
    assert here != to_inductor.flags(spec)
    assert machine.cpu_instructions() == sorted(machine.cpu_instructions()) != []
