"""What one peer adds to the memory in use, though others live in the same process.

    watch = MemoryWatch(device)     before the peer is opened
    watch.peak_of(one_pass)         most memory during a pass, less what was in use before

On a GPU `torch_bytes` is of torch's allocator (max_memory_allocated); ONNX Runtime and TensorRT
allocate outside it, so `device_bytes` is what the device holds more after the pass, with torch's
cache of free memory. On the CPU `process_bytes` is of the resident set (VmHWM), which the kernel
counts anew for every peer; weights that are mapped count as they are read. What opening and
checking a peer takes for a while, such as an engine's build, is in none of them: heap that is free
by then goes back to the system before a pass (glibc alone can be asked to).
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

    def peak_of(self, one_pass: Callable[[], object]) -> dict[str, int | None]:
        """Bytes that the peer holds and its pass needs on top, from one more pass.

        None: not known, because the kernel does not let this process count anew.
        """
        if self._device == "cpu":
            gc.collect()
            _give_back_free_heap()
            known = _forget_peak()
            one_pass()
            grown = _status_bytes("VmHWM") - self._before["process_bytes"]
            return {"process_bytes": grown if known else None}
        torch.cuda.empty_cache()  # What opening and checking the peer left there.
        torch.cuda.reset_peak_memory_stats()
        one_pass()
        torch.cuda.synchronize()
        peak = {"torch_bytes": torch.cuda.max_memory_allocated(), "device_bytes": _device_bytes()}
        return {name: found - self._before[name] for name, found in peak.items()}

    def _in_use(self) -> dict[str, int]:
        gc.collect()
        if self._device == "cpu":
            _give_back_free_heap()  # Else a peer grows into what others have freed.
            return {"process_bytes": _status_bytes("VmRSS")}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"torch_bytes": torch.cuda.memory_allocated(), "device_bytes": _device_bytes()}


def _give_back_free_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    """Whether VmHWM now counts anew."""
    try:
        CLEAR_REFS.write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def _device_bytes() -> int:
    """In use on the whole GPU."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.M)
    if match is None:
        raise OSError(f"{STATUS}: expected a line {name}, found none; peak memory needs Linux")
    return 1024 * int(match[1])
