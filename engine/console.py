"""How a command of ours ends: one JSON object as the last line of stdout, or one line of error.

Exit codes: 0 done; 2 the user's input cannot be used (ValueError, OSError, a command line that does
not parse); 130 interrupted; 143 terminated. Anything else is a fault of ours and keeps its
traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")
WIDEST_TABLE = 10_000  # columns, in a pipe
# tyro draws a box around a usage error, and closes it with a hint that we give ourselves.
_BOX = re.compile(r"[│╭╮╰╯─]+|-{5,}|For full helptext,.*|Error parsing [^:]*:|\(required\)")
_BAD_VALUE = re.compile(
    r"Error parsing (\S+): .*?'([^']*)'.* Argument helptext: \S+ (?:\{None\}\|)?([A-Z]+) "
)


class Terminated(BaseException):
    """SIGTERM came: as KeyboardInterrupt, no Exception, so that nothing on the way takes it."""


def print_error(line: str) -> None:
    """Print a line of error on stderr."""
    print(line, file=sys.stderr, flush=True)


def run_command(
    program: str,
    parse: Callable[[], Parsed],
    execute: Callable[[Parsed], dict[str, Any]],
    tell: Callable[[str], None] = print_error,
) -> int:
    """Parse, execute, print the result as one line of JSON; returns the exit code.

    `tell` gets the line of an error: of several processes that run one command, one prints it.
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
    """SIGTERM ends the block as Ctrl-C does, not the process: what is half written is removed."""

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
    """tyro's parse, its boxed usage error made one line; --help prints and exits as usual."""
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
    told = " ".join(" ".join(lines).split()) or "the command line cannot be parsed"
    raise ValueError(f"{told} (see {program} --help)")


def print_fields(result: dict[str, Any]) -> None:
    """A result as people read it: a line per field, and per entry of a mapping."""
    for key, value in result.items():
        for line, text in enumerate(_lines(value)):
            print(f"{'' if line else key:16}{text}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()] or ["-"]
    return ["-" if value is None else str(value)]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns, two spaces apart; the first row is their heading.

    Cells are folded to the width of a terminal, and stay whole in a pipe or a file.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDEST_TABLE
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
