"""Images per engine call that fill a card and fit into it; none was run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Command
from patchbloom.engine.builds.cards import CARDS, Card, card_here, most_per_call, named_card
from patchbloom.engine.builds.needs import engine_needs
from patchbloom.export.config import EngineSpec, Precision, VaePrecision
from patchbloom.export.models import find_model
from patchbloom.export.trt_library import TARGETS
from patchbloom.train.commands.planning import make_plan
from patchbloom.train.options import Train
from patchbloom.train.run.progress import Report

A100, H100, H200 = Card(108, 80), Card(132, 80), Card(132, 141)


@pytest.mark.parametrize(
    ("size_px", "precision", "vae", "batches"),
    [  # 16 GB, 24 GB twice, 48 GB, 80 GB twice, 141 GB
        (224, "fp16", "auto", (32, 48, 64, 48, 64, 64, 64)),
        (224, "fp32", "auto", (16, 32, 32, 48, 64, 64, 64)),
        (512, "fp16", "auto", (32, 32, 32, 32, 32, 32, 32)),
        (512, "fp16", "fp32", (16, 32, 32, 32, 32, 32, 32)),
        (512, "fp32", "auto", (16, 16, 16, 32, 32, 32, 32)),
    ],
)
def test_sdxl_turbo_fills_a_card_and_fits(
    size_px: int, precision: Precision, vae: VaePrecision, batches: tuple[int, ...]
) -> None:
    spec = EngineSpec(size_px=size_px, precision=precision, vae_precision=vae, device="cuda")
    named = (CARDS[name] for name in ("t4", "rtx3090", "rtx4090", "a6000"))
    needs = engine_needs(find_model("sdxl-turbo", "random"), spec, "eager")
    assert batches == tuple(most_per_call(needs, card) for card in (*named, A100, H100, H200))


def test_every_card_to_build_for_has_a_data_sheet() -> None:
    assert CARDS.keys() == {card for cards in TARGETS.values() for card in cards}
    assert named_card("A6000") == Card(84, 48)
    assert named_card("NVIDIA GeForce RTX 4090") == CARDS["rtx4090"]


def test_the_card_here_is_read_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class H200Properties:
        multi_processor_count, total_memory = 132, 150_754_820_096

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200Properties)
    assert card_here() == Card(132, 150.754820096)


def test_a_run_has_the_batch_of_its_smallest_card(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch of 40 images: 20 divide it where 32 fill the card."""

    def plan_batch(*cards: Card, **options: Any) -> int:
        asked = Train(data=str(shapes), out=tmp_path / "run", model="sdxl-tiny", **options)
        return make_plan(asked, Report(), cards).expand.batch

    small = Card(1, 24)
    assert [plan_batch(), plan_batch(small), plan_batch(H200)] == [20, 20, 40]
    assert plan_batch(H200, small) == 20
    assert plan_batch(H200, engine_batch=8) == 8
    assert capsys.readouterr().err.count("engine batch: 20 (choose with --engine-batch)") == 2
    plan_batch(H200, method=("random",))
    assert "engine batch" not in capsys.readouterr().err


def test_engines_for_cards_that_fill_at_other_batches(
    train: Command, shapes: Path, tmp_path: Path
) -> None:
    given = (
        "--data",
        shapes,
        "--model",
        "sdxl-tiny",
        "--out",
        tmp_path / "run",
        "--backend",
        "trt",
    )
    error = train(*given, "--build-only", "sm86").error
    assert "--build-only sm86: the images per call follow from the card's memory" in error
    error = train(*given, "--build-only", "t4", "rtx4090").error
    assert "images per call fill these cards: name one at a time" in error
