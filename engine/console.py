"""How a command ends: one JSON object as the last line of stdout, or one error line.

Exit codes: 0 done; 2 unusable input (ValueError, OSError, a command line that does not parse), no
home, full memory, no room for temporary files; 130 interrupted; 143 terminated; 141 when the reader
of stdout has gone. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from tyro import _errors  # private: the version of tyro is pinned
from tyro.extras import get_parser

from ..export.machine import tells_full_memory
from ..export.terminal import say, visible
from .interrupts import Terminated, safe_point, signals_kept

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition

Parsed = TypeVar("Parsed")
WIDEST_TABLE = 10_000  # columns, in a pipe
NARROWEST = 40  # columns of a help text; below 6 tyro loops for ever, and fills the memory
_NO_TEMPORARY_FILES = re.compile(
    "No space left on device|Disk quota exceeded|Cannot create temporary file|No usable "
    "temporary directory|Error generating temporary directory|mz_zip error string: write"
)
"""How gcc, Python and torch's loader of engines say that they cannot write temporary files."""


def run_command(
    program: str,
    commands: Mapping[str, type],
    parse: Callable[[], Parsed],
    execute: Callable[[Parsed], dict[str, Any]],
    tell: Callable[[str], None] = say,
) -> int:
    """Parse, execute, print the result as one line of JSON; returns the exit code.

    `commands` holds every command of the program by name, for hints about a mistyped option.
    `tell` prints the error line: when several processes run one command, only one prints it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale can print é, or the ± of --help
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with signals_kept():
                result = _result(lambda: execute(_parse_in_one_line(commands, parse)))
            print(json.dumps(result))
            return 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # As in `| head`: nobody reads. Python would write what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        message, code = _lack(error) or str(error) or type(error).__name__, 2
    except (MemoryError, RuntimeError) as error:
        message, code = _lack(error), 2
        if message is None:
            raise
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Terminated:
        message, code = "terminated", 143
    tell(visible(f"{program}: error: {' '.join(message.split())}"))
    return code


def _lack(error: Exception) -> str | None:
    """One line for what this machine lacks, by a library's error; None for other errors."""
    if isinstance(error, MemoryError | RuntimeError) and tells_full_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"memory is full ({reason}): close what else uses it, or ask for less"
    if not isinstance(error, RuntimeError | FileNotFoundError):
        return None  # our own errors name the folder
    if "Could not determine home directory" in str(error):  # Path.expanduser
        return (
            "a path begins with ~ for a home folder that is unknown (HOME is not set, and user "
            f"{os.getuid()} has none; or ~NAME is no user): write the whole path"
        )
    lines = [line for line in str(error).splitlines() if _NO_TEMPORARY_FILES.search(line)]
    if not lines:
        return None
    return (
        f"temporary files cannot be written ({lines[0]}): free some space there, or choose another "
        "folder with TMPDIR"
    )


def _result(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of the work; raises KeyboardInterrupt or Terminated if a signal came."""
    try:
        safe_point()
        result = work()
    except Exception:
        safe_point()  # the signal may be why: child processes got it too
        raise
    safe_point()
    return result


def _parse_in_one_line(commands: Mapping[str, type], parse: Callable[[], Parsed]) -> Parsed:
    """tyro's parse, which raises a one-line ValueError where tyro would draw a box and exit."""

    def refuse(event: _errors.ParseErrorEvent) -> None:
        reason = _reason(event, commands)
        if reason is not None:
            raise ValueError(f"{reason} (see {event.prog} --help)")

    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    with _errors.on_parse_error(refuse):
        return parse()


def _reason(event: _errors.ParseErrorEvent, commands: Mapping[str, type]) -> str | None:
    """Why tyro refuses a command line; None for an event that none of our commands causes."""
    match event:
        case _errors.MissingArgs(missing_arguments=missing, unrecognized_tokens=unknown):
            command = f"{event.prog} {missing[0].source_parser.prog_suffix}".strip()
            needed = [f"{_spelled(each.arg)}: {_about(each.arg)}" for each in missing]
            needed += [_unknown(unknown, commands)] if unknown else []
            return f"{command} needs {'; '.join(needed)}"
        case _errors.UnrecognizedArgs(tokens=tokens):
            return _unknown(tokens, commands)
        case _errors.MissingSubcommand(subcommand_spec=spec):
            return f"expected one of {', '.join(spec.parser_from_name)}"
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            name = argument.display_name()
            return f"invalid choice {value!r} for argument {name!r}: expected {', '.join(choices)}"
        case _errors.BadValue(argument=argument):
            return f"{_spelled(argument)}: the value is missing"
        case _errors.InstantiationFailure(message=message, argument=argument):
            if argument is None:
                return message
            # "invalid literal for int() with base 10: 'x'", or a line like it per type.
            kind = str(argument.lowered.metavar).removeprefix("{None}|")
            got = message.rpartition(": ")[2]
            return f"{argument.display_name()}: expected {kind}, got {got}"
    return None


def _spelled(argument: ArgumentDefinition) -> str:
    """`--out PATH`, or `PATH` for a positional argument."""
    name = [] if argument.is_positional() else [argument.display_name()]
    return " ".join([*name, str(argument.lowered.metavar)])


def _about(argument: ArgumentDefinition) -> str:
    text = argument.field.helptext
    return str(text() if callable(text) else text).rstrip(".")


def _unknown(tokens: Sequence[str], commands: Mapping[str, type]) -> str:
    """Names the options closest to mistyped ones, or the commands."""
    message = f"unrecognized: {' '.join(tokens)}"
    parsers = (get_parser(kind) for kind in commands.values())
    options = {word for each in parsers for act in each._actions for word in act.option_strings}
    close = [near for token in tokens for near in get_close_matches(token, options, 1, 0.8)]
    if close:
        return f"{message}. Perhaps you meant: {', '.join(close)}"
    if any(token.startswith("-") for token in tokens):
        return message
    return f"{message}. Commands: {', '.join(commands)}"


def print_fields(result: dict[str, Any]) -> None:
    """Print a result for people: a line per field, and per entry of a mapping."""
    for key, value in result.items():
        for line, text in enumerate(_lines(value)):
            print(f"{'' if line else key:16}{visible(text)}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()] or ["-"]
    return ["-" if value is None else str(value)]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns two spaces apart; the first row is their heading.

    Cells are folded to the width of a terminal, but not in a pipe or a file.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows[1:]:
        table.add_row(*map(visible, row))
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDEST_TABLE
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
