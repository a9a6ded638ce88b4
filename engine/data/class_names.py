"""Readable class names, for prompts and pictures.

A name comes from the first of: the user's file, the shipped map of ImageNet-1k's WordNet ids
(`imagenet_classes.json`: the 1000 ids with a WordNet lemma each, made distinct where two classes
share one), the folder's name with `_` and `-` read as spaces. A bare WordNet id is never a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .class_texts import read_class_texts

_WORDNET_ID = re.compile(r"[nvars]\d{8}")


def display_names(
    class_ids: Sequence[str], class_names_file: str | Path | None = None
) -> tuple[str, ...]:
    """One name per class id, in the same order.

    `class_names_file` is a JSON object {id: name} or a text file of lines "id name" (a tab, or else
    the first space, separates them); it names every class, and may name others.

    Raises FileNotFoundError or ValueError for an unreadable file or a class it leaves out, and
    ValueError for a WordNet id outside ImageNet-1k when there is no file.
    """
    if class_names_file is not None:
        names = _read_names(Path(class_names_file))
        missing = [class_id for class_id in class_ids if class_id not in names]
        if missing:
            raise ValueError(
                f"--class-names {class_names_file}: expected a name for each of {len(class_ids)} "
                f"classes, {len(missing)} missing, first {missing[0]!r}: add its id and a name"
            )
        return tuple(names[class_id] for class_id in class_ids)
    return tuple(_shipped_or_folder_name(class_id) for class_id in class_ids)


@cache
def imagenet_names() -> dict[str, str]:
    """The shipped map: WordNet id → name, 1000 entries sorted by id, which is ImageNet's order."""
    # Not importlib.resources: it refuses the namespace package of an editable install.
    shipped = Path(__file__).with_name("imagenet_classes.json")
    return json.loads(shipped.read_text(encoding="utf-8"))


def _shipped_or_folder_name(class_id: str) -> str:
    name = imagenet_names().get(class_id)
    if name is not None:
        return name
    if _WORDNET_ID.fullmatch(class_id):
        raise ValueError(
            f"class folder {class_id!r} is a WordNet id that is not among ImageNet-1k's 1000: "
            "name the classes with --class-names FILE, one line 'id name' each"
        )
    return " ".join(re.split(r"[_\-\s]+", class_id)).strip() or class_id


def _read_names(path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for class_id, name in read_class_texts("--class-names", path, "name"):
        if names.setdefault(class_id, name) != name:
            raise ValueError(f"--class-names {path}: {class_id!r} is named twice: keep one of them")
    return names
