"""Torch modules → AOTInductor packages: compiled ahead of time, opened without compiling again.

Each graph becomes one package for one batch size, with its weights inside, and a file that
describes its borders. Convolutions run in channels_last. On the CPU weights are frozen, so that
oneDNN lays them out for its kernels; on a GPU matrix products are tuned. Results come from torch's
caching allocator on the current stream. Export inlines repeated blocks, even with torch 2.15's
`nested_compile_region`, so each of them is compiled separately.

On the CPU the VAE's GroupNorms keep torch's own kernel: compiled in channels_last, they would read
rows of few channels one by one. The UNet's, over more channels and fewer pixels, are compiled.
sdxl-tiny at batch 32, one thread, ms per image, compiled vs kept: decoder 5.8 vs 4.3 in fp32, 2.5
vs 2.0 in bf16; denoiser 2.5 vs 2.7 and 1.0 vs 2.2.
"""

from __future__ import annotations

import hashlib
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from .bundle import Say
from .config import EIGHT_BITS, EngineSpec, Precision
from .graphs import GRAPHS, Graph, read_borders, write_borders
from .machine import cpu_instructions, cxx_compiler
from .models import Unavailable
from .parity import without_tf32

_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"freezing": True, "cpp.dynamic_threads": True},
    "cuda": {"max_autotune": True, "conv_1x1_as_mm": True},
}


_OPENS_FOLDERS = Version(torch.__version__) >= Version("2.15")
"""Whether torch can open an unpacked package (2.15 can, 2.11 cannot). An archive is unpacked below
TMPDIR whenever it is opened, 5 GB for SDXL-Turbo."""


@torch.library.custom_op("patchbloom::group_norm", mutates_args=())
def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's own GroupNorm, as an operator that Inductor calls without decomposing it."""
    normal, promised = nn.functional.group_norm(x, groups, weight, bias, eps), torch.empty_like(x)
    # For sequences (the VAE's attention) torch may choose another layout than the fake operator,
    # and Inductor relies on the fake's.
    return normal if normal.stride() == promised.stride() else promised.copy_(normal)


@_group_norm.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


class _WholeGroupNorm(nn.Module):
    def __init__(self, stock: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = stock.num_groups, stock.eps
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x: Tensor) -> Tensor:
        return _group_norm(x, self.groups, self.weight, self.bias, self.eps)


def require(precision: Precision, device: str) -> None:
    """Raise Unavailable without a C++ compiler, without Triton on a GPU, or for fp16 on a CPU."""
    if cxx_compiler() is None:
        raise Unavailable(
            "the backends inductor and compile need a C++ compiler, got none: install g++, or "
            "name one in the environment variable CXX"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise Unavailable(
            "the backends inductor and compile need Triton on a GPU: pip install triton"
        )
    if precision in EIGHT_BITS:
        raise Unavailable(
            f"the inductor backend has no {precision}: use --backend openvino on a CPU, --backend "
            "trt on a GPU"
        )
    if device == "cpu" and precision == "fp16":
        raise Unavailable(
            "the backends inductor and compile run fp32 or bf16 on the CPU, not fp16: use "
            "--precision bf16"
        )


def libraries() -> dict[str, str]:
    """Versions that an engine depends on."""
    return {name: version(name) for name in ("torch", "diffusers")}


def flags(spec: EngineSpec) -> dict[str, Any]:
    """Inductor's options, and the CPU's instruction sets, for which packages are compiled."""
    if spec.device == "cuda":
        return {**_OPTIONS["cuda"], "triton": version("triton"), "tf32": False}
    instructions = hashlib.sha256(" ".join(cpu_instructions()).encode()).hexdigest()
    return {**_OPTIONS["cpu"], "cpu_instructions_sha256": instructions}


@torch.no_grad()
def export_graph(graph: Graph, folder: Path, spec: EngineSpec) -> None:
    """Compile one graph: write its package and `<graph>.json`; takes over the module."""
    module = graph.module.to(memory_format=torch.channels_last)
    if spec.device == "cpu" and graph.name != "denoiser":
        _keep_group_norms(module)
    program = torch.export.export(module, tuple(graph.random_inputs(seed=0)), strict=False)
    package = folder / f"{graph.name}.pt2"
    # Inductor's own cache would keep another copy of the weights forever.
    with fresh_cache(dir=str(folder)), without_tf32():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=dict(_OPTIONS[spec.device])
        )
    if _OPENS_FOLDERS:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(folder / graph.name)
        package.unlink()
    write_borders(graph, folder)


def _keep_group_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, _WholeGroupNorm(child))


def compile_graphs(folder: Path, spec: EngineSpec, say: Say) -> dict[str, Any]:
    """Nothing to do: `export_graph` compiles, from weights in memory."""
    return {}


def open_sessions(folder: Path, spec: EngineSpec) -> dict[str, PackageSession]:
    """A session for each graph."""
    return {name: PackageSession(folder, name, spec.device) for name in GRAPHS}


class PackageSession:
    """One compiled graph."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        self._device = torch.device(device)
        self._inputs = read_borders(folder, name).inputs
        self.rows = self._inputs[0].shape[0]
        # Single-threaded: otherwise a call waits until the GPU has finished the previous one.
        package = folder / (name if _OPENS_FOLDERS else f"{name}.pt2")
        self._run = torch._inductor.aoti_load_package(str(package), run_single_threaded=True)

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph on the current stream; the result is contiguous.

        Inputs are cast to the graph's dtypes. Raises ValueError when shapes do not match.
        """
        cast = []
        for port, value in zip(self._inputs, inputs, strict=True):
            if tuple(value.shape) != port.shape:
                raise ValueError(
                    f"{port.name} must be {list(port.shape)}, the engine's shape, "
                    f"got {list(value.shape)}"
                )
            cast.append(value.to(self._device, port.dtype).contiguous())
        with without_tf32():
            return self._run(*cast).contiguous()

    def close(self) -> None:
        """Free the package and its weights."""
        del self._run
