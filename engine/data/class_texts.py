"""A text for each class from the user's file: by class id, never by order.

A file is a JSON object {id: text}, or lines "id text" (a tab, or else the first space, separates
them). Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def read_class_texts(option: str, path: Path, what: str) -> list[tuple[str, str]]:
    """The (id, text) pairs of `path`, in its order; an id may come twice.

    `option` and `what` ("name") are for the message: FileNotFoundError for no file, ValueError for
    other than UTF-8, JSON that cannot be read, a line without a text, or a text that is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path}: expected UTF-8 text") from None
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)  # a dict would keep the last of two
        except ValueError as error:
            raise ValueError(f"{option} {path}: expected a JSON object ({error})") from None
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [_split_line(f"{option} {path}", line, what) for line in lines]
    if not pairs:
        raise ValueError(f"{option} {path}: it is empty: expected a {what} for one class or more")
    for class_id, value in pairs:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{option} {path}: {class_id!r}: expected a {what}, got {value!r}")
    return [(class_id, value.strip()) for class_id, value in pairs]


def read_prompts(path: Path | None, class_ids: Sequence[str]) -> dict[str, str]:
    """Classes' own prompts, by id, in the order of `class_ids`; none without a file.

    A class that the file leaves out has none. Raises as read_class_texts does, and ValueError for a
    class that is given twice or is not among `class_ids`.
    """
    if path is None:
        return {}
    prompts: dict[str, str] = {}
    for class_id, prompt in read_class_texts("--prompts", path.expanduser(), "prompt"):
        if class_id in prompts:
            raise ValueError(f"--prompts {path}: {class_id!r} is given twice: keep one of them")
        if class_id not in class_ids:
            known = ", ".join(class_ids[:3])
            raise ValueError(
                f"--prompts {path}: expected ids of the {len(class_ids)} classes ({known}, …), "
                f"got {class_id!r}: correct it (a tab ends an id with spaces), or leave it out"
            )
        prompts[class_id] = prompt
    return {class_id: prompts[class_id] for class_id in class_ids if class_id in prompts}


def _split_line(place: str, line: str, what: str) -> tuple[str, str]:
    parts = line.split("\t", 1) if "\t" in line else line.split(None, 1)
    if len(parts) != 2:
        raise ValueError(f"{place}: expected a line 'id {what}', got {line!r}")
    return parts[0].strip(), parts[1].strip()
