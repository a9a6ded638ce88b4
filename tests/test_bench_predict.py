"""bench/predict.py: counted work against sums by hand."""

from __future__ import annotations

import bench_expand
import predict
import pytest
import torch
from patchbloom.engine.expand.image_work import count_image_work
from patchbloom.export.models import find_model
from predict import Batch, Kernel, Operator
from roofline import Roofline
from torch import nn

LIMITS = Roofline(flops={"fp16": 100.0, "fp32": 10.0}, copy_bytes_per_s=50.0)


def test_a_batch_takes_its_slower_half_kernel_by_kernel() -> None:
    kernels = [Kernel(200.0, 10.0), Kernel(10.0, 100.0)], [Kernel(10.0, 5.0)]
    device_s = 200 / 100 + 100 / 50 + 10 / 10
    for host_us, seconds in ((0.0, device_s), (2e6, 6)):
        batch = Batch(8, *kernels, launches=3, host_us=host_us)
        assert batch.images_per_s(LIMITS, "fp16", "fp32") == pytest.approx(8 / seconds)


def test_a_trace_counts_products_and_bytes_but_no_views() -> None:
    layer = nn.Linear(4, 8, bias=False, device="meta")
    x = torch.empty(2, 4, device="meta")
    wide = torch.empty(2, 1, device="meta").expand(2, 8)
    product, added = predict.trace(layer, lambda: layer(x).view(2, 8).relu_() + wide)[::2]
    assert (product.name, product.flops) == ("mm", 2 * 2 * 4 * 8)
    assert sum(product.reads.values()) == 4 * (2 * 4 + 4 * 8)
    assert sum(product.writes.values()) == sum(added.writes.values()) == 4 * 2 * 8
    assert sum(added.reads.values()) == 4 * (2 * 8 + 2 * 1)

    image = torch.empty(2, 3, 4, 4, device="meta")
    into_channels_last = {"memory_format": torch.channels_last}
    copies = predict.trace(layer, lambda: image.contiguous(**into_channels_last).contiguous())
    assert len(copies) == 1

    q = torch.empty(1, 3, 5, 16, device="meta")
    k = torch.empty(1, 3, 7, 16, device="meta")
    attend = nn.functional.scaled_dot_product_attention
    (attention,) = predict.trace(layer, lambda: nn.functional.scaled_dot_product_attention(q, k, k))
    assert nn.functional.scaled_dot_product_attention is attend
    assert attention.flops == 2 * 2 * 3 * 5 * 7 * 16
    assert sum(attention.reads.values()) == 4 * 3 * 16 * (5 + 7)


def test_runs_of_a_region_are_fused_and_keep_only_what_is_read_later() -> None:
    def operator(name: str, flops: float, reads: str, writes: str, region: int) -> Operator:
        sizes = {"x": 100, "w": 7, "a": 10, "b": 20, "c": 30, "d": 40, "e": 50, "y": 100, "z": 100}
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
        operator("geglu", 0, "y", "z", 2),  # a kernel of ours
    ]
    assert predict.fused(operators) == [
        Kernel(0, 100 + 10),
        Kernel(0, 10 + 30),  # b is written for the region alone
        Kernel(0, 10),  # statistics
        Kernel(9, 30 + 7 + 40),
        Kernel(0, 40 + 10 + 50),
        Kernel(0, 50 + 100),
        Kernel(0, 100 + 100),
    ]
    assert [each.bytes for each in predict.single(operators)] == [110, 30, 50, 77, 100, 150, 200]


def test_all_backends_do_the_same_arithmetic_with_fewer_launches() -> None:
    """A CPU has neither fused layers nor graphs."""
    model, shapes = find_model("sdxl-tiny"), {"size_px": 64, "batch": 4, "evals": 2}
    work, launches = count_image_work(model, **shapes), {}
    for device in ("cuda", "cpu"):
        counted = predict.count_batches(
            model, device=device, **shapes, precision="fp32", vae="fp32"
        )
        flops = {
            name: sum(kernel.flops for kernel in (*each.denoiser, *each.vae)) / 4
            for name, each in counted.items()
        }
        assert flops.pop("diffusers") > 1.1 * work.flops
        assert list(flops.values()) == pytest.approx([work.flops] * len(flops), rel=1e-6)
        launches[device] = {name: each.launches for name, each in counted.items()}
    ours = [f"{name}-launched" for name in ("eager", "compile", "inductor")]
    for device, each in launches.items():
        counts = [each[name] for name in ("diffusers", *ours)]
        assert counts == sorted(counts, reverse=True)
        graphs = [each[name.removesuffix("-launched")] for name in ours]
        assert graphs == ([1, 1, 1] if device == "cuda" else counts[1:])
    stock, fused = (launches[device]["eager-launched"] for device in ("cpu", "cuda"))
    assert fused < stock


def test_a_known_card_is_predicted_by_its_data_sheet() -> None:
    model, shapes = find_model("sdxl-tiny"), {"size_px": 64, "batch": 4, "evals": 1}
    half = ("fp16", "fp16")
    peers = {"eager": half, "trt": half, "eager-launched-fp32": ("fp32", "fp32")}
    slow = Roofline(flops={"fp16": 1e9, "fp32": 1e9}, copy_bytes_per_s=1e9)
    known, other = (
        predict.predict_rates(model, asked, slow, card, device="cuda", **shapes)
        for card, asked in (("NVIDIA H200", peers), ("Another", {"eager": half}))
    )
    assert known.keys() == {"eager", "eager-launched-fp32"}
    assert known["eager"] > 100 * other["eager"]
    assert predict.card_roofline("NVIDIA H200").flops["fp16"] == pytest.approx(791.5e12, rel=1e-3)
    assert bench_expand.predict_rates is predict.predict_rates
