"""TensorRT without TensorRT: the real Python bindings over empty libraries, and stand-ins.

The bindings' extension loads if three shared objects with the right names hold nine functions that
do nothing. This provides the real enums, ILogger and IProgressMonitor, and the real attributes and
signatures of every other class. A Standin has exactly these: an unknown attribute, setting a
read-only property, or a wrong number, name or type of arguments fails.

The tests play what a call does. No engine is built here.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
REAL_CLASSES = ("ILogger", "IProgressMonitor")
"""Base classes of ours."""


def load_bindings(bindings: Path, libraries: Path) -> ModuleType:
    """Import `tensorrt_bindings` from `bindings` over empty libraries built in `libraries`."""
    major = bindings.name.split(".")[0]
    source = libraries / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(libraries / name)]
        subprocess.run([*command, str(source)], check=True)
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(bindings))
    import tensorrt_bindings  # pyright: ignore[reportMissingImports]

    return tensorrt_bindings


@dataclass(frozen=True)
class Parameter:
    """A method's parameter, as the bindings' docstring gives it."""

    name: str
    kind: str
    required: bool


def signatures(method: Any) -> list[list[Parameter]]:
    """The overloads of a method, without self, from pybind11's docstring."""
    name = method.__name__
    found = re.findall(rf"^\s*(?:\d+\. )?{name}\((self: .*)\) -> ", method.__doc__, re.MULTILINE)
    return [[_parameter(text) for text in _split(line)[1:]] for line in found]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _parameter(text: str) -> Parameter:
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(": ")
    return Parameter(name, kind, not default)


class Standin:
    """Stands in for an object of a real class.

    `plays` has a function per method and a value per property; using another raises AssertionError.
    """

    def __init__(self, trt: ModuleType, real: type, plays: Mapping[str, Any]) -> None:
        vars(self).update(_trt=trt, _real=real, _plays=dict(plays), _set={})

    def __getattr__(self, name: str) -> Any:
        real = vars(self)["_real"]
        if not hasattr(real, name):
            raise AttributeError(f"TensorRT's {real.__name__} has no attribute {name!r}")
        given = {**self._plays, **self._set}
        if name not in given:
            raise AssertionError(f"no part was given to {real.__name__}.{name}")
        if isinstance(getattr(real, name), property):
            return given[name]
        return checked(self._trt, getattr(real, name), given[name])

    def __setattr__(self, name: str, value: Any) -> None:
        attribute = getattr(self._real, name, None)
        if not isinstance(attribute, property) or attribute.fset is None:
            raise AttributeError(f"TensorRT's {self._real.__name__}.{name} cannot be set")
        self._set[name] = value


def checked(trt: ModuleType, method: Any, play: Callable[..., Any]) -> Callable[..., Any]:
    """`play` behind the real method's signature; raises TypeError when the real one would."""
    overloads = signatures(method)
    assert overloads, f"{method.__name__}: no signature in {method.__doc__!r}"

    def call(*values: Any, **named: Any) -> Any:
        if not any(_fits(trt, overload, values, named) for overload in overloads):
            raise TypeError(f"{method.__name__}{values}{named or ''} fits none of {overloads}")
        return play(*values, **named)

    return call


def _fits(
    trt: ModuleType, overload: list[Parameter], values: tuple[Any, ...], named: dict[str, Any]
) -> bool:
    names = [parameter.name for parameter in overload]
    if len(values) > len(overload) or named.keys() & set(names[: len(values)]):
        return False
    given = dict(zip(names, values, strict=False)) | named
    required = {parameter.name for parameter in overload if parameter.required}
    if not required <= given.keys() <= set(names):
        return False
    kinds = {parameter.name: parameter.kind for parameter in overload}
    return all(_is_a(trt, kinds[name], value) for name, value in given.items())


_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "tuple": (tuple,),
    "list": (list,),
    "typing.SupportsInt": (int,),
    "typing_extensions.Buffer": (bytes, bytearray, memoryview),
}


def _is_a(trt: ModuleType, kind: str, value: Any) -> bool:
    if kind in _PLAIN:
        return isinstance(value, _PLAIN[kind])
    real = getattr(trt, re.split(r"\.|::", kind)[-1])
    if kind.endswith(".Dims"):
        return isinstance(value, (real, tuple, list))  # pybind11 converts them
    return isinstance(value, real) or (isinstance(value, Standin) and vars(value)["_real"] is real)


def standin_module(trt: ModuleType, parts: Mapping[str, Callable[..., Any]]) -> ModuleType:
    """A module `tensorrt`: real enums and base classes; `parts` construct the other classes."""
    module = ModuleType("tensorrt")

    def __getattr__(name: str) -> Any:  # noqa: N807 - the module's own
        real = getattr(trt, name)  # AttributeError, as the real one raises
        if not isinstance(real, type) or name in REAL_CLASSES or hasattr(real, "__members__"):
            return real
        if name not in parts:
            raise AssertionError(f"no part was given to {name}")
        return checked(trt, real.__init__, parts[name])

    vars(module).update(__getattr__=__getattr__, __version__=trt.__version__)
    return module
