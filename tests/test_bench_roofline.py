"""What stands beside a rate: the arithmetic of an image, the roofline, peak memory, true ends."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.turbo import Expander
from patchbloom.export.models import find_model
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[1] / "bench"
MIB = 2**20


@pytest.fixture(scope="module")
def bench() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield patch


@pytest.fixture(scope="module")
def roofline(bench: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("roofline")


@pytest.fixture(scope="module")
def measure(bench: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("measure")


@pytest.fixture(scope="module")
def peak_memory(bench: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("peak_memory")


def test_counted_work_is_what_an_expansion_computes(roofline: ModuleType) -> None:
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
    work = roofline.count_image_work(model, size_px=64, batch=batch, evals=2)
    assert expander.schedule.evals == work.evals == 2
    assert counter.get_total_flops() == pytest.approx(batch * work.flops, rel=1e-3)


def test_the_floor_is_by_precision(roofline: ModuleType) -> None:
    work = roofline.ImageWork(denoiser=3e9, decoder=4e9, evals=4)
    reached = roofline.Roofline(flops={"fp16": 12e9, "fp32": 2e9}, copy_bytes_per_s=1e9)
    assert work.floor_s(reached, "fp16", "fp32") == 1.0 + 2.0
    assert work.row()["image_gflop"] == 16
    model = find_model("sdxl-tiny")
    assert roofline.peer_precisions("ort-bf16", model, "fp32") == ("bf16", "bf16")
    assert roofline.peer_precisions("diffusers-compiled", model, "fp32") == ("fp32", "fp32")


def test_the_roofline_counts_products_and_both_ways_of_a_copy(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def one_ms(call, device: str) -> dict[str, float]:
        with FlopCounterMode(display=False) as counter:
            result = call()
        ran.append((counter.get_total_flops(), result.nbytes, bool((result != 0).any())))
        return {"p50": 1000.0}

    monkeypatch.setattr(roofline, "time_us", one_ms)
    found = roofline.measure_roofline("cpu", ["bf16", "bf16"])
    (flops, _, random), (_, copied, _) = ran
    assert random
    assert found.flops == {"bf16": flops / 1e-3}
    assert found.copy_bytes_per_s == 2 * copied / 1e-3
    assert found.row() == {"matmul_tflops": {"bf16": 2.147}, "copy_gb_per_s": 268.4}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_memory_is_what_a_peer_holds_and_needs(peak_memory: ModuleType, device: str) -> None:
    def floats(mib: int) -> torch.Tensor:
        return torch.ones(mib * MIB // 4, device=device)

    floats(300)  # of another peer, and free again
    watch = peak_memory.MemoryWatch(device)
    held = floats(64)
    floats(400)  # while it is opened, and not in a pass
    found = watch.peak_of(lambda: floats(96).sum() + held.sum())
    assert all(size > 150 * MIB for size in found.values()), found
    limit = 190 * MIB
    assert found["process_bytes" if device == "cpu" else "torch_bytes"] < limit, found


@pytest.mark.gpu
def test_a_pass_ends_when_all_streams_do(measure: ModuleType) -> None:
    cycles = 10**8  # 50 ms and more
    side = torch.cuda.Stream()

    def on(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)

    on(side)
    plain = min(measure.timed(lambda: on(torch.cuda.current_stream()))[0] for _ in range(3))
    beside = min(measure.timed(lambda: on(side))[0] for _ in range(3))
    assert plain > 0.02
    assert beside == pytest.approx(plain, rel=0.1)


@pytest.mark.gpu
def test_a_row_names_the_gpu(measure: ModuleType) -> None:
    row = measure.environment("cuda")
    assert row["sm_count"] > 0
    assert row["cuda"]
    assert set(measure.GPU_QUERIES) < set(row)
    if row["driver"] is not None:  # Where nvidia-smi is.
        assert 0 < row["clock_sm_mhz"] <= row["clock_sm_max_mhz"]
