"""Checks that train imports engine, export and kernels, never the reverse. `make check` runs it.

LAYERS orders the inside of `engine` and `train` the same way; modules never import each other in a
cycle. Imports inside the four folders are relative. `kernels` imports only torch, triton, numpy and
the standard library. None of the six folders has an `__init__.py`: a top-level package `kernels`
would shadow Hugging Face's, which transformers imports. The exception is PUBLIC, which installs as
the package `patchbloom` itself: it has one, and imports absolutely, as its users do.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "export", "engine", "train")
LAYERS = {
    "engine": (
        *("errors", "config", "peers", "interrupts", "help", "console", "options", "data"),
        *("select", "labels", "coreset", "expand", "dsco", "builds", "formats", "cli", "start"),
    ),
    "train": (
        *("plugins", "config", "papers", "coreset_options", "run", "data", "networks", "teacher"),
        *("batching", "plan", "methods", "options", "labels", "students", "report", "prior"),
        *("commands", "loader", "cli", "start", "public"),
    ),
}
"""A folder's entries, lowest first: each imports only itself and earlier ones."""
FOLDERS = (*ROOMS, "tests", "bench")
PUBLIC = Path("train/public")
KERNELS_MAY_IMPORT = frozenset({"torch", "triton", "numpy", *sys.stdlib_module_names})


def violations(root: Path = ROOT) -> list[str]:
    """Every violation as `file:line: message`, in file order."""
    found = [
        f"{path.relative_to(root)}: remove it, the folders are namespace packages"
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("__init__.py"))
        if path.parent != root / PUBLIC
    ]
    arrows: dict[str, list[str]] = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root)
            tree = ast.parse(path.read_text(encoding="utf-8"), str(place))
            found += [f"{place}:{line}: {what}" for line, what in _breaches(tree, place)]
            arrows[_dotted(place)] = [target for _, target in _relative_imports(tree, place)]
    return found + _circles(arrows)


def _dotted(place: Path) -> str:
    return ".".join(place.with_suffix("").parts)


def _breaches(tree: ast.AST, place: Path) -> Iterator[tuple[int, str]]:
    room = place.parts[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        else:
            continue
        for name in absolute:
            top = name.split(".")[0]
            if top == "patchbloom" and place.parent == PUBLIC:
                continue
            if top == "patchbloom" or top in FOLDERS:
                yield node.lineno, f"import {name} relatively"
            elif room == "kernels" and top not in KERNELS_MAY_IMPORT:
                yield node.lineno, f"kernels is a leaf and may not import {top}"
    for line, target in _relative_imports(tree, place):
        to_room, _, inside = target.partition(".")
        if to_room not in ROOMS:
            yield line, f"the import of {target} leaves the four folders"
        elif ROOMS.index(to_room) > ROOMS.index(room):
            yield line, f"{room} may not import {to_room}: imports go left only"
        elif to_room == room in LAYERS:
            yield from _layer_breaches(line, room, place.with_suffix("").parts[1], inside)


def _layer_breaches(line: int, room: str, own: str, inside: str) -> Iterator[tuple[int, str]]:
    other, layers = inside.split(".")[0], LAYERS[room]
    for name in (own, other):
        if name not in layers:
            yield line, f"{name} has no place in the LAYERS of {room}"
            return
    if layers.index(other) > layers.index(own):
        yield line, f"{room}/{own} may not import {room}/{other}: LAYERS has it higher"


def _relative_imports(tree: ast.AST, place: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module name from the root) of every relative import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = place.parts[: max(len(place.parts) - node.level, 0)]
            outside = [".."] if node.level > len(place.parts) else []
            named = [node.module] if node.module else [alias.name for alias in node.names]
            for name in named:
                yield node.lineno, ".".join([*outside, *base, name])


def _circles(arrows: dict[str, list[str]]) -> list[str]:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return [f"modules import each other: {' → '.join(error.args[1])}"]
    return []


if __name__ == "__main__":
    broken = violations()
    print("\n".join(broken) or f"import direction: {' → '.join(ROOMS)} holds")
    sys.exit(1 if broken else 0)
