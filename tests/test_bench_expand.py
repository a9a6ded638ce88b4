"""bench_expand.py: which peers each backend is compared with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_expand
import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_ours_is_compared_with_every_peer() -> None:
    speeds = {"diffusers": 10, "diffusers-bf16": 20, "diffusers-upcast": 5, "eager-bf16": 40}
    rates = {name: bench_expand.Rate((speed, speed, 2 * speed)) for name, speed in speeds.items()}
    found = bench_expand.compared(rates)
    over = {
        peer: {name: ratio["p50"] for name, ratio in ours.items()}
        for peer, ours in found["speedup_over"].items()
    }
    assert over == {
        "diffusers": {"eager-bf16": 4},
        "diffusers-bf16": {"eager-bf16": 2},
        "diffusers-upcast": {"eager-bf16": 8},
    }
    assert found["speedup"] == {"diffusers-bf16": 2, "diffusers-upcast": 0.5, "eager-bf16": 4}
    del rates["diffusers"]
    alone = bench_expand.compared(rates)
    assert alone["speedup"] == {}
    assert alone["speedup_over"]["diffusers-upcast"].keys() == {"eager-bf16"}


@pytest.mark.parametrize(
    ("name", "peer", "precision", "is_peer"),
    [
        ("diffusers", "diffusers", None, True),
        ("diffusers-compiled-bf16", "diffusers-compiled", "bf16", True),
        ("diffusers-upcast", "diffusers-upcast", None, True),
        ("torchvision-tensor", "torchvision-tensor", None, True),
        ("inductor-fp16", "inductor", "fp16", False),
        ("compile-launched-bf16", "compile-launched", "bf16", False),
        ("openvino-tiny-int8", "openvino-tiny", "int8", False),
        ("ort", "ort", None, False),
    ],
)
def test_what_a_name_says(name: str, peer: str, precision: str | None, is_peer: bool) -> None:
    assert bench_expand.split_name(name) == (peer, precision)
    assert bench_expand.is_peer(name) is is_peer


def test_a_row_names_the_backends_whose_graph_was_recorded() -> None:
    def expander(graph: object) -> Any:
        return SimpleNamespace(_graph=graph, describe=dict)

    recorded, refused = (SimpleNamespace(_graph=each) for each in (object(), None))
    made = {"eager": recorded, "compile": refused, "eager-launched": None}
    peers = bench_expand.Peers(expanders={name: expander(graph) for name, graph in made.items()})
    assert bench_expand.gated(peers)["recorded"] == ["eager"]


@pytest.mark.parametrize("asked", [{}, {"tiny_decoder": "sdxl-tiny"}])
def test_a_tiny_decoder_is_asked_for_by_folder(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tiny.decoder"):
        bench_expand.tiny_model(bench_expand.Options(**asked))
