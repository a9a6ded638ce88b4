"""`engine`: build, verify and inspect engines; inspect and export coresets.

In a pipe the last line of stdout is one JSON object. Importing this module imports neither torch
nor TensorRT: each command imports what it needs, after its arguments are checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tyro.extras import SubcommandApp

from . import options as c
from .console import run_command
from .coreset.hub import fetched
from .coreset.manifest import coreset_folder

Coreset = c.CoresetInfo | c.CoresetVerify | c.CoresetShow | c.CoresetExport
Engine = (
    c.EngineBuild | c.EngineVerify | c.EngineList | c.EngineInfo | c.EngineRemove | c.EngineDoctor
)
COMMANDS = {
    "build": c.EngineBuild,
    "verify": c.EngineVerify,
    "list": c.EngineList,
    "info": c.EngineInfo,
    "remove": c.EngineRemove,
    "doctor": c.EngineDoctor,
    "coreset info": c.CoresetInfo,
    "coreset verify": c.CoresetVerify,
    "coreset show": c.CoresetShow,
    "coreset export": c.CoresetExport,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 unusable input, 130 interrupted, 143
    terminated)."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command("engine", COMMANDS, given, _parse, _execute)


def _parse(given: Sequence[str]) -> Engine | Coreset:
    app, coreset = SubcommandApp(), SubcommandApp()
    for name, kind in COMMANDS.items():
        under, _, name_there = name.rpartition(" ")
        (coreset if under else app).command(name=name_there)(kind)
    app.command(coreset, name="coreset")
    return app.cli(prog="engine", args=given, description="Engines and coresets.")


def _execute(command: Engine | Coreset) -> dict[str, Any]:
    if isinstance(command, Coreset):
        folder = coreset_folder(fetched(command.folder))
        from .formats.commands import run_coreset_command  # torch

        return run_coreset_command(command, folder)
    from .builds.commands import run_engine_command

    return run_engine_command(command)
