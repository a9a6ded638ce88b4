"""Names of the measured backends and peers, and the precisions in them. No torch.

A name is WHAT or WHAT-PRECISION: `ort`, `eager-bf16`, `diffusers`, `diffusers-compiled-bf16`.
Without a precision it uses the device's usual one. `eager-launched` is `eager` without its CUDA
graph. `PEERS` are other projects' implementations.
"""

from __future__ import annotations

from patchbloom.export.config import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "fp8", "int8")
DIFFUSERS = ("diffusers", "diffusers-compiled", "diffusers-upcast")
"""The pipeline as users call it; compiled as diffusers advises; in fp16 with a VAE in fp32."""
LOADERS = ("torchvision", "torchvision-tensor")
LAUNCHED = "-launched"
"""After a backend of ours: every kernel is launched by the host, and no CUDA graph is recorded. On
a CPU it changes nothing, so that a GPU's options can be rehearsed there."""
TINY = "-tiny"
"""After a backend of ours: a tiny decoder makes the pictures (`openvino-tiny-int8`)."""
PEERS = {*DIFFUSERS, *LOADERS, "eager_us", "compiled_us"}


def split_name(name: str) -> tuple[str, Precision | None]:
    """The name without its precision, and the precision. None: the device's usual one."""
    for precision in PRECISIONS:
        if name.endswith(f"-{precision}"):
            return name.removesuffix(f"-{precision}"), precision
    return name, None


def is_tiny(name: str) -> bool:
    """Whether a tiny decoder makes its pictures."""
    return split_name(name)[0].endswith(TINY)


def is_peer(name: str) -> bool:
    """Whether it is another project's, in any precision."""
    return split_name(name)[0] in PEERS


def default_precision(device: str) -> Precision:
    """Usual precision of `cpu` or `cuda`, for names without one."""
    return "fp16" if device == "cuda" else "fp32"
