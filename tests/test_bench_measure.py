"""Timing waits for the device, memory peaks are per peer, and a row names the GPU."""

from __future__ import annotations

from pathlib import Path

import measure
import peak_memory
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
MIB = 2**20


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_memory_is_what_a_peer_holds_and_needs(device: str) -> None:
    def floats(mib: int) -> torch.Tensor:
        return torch.ones(mib * MIB // 4, device=device)

    floats(300)  # another peer's, freed
    watch = peak_memory.MemoryWatch(device)
    held = floats(64)
    floats(400)  # while opening, outside the pass
    found = watch.peak_of(lambda: floats(96).sum() + held.sum())
    assert all(size > 150 * MIB for size in found.values()), found
    limit = 190 * MIB
    assert found["process_bytes" if device == "cpu" else "torch_bytes"] < limit, found


def test_a_peak_has_no_heap_that_is_free_by_then() -> None:
    watch = peak_memory.MemoryWatch("cpu")
    built = [bytearray(50_000) for _ in range(4000)]
    kept = [bytearray(50_000) for _ in built[::100]]  # the last holds the top of the heap
    del built[:]
    found = watch.peak_of(lambda: len(kept))
    assert found["process_bytes"] < 60 * MIB, found


def test_a_peak_that_cannot_be_counted_anew_is_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    assert peak_memory.MemoryWatch("cpu").peak_of(list) == {"process_bytes": None}


@pytest.mark.gpu
def test_a_pass_ends_when_all_streams_do() -> None:
    cycles = 10**8  # at least 50 ms
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
def test_a_row_names_the_gpu() -> None:
    row = measure.environment("cuda")
    assert row["sm_count"] > 0
    assert row["cuda"]
    assert set(measure.GPU_QUERIES) < set(row)
    if row["driver"] is not None:  # nvidia-smi is installed
        assert 0 < row["clock_sm_mhz"] <= row["clock_sm_max_mhz"]
