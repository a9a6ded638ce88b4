"""Peak memory that one peer adds, although others live in the same process.

    watch = MemoryWatch(device)     before the peer is opened
    watch.peak_of(one_pass)         peak memory of a pass, minus what was in use before

On a GPU `torch_bytes` is from torch's allocator (max_memory_allocated). ONNX Runtime and TensorRT
allocate outside it, so `device_bytes` is the growth of the whole device's memory after the pass,
including torch's cache of free memory. On the CPU `process_bytes` is from the resident set's peak
(VmHWM), which the kernel resets for every peer; mapped weights count once they are read. Temporary
memory of opening and checking a peer, such as an engine's build, is in none of them: free heap
goes back to the system before a pass (glibc only).
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
    """Records the memory in use when it is created."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = self._in_use()

    def peak_of(self, one_pass: Callable[[], object]) -> dict[str, int | None]:
        """Run one more pass; bytes that the peer holds plus what its pass needs on top.

        None: not known, because the kernel does not let this process reset the peak.
        """
        if self._device == "cpu":
            gc.collect()
            _give_back_free_heap()
            known = _forget_peak()
            one_pass()
            grown = _status_bytes("VmHWM") - self._before["process_bytes"]
            return {"process_bytes": grown if known else None}
        torch.cuda.empty_cache()  # Left over from opening and checking the peer.
        torch.cuda.reset_peak_memory_stats()
        one_pass()
        torch.cuda.synchronize()
        peak = {"torch_bytes": torch.cuda.max_memory_allocated(), "device_bytes": _device_bytes()}
        return {name: found - self._before[name] for name, found in peak.items()}

    def _in_use(self) -> dict[str, int]:
        gc.collect()
        if self._device == "cpu":
            _give_back_free_heap()  # Otherwise a peer reuses heap that others freed.
            return {"process_bytes": _status_bytes("VmRSS")}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"torch_bytes": torch.cuda.memory_allocated(), "device_bytes": _device_bytes()}


def _give_back_free_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    """Reset VmHWM; whether the kernel allowed it."""
    try:
        CLEAR_REFS.write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def _device_bytes() -> int:
    """Bytes in use on the whole GPU."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.M)
    if match is None:
        raise OSError(f"{STATUS}: expected a line {name}, found none; peak memory needs Linux")
    return 1024 * int(match[1])
