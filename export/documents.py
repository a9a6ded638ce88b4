"""JSON that another process wrote, or somebody changed: read, checked, or refused in one line.

A schema is a pydantic model in strict mode. It names the fields that are read, with their bounds;
other fields are kept. Documents stay plain JSON, as hashes are taken of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from reprlib import repr as _found
from typing import Annotated, Any, NoReturn, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

MOST_NESTED = 64
"""Most lists and objects inside each other: Python's own encoder and printer recurse."""
MOST_PX = 2**14


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ValueError("expected a path inside the folder")
    return name


Positive = Annotated[int, Field(ge=1, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Side = Annotated[int, Field(ge=1, le=MOST_PX)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=0)]  # with a bound, pydantic refuses half a character
Inside = Annotated[str, AfterValidator(_inside)]
"""A path relative to the document's folder that does not lead out of it."""


def read_json(
    path: Path,
    error: Callable[[str], Exception],
    remedy: str,
    schema: Any = None,
    *,
    most_bytes: int | None = None,
    most: int | None = None,
) -> Any:
    """The document in `path`, of at most `most_bytes`. Raises `error` as parse_json does, OSError
    for an unreadable file."""
    if most_bytes is not None and (size_bytes := path.stat().st_size) > most_bytes:
        raise error(f"{path}: expected at most {most_bytes} bytes, found {size_bytes}: {remedy}")
    return parse_json(path.read_bytes(), str(path), error, remedy, schema, most=most)


def parse_json(
    raw: bytes | str,
    place: str,
    error: Callable[[str], Exception],
    remedy: str,
    schema: Any = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    most: int | None = None,
) -> Any:
    """A document as json.loads reads it; `pairs` as its object_pairs_hook.

    Raises `error` with one line that begins with `place` and ends with `remedy`: for text that is
    no JSON or no UTF-8, NaN or infinity, a whole number beyond `most`, deep nesting, and a value
    that the schema refuses.
    """
    try:
        value = json.loads(
            raw,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=None if most is None else partial(_whole, most),
            object_pairs_hook=pairs,
        )
        _check_nesting(value)
    except (ValueError, RecursionError) as reason:
        why = "nested too deep" if isinstance(reason, RecursionError) else reason
        raise error(f"{place} is not valid JSON ({why}): {remedy}") from None
    if schema is not None:
        check_document(value, place, error, remedy, schema)
    return value


def check_document(
    value: Any, place: str, error: Callable[[str], Exception], remedy: str, schema: Any
) -> None:
    """Raises `error`, which names the first field that the schema refuses, and its value."""
    try:
        _adapter(schema).validate_python(value, strict=True)
    except (ValidationError, OverflowError) as refused:
        raise error(f"{place}: {_reason(refused)}: {remedy}") from None


def check_fields(
    values: Mapping[str, Any],
    kind: type,
    place: str,
    error: Callable[[str], Exception],
    remedy: str,
) -> None:
    """Raises `error` for a value that is not of the type that the dataclass `kind` gives it."""
    hints = get_type_hints(kind, include_extras=True)
    for name in values.keys() & hints.keys():
        try:
            _adapter(hints[name]).validate_json(json.dumps(values[name]), strict=True)
        except ValidationError as refused:
            raise error(f"{place}, {name}: {_reason(refused)}: {remedy}") from None


_adapter = cache(TypeAdapter)


def _reason(refused: ValidationError | OverflowError) -> str:
    if isinstance(refused, OverflowError):
        return f"expected smaller numbers ({refused})"
    first = refused.errors(include_url=False)[0]
    where = ".".join(_found(part).strip("'") for part in first["loc"])
    if first["type"] == "missing":
        return f"expected {where}, found none"
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    said += "" if first["type"] == "value_error" else f", found {_found(first['input'])}"
    return f"{where}: {said}" if where else said


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def _whole(most: int, digits: str) -> int:
    number = int(digits)
    return number if abs(number) <= most else _refuse(f"{digits[:20]}, which is over {most}")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse(text[:40])


def _check_nesting(value: Any) -> None:
    level, depth = [value], 0
    while level := [inner for each in level for inner in _entries(each)]:
        depth += 1
        if depth > MOST_NESTED:
            raise RecursionError


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
