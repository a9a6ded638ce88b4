"""Errors that several folders raise. Torch-free."""

from __future__ import annotations


class CoresetError(ValueError):
    """A coreset that cannot be written or trusted: expected, found, what to do."""


def reason(error: BaseException) -> str:
    """Type and first line of an error that others' code raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
