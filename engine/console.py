"""How a command ends: one JSON object as the last line of stdout, or one error line.

On a terminal a table stands for the JSON object, unless --json asks for it.
Exit codes: 0 done; 2 unusable input (ValueError, OSError, a command line that does not parse), no
home, full memory, no room for temporary files; 130 interrupted; 143 terminated; 141 when the reader
of stdout has gone. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

from tyro import _errors  # private: the version of tyro is pinned
from tyro._backends import _tyro_help_formatting
from tyro.extras import get_parser

from ..export.machine import tells_full_memory
from ..export.terminal import say, visible
from .help import about, help_lines, metavar, spelled
from .interrupts import Terminated, safe_point, signals_kept

Parsed = TypeVar("Parsed")
WIDEST_TABLE = 10_000  # columns, in a pipe
UNITS = {
    "_px": " px",
    **dict.fromkeys(("patches", "images"), " images"),
    **dict.fromkeys(("accuracy", "accuracies", "recognised_by_the_teacher"), " %"),
}
"""Units of a result's numbers by how their key ends; that of "bytes" is `size`'s."""
_NO_TEMPORARY_FILES = re.compile(
    "No space left on device|Disk quota exceeded|Cannot create temporary file|No usable "
    "temporary directory|Error generating temporary directory|mz_zip error string: write"
)
"""How gcc, Python and torch's loader of engines say that they cannot write temporary files."""


def run_command(
    program: str,
    commands: Mapping[str, type],
    given: Sequence[str],
    parse: Callable[[Sequence[str]], Parsed],
    execute: Callable[[Parsed], dict[str, Any]],
    tell: Callable[[str], None] = say,
) -> int:
    """Parse what is `given`, execute it, print the result as one line of JSON unless stdout is a
    terminal; returns the exit code.

    `commands` holds every command of the program by name, for --help and for hints about what is
    mistyped. `tell` prints the error line: when several processes run one command, only one does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale can print é, or the ± of --help
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            if given == ["--version"]:
                from importlib.metadata import version  # takes 0.1 s

                print(program, version("patchbloom"))
                return 0
            with signals_kept():
                result = _result(lambda: _run(commands, given, parse, execute))
            if "--json" in given or not sys.stdout.isatty():
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


def _run(
    commands: Mapping[str, type],
    given: Sequence[str],
    parse: Callable[[Sequence[str]], Parsed],
    execute: Callable[[Parsed], dict[str, Any]],
) -> dict[str, Any]:
    """Parse and execute. Without a command, print the short help on stderr and exit with 2."""
    words = "".join(f"{word} " for word in given if word != "--json")
    if any(name.startswith(words) for name in commands):
        with redirect_stdout(sys.stderr), suppress(SystemExit):
            _parse_in_one_line(commands, [*given, "--help"], parse, short=True)
        sys.exit(2)
    command = _parse_in_one_line(commands, given, parse)
    with redirect_stdout(sys.stderr if "--json" in given else sys.stdout):
        return execute(command)


def _parse_in_one_line(
    commands: Mapping[str, type],
    given: Sequence[str],
    parse: Callable[[Sequence[str]], Parsed],
    short: bool = False,
) -> Parsed:
    """tyro's parse with our help; raises a one-line ValueError where tyro would draw a box."""

    def refuse(event: _errors.ParseErrorEvent) -> None:
        reason = _reason(event, commands, given)
        if reason is not None:
            raise ValueError(f"{reason} (see {event.prog} --help)")

    tyros = _tyro_help_formatting.format_help
    _tyro_help_formatting.format_help = partial(help_lines, commands, short)
    try:
        with _errors.on_parse_error(refuse):
            return parse(given)
    finally:
        _tyro_help_formatting.format_help = tyros


def _reason(
    event: _errors.ParseErrorEvent, commands: Mapping[str, type], given: Sequence[str]
) -> str | None:
    """Why tyro refuses a command line; None for an event that none of our commands causes."""
    match event:
        case _errors.MissingArgs(missing_arguments=missing, unrecognized_tokens=unknown):
            if unknown:
                return _unknown(unknown, commands, given)
            command = f"{event.prog} {missing[0].source_parser.prog_suffix}".strip()
            needed = [f"{spelled(each.arg)}: {about(each.arg).rstrip('.')}" for each in missing]
            return f"{command} needs {'; '.join(needed)}"
        case _errors.UnrecognizedArgs(tokens=tokens):
            return _unknown(tokens, commands, given)
        case _errors.MissingSubcommand(subcommand_spec=spec):
            return f"expected one of {', '.join(spec.parser_from_name)}"
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            name = argument.display_name()
            expected = ", ".join(choice for choice in choices if choice != "None")
            return f"invalid choice {value!r} for argument {name!r}: expected {expected}"
        case _errors.BadValue(argument=argument):
            return f"{spelled(argument)}: the value is missing"
        case _errors.InstantiationFailure(message=message, argument=argument):
            if argument is None:
                return message
            # "invalid literal for int() with base 10: 'x'", or a line like it per type.
            got = message.rpartition(": ")[2]
            return f"{argument.display_name()}: expected {metavar(argument)}, got {got}"
    return None


def _unknown(tokens: Sequence[str], commands: Mapping[str, type], given: Sequence[str]) -> str:
    """Names the options closest to mistyped ones, or the closest command, or all commands."""
    message = f"unrecognized: {' '.join(tokens)}"
    parsers = (get_parser(kind) for kind in commands.values())
    options = {word for each in parsers for act in each._actions for word in act.option_strings}
    close = [near for token in tokens for near in get_close_matches(token, options, 1, 0.8)]
    if not close and tokens[0] in given[:2] and given[0] not in commands:
        words = (" ".join(given[:count]) for count in (2, 1))  # `coreset inf`, `lables`
        close = [near for each in words for near in get_close_matches(each, commands, 1, 0.8)][:1]
    if close:
        return f"{message}. Perhaps you meant: {', '.join(close)}"
    if any(token.startswith("-") for token in tokens):
        return message
    return f"{message}. Commands: {', '.join(commands)}"


def print_fields(result: dict[str, Any]) -> None:
    """Print a result for people: a line per field, and per entry of a mapping, with units."""
    width = max([16, *(len(key) + 2 for key in result)])
    for key, value in result.items():
        for line, text in enumerate(_lines(key, value)):
            print(f"{'' if line else key:{width}}{visible(text)}")


def _lines(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [_told(key, value)]
    lines = []
    for name, each in value.items():
        dot = "." if isinstance(each, dict) and each else ": "
        lines += [f"{name}{dot}{line}" for line in _lines(key if key == "bytes" else name, each)]
    return lines or ["-"]


def _told(key: str, value: Any) -> str:
    """A value with the unit of its key; of many numbers the first, the last and how many."""
    unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
    match value:
        case None | [] | ():
            return "-"
        case list() | tuple():
            told = [_told("", each) for each in value]
            if len(told) > 8 and all(isinstance(each, int | float) for each in value):
                return f"{told[0]} … {told[-1]}{unit} ({len(told)})"
            return ", ".join(told) + unit
        case int() if key.endswith("bytes"):
            return size(value)
        case float():
            return f"{value:.6g}{unit}"
    return f"{value}{unit}"


def size(size_bytes: int) -> str:
    """`9.5 KiB`, or MiB from 1 MiB on."""
    return f"{size_bytes / 1024:.1f} KiB" if size_bytes < 2**20 else f"{size_bytes / 2**20:.1f} MiB"


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
