"""Guards that memory which batches leave behind goes back to the system."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from patchbloom.engine.data.heap import give_back_free_heap

BLOCK_BYTES, BLOCKS = 60_000, 4000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_free_blocks_between_used_ones_go_back() -> None:
    blocks = [bytearray(BLOCK_BYTES) for _ in range(BLOCKS)]
    used = blocks[::8]
    blocks.clear()
    before = resident_bytes()
    give_back_free_heap()
    assert before - resident_bytes() > BLOCK_BYTES * BLOCKS / 2
    assert sum(map(len, used)) == BLOCK_BYTES * BLOCKS / 8
