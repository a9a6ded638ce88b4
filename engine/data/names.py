"""Names of the classes, and prompts for them. Torch-free.

A file of names or prompts is a JSON object {id: text}, or lines "id text" (a tab, or else the first
space, separates them): texts go to classes by id, never by order.

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
from reprlib import repr as short

from ...export.documents import parse_json

_WORDNET_ID = re.compile(r"[nvars]\d{8}")
_HALF = re.compile("[\ud800-\udfff]")  # JSON may hold half of a character: no tokenizer takes it


def display_names(
    class_ids: Sequence[str], class_names_file: str | Path | None = None
) -> tuple[str, ...]:
    """One name per class id, in the same order.

    `class_names_file` names every class, and may name others.

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


def read_prompts(path: Path | None, class_ids: Sequence[str]) -> dict[str, str]:
    """Classes' own prompts by id, in the order of `class_ids`; empty without a file.

    A file may omit classes. Raises as _read_texts does, and ValueError for a class that is given
    twice or is not among `class_ids`.
    """
    if path is None:
        return {}
    prompts: dict[str, str] = {}
    for class_id, prompt in _read_texts("--prompts", path.expanduser(), "prompt"):
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


def doubtful_names(
    class_ids: Sequence[str], names: Sequence[str], prompts: Sequence[str]
) -> list[str]:
    """Warnings, one line each: classes that share a prompt, and names that are plain numbers."""
    warnings = []
    first: dict[str, str] = {}
    shared = [
        (first[prompt], class_id)
        for class_id, prompt in zip(class_ids, prompts, strict=True)
        if first.setdefault(prompt, class_id) != class_id
    ]
    if shared:
        one, other = shared[0]
        more = f", and so do {len(shared) - 1} more" if len(shared) > 1 else ""
        prompt = prompts[class_ids.index(one)]
        warnings.append(
            f"warning: classes {one!a} and {other!a} share the prompt {prompt!r}{more}: "
            "tell them apart by --class-names"
        )
    pairs = zip(names, prompts, strict=True)
    numbers = [prompt for name, prompt in pairs if name.isdecimal() and name in prompt]
    if numbers:
        warnings.append(
            f"warning: {len(numbers)} classes have numbers for names, so that the first prompt is "
            f"{numbers[0]!r}: name them by --class-names"
        )
    return warnings


def doubtful_order(class_ids: Sequence[str]) -> list[str]:
    """A warning when folders of plain numbers are not in the order of these numbers."""
    if not all(class_id.isdecimal() for class_id in class_ids):
        return []
    pairs = enumerate(zip(class_ids, sorted(class_ids, key=int), strict=True))
    differ = [(index, found, expected) for index, (found, expected) in pairs if found != expected]
    if not differ:
        return []
    index, found, expected = differ[0]
    return [
        f"warning: class folders are sorted as text, as torchvision's ImageFolder does: class "
        f"{index} is folder {found!r}, not {expected!r}; pad the numbers with zeros to change that"
    ]


def require_text_file(option: str, path: Path) -> None:
    """FileNotFoundError, naming the option, when there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")


def _read_texts(option: str, path: Path, what: str) -> list[tuple[str, str]]:
    """The (id, text) pairs of `path`, in its order; an id may occur twice.

    Raises FileNotFoundError without a file, ValueError for text that is not UTF-8, invalid JSON, a
    line without a text, or a text that is empty or holds half a character; messages name `option`
    and `what` ("name").
    """
    require_text_file(option, path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path}: expected UTF-8 text") from None
    if text.lstrip().startswith("{"):
        remedy = f"expected a JSON object, or lines 'id {what}'"
        # Pairs: a dict would keep the last of two.
        pairs = parse_json(text, f"{option} {path}", ValueError, remedy, pairs=list)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [_split_line(f"{option} {path}", line, what) for line in lines]
    if not pairs:
        raise ValueError(f"{option} {path}: it is empty: expected a {what} for one class or more")
    for class_id, value in pairs:
        if not isinstance(value, str) or not value.strip() or _HALF.search(value):
            raise ValueError(
                f"{option} {path}: {class_id!r}: expected a {what}, got {short(value)}"
            )
    return [(class_id, value.strip()) for class_id, value in pairs]


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
    for class_id, name in _read_texts("--class-names", path, "name"):
        if names.setdefault(class_id, name) != name:
            raise ValueError(f"--class-names {path}: {class_id!r} is named twice: keep one of them")
    return names


def _split_line(place: str, line: str, what: str) -> tuple[str, str]:
    parts = line.split("\t", 1) if "\t" in line else line.split(None, 1)
    if len(parts) != 2:
        raise ValueError(f"{place}: expected a line 'id {what}', got {short(line)}")
    return parts[0].strip(), parts[1].strip()
