"""How a command ends: one JSON object as the last line of stdout, or one error line.

Exit codes: 0 done; 2 unusable input (ValueError, OSError, a command line that does not parse);
130 interrupted; 143 terminated. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")
# tyro draws a box around a usage error, and ends it with a hint that we replace by our own.
_BOX = re.compile(r"[│╭╮╰╯─]+|-{5,}|For full helptext,.*|Error parsing [^:]*:|\(required\)")
_BAD_VALUE = re.compile(
    r"Error parsing (\S+): .*?'([^']*)'.* Argument helptext: \S+ (?:\{None\}\|)?([A-Z]+) "
)


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no Exception, so that no handler catches it."""


def print_error(line: str) -> None:
    """Print an error line on stderr."""
    print(line, file=sys.stderr, flush=True)


def run_command(
    program: str,
    parse: Callable[[], Parsed],
    execute: Callable[[Parsed], dict[str, Any]],
    tell: Callable[[str], None] = print_error,
) -> int:
    """Parse, execute, print the result as one line of JSON; returns the exit code.

    `tell` prints the error line: when several processes run one command, only one prints it.
    """
    try:
        with _terminated_by_exception():
            parsed = _parse_in_one_line(program, parse)
            result = execute(parsed)
    except (ValueError, OSError) as error:
        message, code = str(error) or type(error).__name__, 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Terminated:
        message, code = "terminated", 143
    else:
        print(json.dumps(result), flush=True)
        return 0
    tell(f"{program}: error: {' '.join(message.split())}")
    return code


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM ends the block, as Ctrl-C does, not the process: half-written files are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse_in_one_line(program: str, parse: Callable[[], Parsed]) -> Parsed:
    """tyro's parse, with its boxed usage error as one line; --help prints and exits as usual."""
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
    bad = _BAD_VALUE.search(" ".join(re.sub(r"[│─]+|-{5,}", "", boxed.getvalue()).split()))
    if bad is not None:
        option, value, kind = bad.groups()
        raise ValueError(f"{option}: expected {kind}, got {value!r} (see {program} --help)")
    lines = [_BOX.sub("", line) for line in boxed.getvalue().splitlines()[1:]]
    fault = " ".join(" ".join(lines).split()) or "the command line cannot be parsed"
    raise ValueError(f"{fault} (see {program} --help)")


def print_fields(result: dict[str, Any]) -> None:
    """Print a result for people: a line per field, and per entry of a mapping."""
    for key, value in result.items():
        for line, text in enumerate(_lines(value)):
            print(f"{'' if line else key:16}{text}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()] or ["-"]
    return ["-" if value is None else str(value)]


def print_table(rows: list[list[str]]) -> None:
    """Print columns two spaces apart; the first row is their heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
