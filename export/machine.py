"""This machine's GPU, driver, compiler, memory and disk, for keys, refusals and reports."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sysconfig
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_INSTRUCTIONS = re.compile(
    r"s?sse|avx|fma|f16c|bmi|abm|popcnt|amx|sha|v?aes|v?pclmul|gfni|adx|movbe|movdir|"
    r"clflushopt|clwb|rdrand|rdseed|xsave|fsgsbase|asimd|sve|sme|i8mm|bf16|fphp|crc32|atomics"
)
_FULL_MEMORY = re.compile(
    r"out of memory|failed to allocate|can't allocate|bad_alloc|can't start new thread|"
    r"resource temporarily unavailable",  # no thread can start
    re.IGNORECASE,
)
POLL_S = 0.02  # cuBLAS's and TensorRT's workspaces live longer than this


def gpu_identity(device: str) -> dict[str, Any]:
    """GPU name and SM count that an engine depends on; None on the CPU.

    No library's engines depend on the driver; keys for the CPU have always named it.
    """
    if device != "cuda":
        return {"gpu": None, "sm_count": None, "driver": None}
    import torch

    gpu = torch.cuda.get_device_properties()
    return {"gpu": gpu.name, "sm_count": gpu.multi_processor_count}


def driver_version() -> str | None:
    """Version of NVIDIA's driver, as NVML reports it; None without a driver."""
    version = ctypes.create_string_buffer(80)
    known = (nvml := _nvml()) and nvml.nvmlSystemGetDriverVersion(version, 80) == 0
    return version.value.decode() if known else None


def gpus_of_driver() -> int:
    """NVIDIA GPUs that the driver sees, whether torch sees them or not."""
    count = ctypes.c_uint(0)
    known = (nvml := _nvml()) and nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    return count.value if known else 0


def _nvml() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that Inductor calls; None without one."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


def triton_needs() -> str | None:
    """Name what Triton lacks to compile its kernels' launcher, and the remedy; None: nothing.

    It compiles a C file against Python.h at its first launch, and looks for both as this function
    does (triton/runtime/build.py).
    """
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return (
            f"a C compiler, and {' or '.join(names)} is not here: apt-get install gcc libc6-dev, "
            "and let CC name it or be unset"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's
    folder = sysconfig.get_paths(scheme)["include"]
    if not Path(folder, "Python.h").is_file():
        return (
            f"Python.h, and it is not in {folder}: apt-get install python3-dev, or use a Python "
            "that has its headers"
        )
    return None


def cpu_instructions() -> list[str]:
    """This CPU's instruction sets, by the kernel's names; empty if it lists none.

    It omits other listed features, which change with kernel and hypervisor.
    """
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(each for each in features.split() if _INSTRUCTIONS.match(each))
    return []


def gpu_memory_bytes() -> tuple[int, int]:
    """(free, total) of the current GPU; memory that torch caches counts as used."""
    import torch

    return torch.cuda.mem_get_info()


def tells_full_memory(error: Exception) -> bool:
    """Whether a library says by this error that the machine's memory, or a GPU's, is full."""
    return isinstance(error, MemoryError) or bool(_FULL_MEMORY.search(str(error)))


def free_host_bytes() -> int:
    """Memory that a process can still allocate: the system's estimate plus swap, or the rest of a
    container's limit if that is less."""
    fields = _kilobytes(Path("/proc/meminfo"))
    free = 1024 * (fields["MemAvailable"] + fields.get("SwapFree", 0))
    group = Path("/sys/fs/cgroup")
    try:
        if (limit := (group / "memory.max").read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            # This file cache counts as used, but is freed on demand.
            lines = (group / "memory.stat").read_text().splitlines()
            counts = dict(line.split() for line in lines)
            free = min(free, int(limit) - used + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no container limit
    return free


def free_disk_bytes(folder: Path) -> int:
    """Free disk space at the folder, or at its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def peak_host_bytes() -> int:
    """Peak memory of this process, without its children.

    Unlike getrusage's peak, it excludes what the parent held when it started this process.
    """
    return 1024 * _kilobytes(Path(f"/proc/{os.getpid()}/status"))["VmHWM"]


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines "Name: 123 kB" of a /proc file."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.removesuffix(" kB"))
    return fields


class PeakGpuMemory:
    """Peak GPU memory in use while the block ran, by any process; 0 on the CPU.

    Polls the driver every POLL_S: torch's own count misses TensorRT's and ONNX Runtime's memory.
    """

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if device != "cuda":
            self._done.set()

    def __enter__(self) -> PeakGpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(POLL_S):
            free_bytes, total_bytes = gpu_memory_bytes()
            self.bytes = max(self.bytes, total_bytes - free_bytes)


def return_free_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between blocks still in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
