"""bench/predict.py: counted work against sums by hand."""

from __future__ import annotations

import bench_expand
import predict
import pytest
import torch
from patchbloom.export.models import find_model
from predict import Batch, Kernel, Operator
from roofline import Roofline, count_image_work
from torch import nn

LIMITS = Roofline(flops={"fp16": 100.0, "fp32": 10.0}, copy_bytes_per_s=50.0)


def test_a_batch_takes_its_slower_half_kernel_by_kernel() -> None:
    batch = Batch(8, [Kernel(200.0, 10.0), Kernel(10.0, 100.0)], [Kernel(10.0, 5.0)], launches=3)
    device_s = 200 / 100 + 100 / 50 + 10 / 10
    assert batch.images_per_s(LIMITS, "fp16", "fp32", host_us=0) == pytest.approx(8 / device_s)
    assert batch.images_per_s(LIMITS, "fp16", "fp32", host_us=2e6) == pytest.approx(8 / 6)


def test_a_trace_counts_products_and_bytes_but_no_views() -> None:
    layer = nn.Linear(4, 8, bias=False, device="meta")
    x = torch.empty(2, 4, device="meta")
    wide = torch.empty(2, 1, device="meta").expand(2, 8)
    product, added = predict.trace(layer, lambda: layer(x).view(2, 8).relu_() + wide)[::2]
    assert (product.name, product.flops) == ("mm", 2 * 2 * 4 * 8)
    assert sum(product.reads.values()) == 4 * (2 * 4 + 4 * 8)
    assert sum(product.writes.values()) == sum(added.writes.values()) == 4 * 2 * 8
    assert sum(added.reads.values()) == 4 * (2 * 8 + 2 * 1)

    q = torch.empty(1, 3, 5, 16, device="meta")
    k = torch.empty(1, 3, 7, 16, device="meta")
    attend = nn.functional.scaled_dot_product_attention
    (attention,) = predict.trace(layer, lambda: nn.functional.scaled_dot_product_attention(q, k, k))
    assert nn.functional.scaled_dot_product_attention is attend
    assert attention.flops == 2 * 2 * 3 * 5 * 7 * 16
    assert sum(attention.reads.values()) == 4 * 3 * 16 * (5 + 7)


def test_runs_of_a_region_are_fused_and_keep_only_what_is_read_later() -> None:
    def operator(name: str, flops: float, reads: str, writes: str, region: int) -> Operator:
        sizes = {"x": 100, "w": 7, "a": 10, "b": 20, "c": 30, "d": 40, "e": 50, "y": 100}
        ids = {letter: number for number, letter in enumerate(sizes)}
        return Operator(
            name,
            flops,
            {ids[each]: sizes[each] for each in reads},
            {ids[each]: sizes[each] for each in writes},
            region,
        )

    operators = [
        operator("silu", 0, "x", "a", 0),
        operator("native_group_norm", 0, "a", "b", 1),
        operator("silu", 0, "b", "c", 1),
        operator("mm", 9, "cw", "d", 1),
        operator("add", 0, "da", "e", 1),
        operator("add", 0, "e", "y", 2),
    ]
    assert predict.fused(operators) == [
        Kernel(0, 100 + 10),
        Kernel(0, 10 + 30),  # b is written for the region alone
        Kernel(0, 10),  # statistics
        Kernel(9, 30 + 7 + 40),
        Kernel(0, 40 + 10 + 50),
        Kernel(0, 50 + 100),
    ]
    assert [each.bytes for each in predict.single(operators)] == [110, 30, 50, 77, 100, 150]


def test_all_backends_do_the_same_arithmetic_with_fewer_launches() -> None:
    model, shapes = find_model("sdxl-tiny"), {"size_px": 64, "batch": 4, "evals": 2}
    counted = predict.count_batches(model, **shapes, precision="fp32", vae="fp32")
    work = count_image_work(model, **shapes)
    flops = {
        name: sum(kernel.flops for kernel in (*each.denoiser, *each.vae)) / 4
        for name, each in counted.items()
    }
    assert flops["diffusers"] > 1.1 * work.flops
    for name in ("eager", "compile", "inductor", "graph"):
        assert flops[name] == pytest.approx(work.flops, rel=1e-6)
    launches = [each.launches for each in counted.values()]
    assert launches == sorted(launches, reverse=True)
    assert launches[-1] == 1 < launches[-2]


def test_a_known_card_is_predicted_by_its_data_sheet() -> None:
    model, shapes = find_model("sdxl-tiny"), {"size_px": 64, "batch": 4, "evals": 1}
    peers = {"eager": ("fp16", "fp16"), "trt": ("fp16", "fp16"), "eager-fp32": ("fp32", "fp32")}
    slow = Roofline(flops={"fp16": 1e9, "fp32": 1e9}, copy_bytes_per_s=1e9)
    known = predict.predict_rates(model, peers, slow, "NVIDIA H200", **shapes)
    other = predict.predict_rates(model, peers, slow, "Another", **shapes)
    assert known.keys() == other.keys() == {"eager", "eager-fp32"}
    assert known["eager"] > 100 * other["eager"]
    assert predict.card_roofline("NVIDIA H200").flops["fp16"] == pytest.approx(791.5e12, rel=1e-3)
    assert bench_expand.predict_rates is predict.predict_rates
