"""What one peer adds to the memory in use, though others live in the same process.

    watch = MemoryWatch(device)     before the peer is opened
    watch.peak_of(one_pass)         most memory during a pass, less what was in use before

On a GPU `torch_bytes` is of torch's allocator (max_memory_allocated); ONNX Runtime and TensorRT
allocate outside it, so `device_bytes` is what the device holds more after the pass, with torch's
cache of free memory. On the CPU `process_bytes` is of the resident set (VmHWM), which the kernel
counts anew for every peer; weights that are mapped count as they are read. What opening a peer
takes for a while, such as an engine's build, is in none of them.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"


class MemoryWatch:
    """Remembers what is in use when it is made."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = self._in_use()

    def peak_of(self, one_pass: Callable[[], object]) -> dict[str, int]:
        """Bytes that the peer holds and its pass needs on top, from one more pass."""
        if self._device == "cpu":
            CLEAR_REFS.write_text(FORGET_PEAK)
            one_pass()
            return {"process_bytes": _status_bytes("VmHWM") - self._before["process_bytes"]}
        torch.cuda.empty_cache()  # What opening and checking the peer left there.
        torch.cuda.reset_peak_memory_stats()
        one_pass()
        torch.cuda.synchronize()
        peak = {"torch_bytes": torch.cuda.max_memory_allocated(), "device_bytes": _device_bytes()}
        return {name: found - self._before[name] for name, found in peak.items()}

    def _in_use(self) -> dict[str, int]:
        gc.collect()
        if self._device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # Else a peer grows into what others have freed.
            return {"process_bytes": _status_bytes("VmRSS")}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"torch_bytes": torch.cuda.memory_allocated(), "device_bytes": _device_bytes()}


def _device_bytes() -> int:
    """In use on the whole GPU."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.M)
    if match is None:
        raise OSError(f"{STATUS}: expected a line {name}, found none; peak memory needs Linux")
    return 1024 * int(match[1])
