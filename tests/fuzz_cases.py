"""Shared by the fuzz tests: hostile changes to a document, and the bounds that reading keeps."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = pytest.mark.parametrize(
    "examples",
    [
        pytest.param(None, id="some"),
        pytest.param(100_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(0)]),
    ],
)
SECONDS = 6
"""Longest time that one input may take, of the CPU: a busy machine is no fault."""


def seeded(examples: int | None, some: int) -> settings:
    """The same inputs in every run: `some`, or `examples` where they are given."""
    return settings(
        max_examples=examples or some,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


_ours = [Path(place).resolve() for place in {sys.prefix, sys.base_prefix, *sys.path} if place]
_SYSTEM = (
    *_ours,
    Path(os.__file__).resolve().parent,
    Path(__file__).resolve().parent.parent,
    *map(Path, ("/proc", "/sys", "/dev", "/etc", "/usr")),
)
_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hear)  # stays for the life of the process


@contextmanager
def nothing_else_opened(folder: Path) -> Iterator[None]:
    """Fails when Python opens a file outside `folder` that is no part of the installation, or when
    the block takes longer than SECONDS."""
    global _opened
    heard = _opened = []
    began_s = time.process_time()
    try:
        yield
    finally:
        _opened = None
    assert time.process_time() - began_s < SECONDS
    within = (folder.resolve(), *_SYSTEM)
    strange = [
        name
        for name in heard
        if not any(Path(os.path.realpath(name)).is_relative_to(place) for place in within)
    ]
    assert strange == []


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**15, 2**31, 2**63, 2**64, 10**30, 10**400),
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", ".", "..", "../secret", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "{name}", "{0}"),
    *("dense", "topk", "pca", "none", "done", "begun", "torchvision:resnet18", "\x1b[2J"),
    *("convnet-d3-w99999999999", "convnet-d5-w1to2", "vit-s", "rded", "t2i", "dsco", "dace"),
    *([], {}, [[]], {"a": {}}, [0.5, 0.5, 0.0], [1, 2], _deep(40), _deep(80)),
)


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*here, key)
        yield from _places(inner, (*here, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document after one to three changes: entries removed, replaced, moved, renamed, added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(st.sampled_from(HOSTILE))
        *way, key = draw(st.sampled_from(places))
        holder = document
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "replace", "remove", "move", "add", "whole"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case "remove":
                del holder[key]
            case "move":
                *other, last = draw(st.sampled_from(places))
                moved = document
                for step in (*other, last):
                    moved = moved[step]
                holder[key] = copy.deepcopy(moved)
            case "add" if isinstance(holder, dict):
                name = draw(st.sampled_from(["../secret", "/etc/passwd", "k", "generated", ""]))
                holder[name] = copy.deepcopy(holder[key])
            case "add":
                holder.append(copy.deepcopy(holder[key]))
            case "whole" if draw(st.integers(0, 19)) == 0:
                document = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return document
