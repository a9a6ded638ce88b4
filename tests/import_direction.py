"""Imports go left only: kernels → export → engine → train. `make check` runs this file.

Inside the four folders imports are relative. `kernels` is a leaf: torch, triton, numpy and the
standard library. None of the six folders has an `__init__.py`: a top-level package `kernels` would
shadow Hugging Face's of that name, which transformers imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "export", "engine", "train")
FOLDERS = (*ROOMS, "tests", "bench")
KERNELS_MAY_IMPORT = frozenset({"torch", "triton", "numpy", *sys.stdlib_module_names})


def violations(root: Path = ROOT) -> list[str]:
    """Every breach as `file:line: what`, in the order of the files."""
    found = [
        f"{path.relative_to(root)}: remove it, the folders are namespace packages"
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("__init__.py"))
    ]
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root)
            tree = ast.parse(path.read_text(encoding="utf-8"), str(place))
            found += [f"{place}:{line}: {what}" for line, what in _breaches(tree, place)]
    return found


def _breaches(tree: ast.AST, place: Path) -> Iterator[tuple[int, str]]:
    room = place.parts[0]
    to_root = len(place.parts)  # dots that lead from this module's package to patchbloom
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute, relative = [alias.name for alias in node.names], None
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute, relative = [node.module or ""], None
        elif isinstance(node, ast.ImportFrom):
            absolute, relative = [], node
        else:
            continue
        for name in absolute:
            top = name.split(".")[0]
            if top == "patchbloom" or top in FOLDERS:
                yield node.lineno, f"import {name} relatively"
            elif room == "kernels" and top not in KERNELS_MAY_IMPORT:
                yield node.lineno, f"kernels is a leaf and may not import {top}"
        if relative is None or relative.level < to_root:
            continue
        modules = [relative.module] if relative.module else [alias.name for alias in relative.names]
        for module in modules:
            target = module.split(".")[0]
            if relative.level > to_root or target not in ROOMS:
                yield node.lineno, f"the import of {module} leaves the four folders"
            elif ROOMS.index(target) > ROOMS.index(room):
                yield node.lineno, f"{room} may not import {target}: imports go left only"


if __name__ == "__main__":
    broken = violations()
    print("\n".join(broken) or f"import direction: {' → '.join(ROOMS)} holds")
    sys.exit(1 if broken else 0)
