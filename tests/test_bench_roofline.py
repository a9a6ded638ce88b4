"""Figures shown beside a rate: FLOPs per image, and the limits measured on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import roofline
import torch
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.image_work import ImageWork, count_image_work
from patchbloom.export.models import find_model
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[1] / "bench"


def test_counted_work_is_what_an_expansion_computes() -> None:
    model, batch = find_model("sdxl-tiny"), 4
    config = ExpandConfig(size_px=64, batch=batch, backend="eager", device="cpu", steps=3, rho=0.7)
    expander = Expander(
        model,
        config,
        patches_NHWC=torch.zeros(batch, 32, 32, 3, dtype=torch.uint8),
        labels_N=torch.tensor([0, 0, 1, 1]).numpy(),
        prompts_K=("one", "two"),
    )
    with FlopCounterMode(display=False) as counter:
        expander.expand(torch.arange(batch), 0)
    work = count_image_work(model, size_px=64, batch=batch, evals=2)
    assert expander.schedule.evals == work.evals == 2
    assert counter.get_total_flops() == pytest.approx(batch * work.flops, rel=1e-3)


def test_the_floor_is_by_precision() -> None:
    work = ImageWork(denoiser=3e9, decoder=4e9, evals=4)
    reached = roofline.Roofline(flops={"fp16": 12e9, "fp32": 2e9}, copy_bytes_per_s=1e9)
    assert roofline.floor_s(work, reached, "fp16", "fp32") == 1.0 + 2.0
    assert roofline.work_row(work)["image_gflop"] == 16
    model = find_model("sdxl-tiny")
    assert roofline.peer_precisions("ort-bf16", model, "fp32") == ("bf16", "bf16")
    assert roofline.peer_precisions("diffusers-compiled", model, "fp32") == ("fp32", "fp32")
    assert roofline.peer_precisions("diffusers-compiled-bf16", model, "fp32") == ("bf16", "bf16")
    assert roofline.peer_precisions("diffusers", model, "fp16") == ("fp16", "fp16")
    assert roofline.peer_precisions("diffusers-upcast", model, "fp16") == ("fp16", "fp32")


@pytest.mark.parametrize(("slow", "tflops"), [("convolution", 2.147), ("product", 9.664)])
def test_the_roofline_counts_the_faster_arithmetic_and_both_ways_of_a_copy(
    monkeypatch: pytest.MonkeyPatch, slow: str, tflops: float
) -> None:
    ran = []

    def one_ms(call, device: str) -> dict[str, float]:
        with FlopCounterMode(display=False) as counter:
            result = call()
        ran.append((counter.get_total_flops(), result.nbytes, bool((result != 0).any())))
        is_slow = len(ran) == {"product": 1, "convolution": 2}[slow]
        return {"p50": 100_000.0 if is_slow else 1000.0}

    monkeypatch.setattr(roofline, "time_us", one_ms)
    found = roofline.measure_roofline("cpu", ["bf16", "bf16"])
    (product, _, random), (convolution, _, also_random), (_, copied, _) = ran
    assert random
    assert also_random
    assert found.flops == {"bf16": (product if slow == "convolution" else convolution) / 1e-3}
    assert found.copy_bytes_per_s == 2 * copied / 1e-3
    assert found.row() == {"reached_tflops": {"bf16": tflops}, "copy_gb_per_s": 268.4}


def test_on_a_gpu_a_convolution_is_no_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "matmul_flops", lambda device, precision: 1.0)
    monkeypatch.setattr(roofline, "convolution_flops", lambda device, precision: 2.0)
    assert roofline.arithmetic_flops("cuda", "fp32") == 1.0
    assert roofline.arithmetic_flops("cpu", "fp32") == 2.0
