"""Names from folders and manifests are escaped before a terminal gets them."""

from __future__ import annotations

import pytest
from patchbloom.engine.console import print_error, print_fields, print_table, visible

HOSTILE = "cat\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\udcff\nline"


@pytest.mark.parametrize(
    "show",
    [
        lambda: print_fields({"classes": {"a": HOSTILE, HOSTILE: "b"}, "name": HOSTILE}),
        lambda: print_table([["class", "n"], [HOSTILE, "1"]]),
        lambda: print_error(f"engine: error: {HOSTILE}"),
    ],
    ids=["fields", "table", "error"],
)
def test_names_do_not_reach_a_terminal_as_commands(
    show, capsys: pytest.CaptureFixture[str]
) -> None:
    show()
    told = "".join(capsys.readouterr())
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egpj\\udcff\\nline" in told
    assert told.replace("\n", "").isprintable()


def test_what_is_printable_stays() -> None:
    assert visible("café, 北京 'a\\b' 🦊") == "café, 北京 'a\\b' 🦊"
