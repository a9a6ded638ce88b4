"""TensorRT's two libraries: what is installed, and which cards each builds engines for.

TensorRT builds an engine on the card that will run it. TensorRT for RTX also builds ahead of time,
on a machine without a GPU, for compute capabilities in TARGETS; 9.0 and 10.0 (H100, B200) are not
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .config import EngineSpec, TrtLibrary, TrtLibraryName
from .models import Unavailable

TARGETS = {
    "sm75": ("t4", "rtx2070", "rtx2080", "rtx2080ti", "rtx8000"),
    "sm80": ("a100", "a30"),
    "sm86": (
        *("a6000", "a5000", "a4000", "a40", "a10", "a10g"),
        *("rtx3070", "rtx3080", "rtx3090"),
    ),
    "sm89": ("l40s", "l40", "l4", "rtx4070", "rtx4080", "rtx4090", "rtx6000-ada"),
    "sm120": ("rtx5070", "rtx5080", "rtx5090", "rtx-pro-6000"),
    "sm121": ("gb10", "dgx-spark"),
}
"""Compute capabilities that TensorRT for RTX builds for, and cards of each."""
ON_THE_CARD = {"sm90": ("h100", "h200", "gh200"), "sm100": ("b200", "gb200"), "sm103": ("b300",)}
"""Those that only TensorRT builds for, on the card itself."""


@dataclass(frozen=True)
class _Library:
    title: str
    module: str
    distributions: tuple[str, ...]
    """Those that provide the module."""
    oldest: tuple[int, int]
    too_new: tuple[int, int]
    install: str

    def version(self) -> str | None:
        """The installed version, without an import; None when there is none."""
        for name in self.distributions:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    def fault(self) -> str | None:
        """Why it cannot be used, as what is needed; None when it loads."""
        found = self.version()
        if found is None:
            return f"{self.title} ({self.install})"
        if not self.oldest <= tuple(int(part) for part in found.split(".")[:2]) < self.too_new:
            return f"{self.title}, not {found} ({self.install})"
        try:
            import_module(self.module)
        except (ImportError, OSError) as error:
            return (
                f"{self.title} that loads: {found} is installed, but {error}; {self.install}, and "
                "see that the driver is new enough for its CUDA"
            )
        return None


# GroupNormalization of opset 21 needs INormalizationLayer V2, of 10.15.
_LIBRARIES: dict[TrtLibraryName, _Library] = {
    "tensorrt": _Library(
        "TensorRT 10.15 to 11",
        "tensorrt",
        ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
        (10, 15),
        (12, 0),
        "pip install 'tensorrt-cu13>=10.15,<12'",
    ),
    "rtx": _Library(
        "TensorRT for RTX 1.7 or later",
        "tensorrt_rtx",
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        (1, 7),
        (2, 0),
        "pip install 'tensorrt-rtx-cu13>=1.7,<2'",
    ),
}


def trt_module(spec: EngineSpec) -> Any:
    """The Python module of the engine's library."""
    return import_module(_LIBRARIES[spec.trt_library or "tensorrt"].module)


def trt_title(library: TrtLibraryName) -> str:
    """The library with its version, for display."""
    found = _LIBRARIES[library]
    return f"{'TensorRT for RTX' if library == 'rtx' else 'TensorRT'} {found.version()}"


def trt_versions(library: TrtLibraryName) -> dict[str, str]:
    """Versions that a plan depends on."""
    found = _LIBRARIES[library].version() or "none"
    if library == "rtx":
        return {"tensorrt_rtx": found}
    return {"tensorrt": found, "cuda": torch.version.cuda or "none"}


def parse_targets(names: Sequence[str], option: str = "--for") -> tuple[str, ...]:
    """Cards or compute capabilities, as "a6000" or "sm86" → sorted capabilities.

    Raises ValueError for one that TensorRT for RTX does not build for.
    """
    return tuple(sorted({_target(name, option) for name in names}, key=lambda sm: int(sm[2:])))


def plain_name(name: str) -> str:
    """A card's name as TARGETS has it, whatever its case and hyphens."""
    plain = name.lower().replace(" ", "-").removeprefix("nvidia-").removeprefix("geforce-")
    cards = (card for cards in (TARGETS | ON_THE_CARD).values() for card in cards)
    return next((each for each in cards if each.replace("-", "") == plain.replace("-", "")), plain)


def _target(name: str, option: str) -> str:
    plain = plain_name(name)
    for sm, cards in (TARGETS | ON_THE_CARD).items():
        if plain == sm or plain in cards:
            break
    else:
        known = "; ".join(f"{sm}: {', '.join(cards)}" for sm, cards in TARGETS.items())
        raise ValueError(f"{option} {name}: expected a card or its compute capability, of {known}")
    if sm in ON_THE_CARD:
        raise ValueError(
            f"{option} {name}: TensorRT for RTX does not build for {sm}; install TensorRT on the "
            "machine with that card, and build there"
        )
    return sm


def cards_of(targets: Sequence[str]) -> str:
    """The targets with cards of each, for display."""
    return " or ".join(f"{sm} ({', '.join(TARGETS.get(sm, ())[:3])}, …)" for sm in targets)


def here() -> str | None:
    """This machine's GPU, as "sm86"; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def builds_ahead(spec: EngineSpec) -> bool:
    """Whether the engine is for cards that this machine lacks."""
    return bool(spec.targets) and here() not in spec.targets


def choose_library(
    asked: TrtLibrary, targets: Sequence[str] = (), device: str = "cuda"
) -> tuple[TrtLibraryName, tuple[str, ...]]:
    """The library to build with or to run, and what it builds for: (name, targets).

    `auto` is TensorRT where it is installed, otherwise TensorRT for RTX; with targets, always the
    latter. Raises Unavailable, naming what is missing.
    """
    gpu, name = here() if device == "cuda" else None, asked
    if targets and asked == "tensorrt":
        raise Unavailable(
            "TensorRT builds for the GPU of this machine alone: name no card, or give "
            "--trt-library rtx"
        )
    if name == "auto":
        installed = _LIBRARIES["tensorrt"].version() is not None and not targets
        rtx_is_no_use = gpu is not None and gpu not in TARGETS and not targets
        name = "tensorrt" if installed or rtx_is_no_use else "rtx"
    missing = []
    if gpu is None and not targets:
        missing.append(
            "an NVIDIA GPU (torch finds none, or another device was requested), or a card "
            "elsewhere to build for (`engine build --for CARD`, `train --build-only CARD`)"
        )
    if (fault := _LIBRARIES[name].fault()) is not None:
        missing.append(fault)
    if missing:
        raise Unavailable(
            f"the trt backend needs {' and '.join(missing)}; --backend ort and inductor also run "
            "on the CPU"
        )
    if name == "tensorrt" or targets:
        return name, tuple(targets)
    if gpu not in TARGETS:
        raise Unavailable(
            f"TensorRT for RTX does not run on this GPU, {gpu}, but on {', '.join(TARGETS)}: "
            f"{_LIBRARIES['tensorrt'].install}, and --trt-library tensorrt"
        )
    return name, (gpu,)
