"""The text of --help: an example first, then commands, then options in groups, wrapped.

The class of a command has an `example` and, where it has many options, `groups`: the names of its
fields by heading.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from tyro import _fmtlib  # private: the version of tyro is pinned

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition
    from tyro._parsers import ArgWithContext, ParserSpecification

NARROWEST, WIDEST = 40, 100  # columns
OF_ALL = {
    "-h, --help": "Show this help.",
    "--json": "Print only the result, as one line of JSON. Default: a terminal gets a table, "
    "a pipe both.",
}


def help_lines(
    commands: Mapping[str, type],
    short: bool,
    *,
    prog: str,
    parser_spec: ParserSpecification,
    args: Sequence[ArgWithContext],
    **_: Any,
) -> list[str]:
    """The help of `prog`, a program or one of its `commands`; `short` omits the options."""
    under = prog.split()[1:]
    below = {
        " ".join(words[len(under) :]): kind
        for words, kind in ((name.split(), kind) for name, kind in commands.items())
        if words[: len(under)] == under != words
    }
    kind = parser_spec.f if args else next(iter(below.values()))
    arguments = [each.arg for each in args if not each.arg.is_suppressed()]
    needed = [
        f"[{spelled(each)}]" if each.field.default == () else spelled(each)
        for each in arguments
        if each.lowered.required or each.is_positional()
    ]
    usage = " ".join([prog, *needed, "[OPTIONS]"] if args else [prog, "COMMAND", "[OPTIONS]"])
    lines = [*_wrapped(f"usage: {usage}", 7), f"example: {vars(kind)['example']}"]
    if parser_spec.description:
        lines += ["", *_wrapped(parser_spec.description, 0)]
    if below:
        lines += ["", _bold("Commands, each with --help:")]
        for name, each in below.items():
            lines += _entry(name, " ".join(str(each.__doc__).split()), 18)
    if short:
        return [*lines, "", f"{prog} --help shows all options."] if args else lines
    groups = _grouped(getattr(kind, "groups", {}), arguments)
    if not under:
        groups[-1][1]["--version"] = "Show the version."
    for heading, entries in groups:
        lines += ["", _bold(f"{heading}:")]
        lines += [line for left, text in entries.items() for line in _entry(left, text)]
    return lines


def _grouped(
    groups: Mapping[str, str], arguments: Sequence[ArgumentDefinition]
) -> list[tuple[str, dict[str, str]]]:
    """Headings in order, each with its entries; those of every command come last."""
    heading_of = {name: heading for heading, names in groups.items() for name in names.split()}
    last = "Other" if groups else "Options"
    entries: dict[str, dict[str, str]] = {name: {} for name in ("Arguments", *groups, last)}
    for each in arguments:
        rest = "Arguments" if each.is_positional() else last
        of_field = heading_of.get(each.field.intern_name, rest)
        heading = heading_of.get(each.intern_prefix, of_field)
        entries[heading][_left(each)] = about(each) + _hint(each)
    for name, text in OF_ALL.items():
        if name != "--json" or arguments:
            entries[last].setdefault(name, text)
    return [(heading, found) for heading, found in entries.items() if found]


def spelled(argument: ArgumentDefinition) -> str:
    """`--out PATH`, or `FOLDER` for a positional argument; `...` for several."""
    lowered = argument.lowered
    if argument.is_positional():
        word = argument.field.intern_name.upper()
    else:
        kind = metavar(argument).strip("[]").split()[0]
        word = f"{argument.display_name()} {kind}"
    return f"{word} ..." if lowered.nargs == "*" else word


def metavar(argument: ArgumentDefinition) -> str:
    """`INT` or `{on,off}`, without the None that stands for an option that is not given."""
    return str(argument.lowered.metavar).removeprefix("{None}|").replace("{None,", "{")


def about(argument: ArgumentDefinition) -> str:
    """The docstring of its field."""
    text = argument.field.helptext
    return str(text() if callable(text) else text)


def _left(argument: ArgumentDefinition) -> str:
    if argument.lowered.action != "boolean_optional_action":
        return spelled(argument)
    if not argument.field.default:
        return argument.display_name()
    return argument.get_invocation_text()[1].as_str_no_ansi()  # and --no-…


def _hint(argument: ArgumentDefinition) -> str:
    """Whether it is required, or its default where it is neither None nor off."""
    default = argument.field.default
    if argument.lowered.required:
        return " (required)"
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    elif default is True:
        default = "on"
    told = default is False or default == ""
    return "" if told or not isinstance(default, str | int | float) else f" (default: {default})"


def _entry(left: str, text: str, indent: int = 26) -> list[str]:
    """An option or command, and beside or below it what it is."""
    indent = min(indent, _width() // 3)
    if len(left) + 4 <= indent:
        return _wrapped(f"  {left:{indent - 4}}  {text}", indent)
    if len(left) + 2 > _width():
        left = left.replace(",", ", ")
    return [*_wrapped(f"  {left}", 4), *_wrapped(" " * indent + text, indent)]


def _wrapped(text: str, indent: int) -> list[str]:
    wrapper = TextWrapper(_width(), subsequent_indent=" " * indent, break_on_hyphens=False)
    return wrapper.wrap(text)


def _width() -> int:
    return max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))


def _bold(heading: str) -> str:
    return _fmtlib.text["bold"](heading).render()[0]
