"""Requirements of the stages of `make gpu`: libraries, by their pip names, and a compiler.

Standard library only: anything else may be missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec


def find_lacking(needs: Iterable[str]) -> set[str]:
    """The needs that are missing here."""
    return {name for name in set(needs) if not _is_here(name)}


_MODULES = {
    "pillow": "PIL",
    "nvidia-dali-cuda130": "nvidia.dali",
    "onnxruntime-gpu": "onnxruntime",
}
"""Modules whose names differ from their pip names."""


def _is_here(name: str) -> bool:
    if name in _SEARCHES:
        return _SEARCHES[name]()
    return find_spec(_MODULES.get(name, name.replace("-", "_"))) is not None


def _is_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _is_ort_for_gpus() -> bool:
    """Ask the module itself: onnxruntime and onnxruntime-gpu share its name.

    Whether it can compute, the stage finds out and says: that takes the package and the driver,
    which may hang.
    """
    if find_spec("onnxruntime") is None:
        return False
    with suppress(ImportError):
        return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()
    return True  # the stage reports the import error


def _is_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


_SEARCHES: dict[str, Callable[[], bool]] = {
    "nvidia-dali-cuda130": _is_dali,
    "onnxruntime-gpu": _is_ort_for_gpus,
    "a C++ compiler": _is_compiler,
}
