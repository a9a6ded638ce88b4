"""The program `train`: keeps signals before it imports anything that takes time."""

from __future__ import annotations

from ..engine.interrupts import keep_signals


def main() -> int:
    keep_signals()
    from .cli import main

    return main()
