"""What stages of `make gpu` need and may lack: libraries, by their names for pip, and a compiler.

Standard library only: what else is here is the question.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

IMPORTS_S = 60.0
"""What importing all that the stages need may take."""


def find_lacking(needs: Iterable[str]) -> dict[str, str]:
    """Of these needs those that are not here, or do not import, each in words.

    Imported by a process of their own, as one may end it; those that it does not reach are taken to
    be fine, and their stages say what is wrong.
    """
    names = sorted(set(needs))
    lacking = {name: name for name in names if not _is_here(name)}
    modules = {_MODULES.get(name, name.replace("-", "_")): name for name in names}
    asked = [module for module, name in modules.items() if module and name not in lacking]
    if not asked:
        return lacking
    command = [sys.executable, "-c", _IMPORTS, *asked]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=IMPORTS_S
        ).stdout
    except subprocess.TimeoutExpired:
        return lacking
    for line in told.splitlines():
        if line.startswith('["'):
            module, error = json.loads(line)
            lacking[modules[module]] = f"{modules[module]} ({error})"
    return lacking


_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(json.dumps([name, f"{type(error).__name__}: {error}".splitlines()[0]]), flush=True)
"""
_MODULES = {
    "pillow": "PIL",
    "nvidia-dali-cuda130": "nvidia.dali",
    "onnxruntime-gpu": "onnxruntime",
    "a C++ compiler": "",
}
"""What is imported, where it is not named as pip names it."""


def _is_here(name: str) -> bool:
    if name in _SEARCHES:
        return _SEARCHES[name]()
    return find_spec(_MODULES.get(name, name.replace("-", "_"))) is not None


def _is_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _is_ort_for_gpus() -> bool:
    """Of the module: onnxruntime and onnxruntime-gpu have one name."""
    if find_spec("onnxruntime") is None:
        return False
    with suppress(ImportError):
        return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()
    return True  # it is told why it does not import


def _is_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


_SEARCHES: dict[str, Callable[[], bool]] = {
    "nvidia-dali-cuda130": _is_dali,
    "onnxruntime-gpu": _is_ort_for_gpus,
    "a C++ compiler": _is_compiler,
}
