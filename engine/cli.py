"""`engine`: build, verify and inspect engines; inspect and export coresets.

The last line of stdout is one JSON object. Importing this module imports neither torch nor
TensorRT: each command imports what it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tyro.extras import SubcommandApp

from . import options as c
from .console import run_command

Coreset = c.CoresetInfo | c.CoresetVerify | c.CoresetShow | c.CoresetExport
Engine = (
    c.EngineBuild | c.EngineVerify | c.EngineList | c.EngineInfo | c.EngineRemove | c.EngineDoctor
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 unusable input, 130 interrupted)."""
    coreset = SubcommandApp()
    coreset.command(name="info")(c.CoresetInfo)
    coreset.command(name="verify")(c.CoresetVerify)
    coreset.command(name="show")(c.CoresetShow)
    coreset.command(name="export")(c.CoresetExport)
    app = SubcommandApp()
    app.command(name="build")(c.EngineBuild)
    app.command(name="verify")(c.EngineVerify)
    app.command(name="list")(c.EngineList)
    app.command(name="info")(c.EngineInfo)
    app.command(name="remove")(c.EngineRemove)
    app.command(name="doctor")(c.EngineDoctor)
    app.command(coreset, name="coreset", help="Inspect a coreset folder, or export it.")
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(
        "engine",
        lambda: app.cli(prog="engine", args=given, description="Engines and coresets."),
        _execute,
    )


def _execute(command: Engine | Coreset) -> dict[str, Any]:
    if isinstance(command, Coreset):
        from .formats.commands import run_coreset_command  # torch

        return run_coreset_command(command)
    from .builds.commands import run_engine_command  # torch

    return run_engine_command(command)
