"""`engine doctor`: what this machine can run, what is missing for the rest, and how to get it.

It works wherever Python starts: it looks up libraries before it loads any, and reports one that
does not load.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from ...export.config import EngineSpec, Precision
from ...export.hub import is_sdxl_turbo_cached
from ...export.machine import (
    cxx_compiler,
    driver_version,
    free_disk_bytes,
    free_host_bytes,
    gpu_memory_bytes,
    triton_needs,
)
from ...export.terminal import visible
from ..console import print_table

PROJECT = "patchbloom"
EXTRAS = ("", "cuda", "trt", "rtx", "openvino", "eight-bits")
BACKENDS = (
    *(("eager", "cpu"), ("compile", "cpu"), ("ort", "cpu"), ("openvino", "cpu")),
    ("inductor", "cpu"),
    *(("eager", "cuda"), ("compile", "cuda"), ("ort", "cuda"), ("inductor", "cuda")),
    ("trt", "cuda"),
)
ALIASES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt-cu13": ("tensorrt-cu13", "tensorrt", "tensorrt-cu12"),
    "tensorrt-rtx-cu13": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""Distributions that provide the same module."""
EXAMPLES = (("sdxl-tiny", 64), ("sdxl-turbo", 224), ("sdxl-turbo", 512))
"""(model, px) of the builds whose needs are reported, at a batch of 32."""
FORMULA = (
    "estimated memory: k x parameters x bytes + 3 x the VAE's largest layer (images x channels x "
    "px² x bytes), k = 1 to run eagerly, 2 to build; disk: parameters x bytes"
)


def examine(bundles: Path) -> dict[str, Any]:
    """All findings, as plain JSON."""
    libraries = _libraries()
    fault = _load_fault(libraries)
    gpu = None if fault else _gpu()
    return {
        "backends": [_backend(name, device, fault) for name, device in BACKENDS],
        "libraries": libraries,
        "gpu": gpu,
        "driver": driver_version(),
        "host": {"cores": os.cpu_count(), "free_memory_bytes": free_host_bytes()},
        "cxx": cxx_compiler(),
        "triton_needs": triton_needs(),
        "sdxl_turbo_cached": None if fault else is_sdxl_turbo_cached(),
        "bundles": str(bundles),
        "free_disk_bytes": None if fault else free_disk_bytes(bundles),
        "needs": [] if fault else [_needs(model, px, gpu) for model, px in EXAMPLES],
    }


def check_any_works(found: dict[str, Any]) -> None:
    """Raise OSError when no backend works here."""
    if not any(backend["works"] for backend in found["backends"]):
        raise OSError(f"no backend works here: {found['backends'][0]['missing']}")


def _libraries() -> list[dict[str, Any]]:
    """The requirements in this package's metadata, and the installed versions."""
    from packaging.requirements import Requirement

    found = []
    for line in requires(PROJECT) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        extras = (e for e in EXTRAS if marker is None or marker.evaluate({"extra": e}))
        extra = next(extras, None)
        if extra is None:
            continue
        installed = _installed(requirement.name)
        right = installed is not None and requirement.specifier.contains(installed, True)
        requirement.marker = None  # pip takes the rest
        found.append(
            {
                "name": requirement.name,
                "needed": str(requirement.specifier) or "any",
                "installed": installed,
                "right": right,
                "only_for": extra or None,
                "mend": None if right else f"pip install '{requirement}'",
            }
        )
    return found


def _installed(name: str) -> str | None:
    for alias in ALIASES.get(name, (name,)):
        try:
            return version(alias)
        except PackageNotFoundError:
            continue
    return None


def _load_fault(libraries: list[dict[str, Any]]) -> str | None:
    """Why even the eager backend cannot start; None when it can."""
    for name in ("torch", "diffusers", "transformers"):
        try:
            import_module(name)
        except (ImportError, OSError) as error:
            mends = {library["name"]: library["mend"] for library in libraries}
            remedy = mends.get(name) or f"pip install --force-reinstall {name}"
            return f"{name} does not load ({' '.join(str(error).split())}): {remedy}"
    return None


def _backend(name: Any, device: str, fault: str | None) -> dict[str, Any]:
    missing = fault or _missing(name, device)
    return {"backend": name, "device": device, "works": missing is None, "missing": missing}


def _missing(name: Any, device: Any) -> str | None:
    """Why a backend does not work there, and the remedy, in one line; None when it works."""
    from ..expand.backends import require_backend, resolve_device

    precision: Precision = "fp16" if device == "cuda" else "fp32"
    try:
        if name != "trt":  # its message names the GPU as well as the library
            resolve_device(device)
        require_backend(name, precision, device)
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())
    return None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free_bytes, total_bytes = gpu_memory_bytes()
    gpu = torch.cuda.get_device_properties()
    return {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "sm_count": gpu.multi_processor_count,
        "cuda": torch.version.cuda,
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


def _needs(name: str, size_px: int, gpu: dict[str, Any] | None) -> dict[str, Any]:
    from ...export.models import find_model
    from .needs import engine_needs

    spec = EngineSpec(size_px=size_px)
    if gpu:
        spec = replace(spec, precision="fp16", device="cuda")
    model = find_model(name, "random")
    run, build = (engine_needs(model, spec, backend) for backend in ("eager", "ort"))
    free_bytes = gpu["free_bytes"] if gpu else free_host_bytes()
    fits = "yes" if build.memory_bytes <= free_bytes else "perhaps"
    return {
        "model": name,
        "size_px": size_px,
        "batch": spec.batch,
        "precision": spec.precision,
        "device": spec.device,
        "parameters": run.unet_parameters + run.vae_parameters,
        "eager_bytes": run.memory_bytes,
        "build_bytes": build.memory_bytes,
        "disk_bytes": build.weights_bytes,
        "fits": "no" if build.least_bytes > free_bytes else fits,
    }


def show_examination(found: dict[str, Any]) -> None:
    """Print the findings."""
    rows = [["backend", "on", "works", ""]]
    for backend in found["backends"]:
        works = "yes" if backend["works"] else "no"
        rows.append([backend["backend"], backend["device"], works, backend["missing"] or ""])
    print_table(rows)
    print()
    wrong = [library for library in found["libraries"] if not library["right"]]
    print(f"libraries: {len(found['libraries']) - len(wrong)} as needed")
    for library in wrong:
        purpose = f" (only for {library['only_for']})" if library["only_for"] else ""
        print(
            f"  {library['name']} {library['installed'] or 'is missing'}, "
            f"needed {library['needed']}{purpose}: {library['mend']}"
        )
    _show_machine(found)
    if found["needs"]:
        print()
        _show_needs(found["needs"])


def _show_machine(found: dict[str, Any]) -> None:
    gpu, host = found["gpu"], found["host"]
    if gpu:
        print(
            f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['sm_count']} SMs, "
            f"{_gb(gpu['free_bytes'])} of {_gb(gpu['total_bytes'])} GB free; "
            f"torch's CUDA {gpu['cuda']}"
        )
    else:
        print("GPU: torch finds none")
    print(f"NVIDIA driver: {found['driver'] or 'none'}")
    print(f"host: {host['cores']} cores, {_gb(host['free_memory_bytes'])} GB of memory free")
    if found["free_disk_bytes"] is not None:
        print(f"disk: {_gb(found['free_disk_bytes'])} GB free for {visible(found['bundles'])}")
    cxx = found["cxx"] or "none; apt-get install g++"
    print(f"C++ compiler, for inductor and compile: {visible(cxx)}")
    print(f"C compiler and Python.h, for Triton: {visible(found['triton_needs'] or 'here')}")
    if found["sdxl_turbo_cached"] is not None:
        cached = "in the hub's cache" if found["sdxl_turbo_cached"] else "not downloaded (7 GB)"
        print(f"SDXL-Turbo's weights: {cached}")


def _show_needs(needs: list[dict[str, Any]]) -> None:
    rows = [
        [
            *("model", "px", "batch", "precision", "on", "parameters"),
            *("GB to run eagerly", "GB to build", "GB on disk", "fits now"),
        ]
    ]
    for need in needs:
        sizes = (_gb(need[name]) for name in ("eager_bytes", "build_bytes", "disk_bytes"))
        shape = (str(need[name]) for name in ("size_px", "batch", "precision", "device"))
        rows.append(
            [need["model"], *shape, f"{need['parameters'] / 1e6:,.0f} M", *sizes, need["fits"]]
        )
    print_table(rows)
    print(FORMULA)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f}"
