"""Errors that several folders raise. Torch-free."""

from __future__ import annotations


class CoresetError(ValueError):
    """A coreset that cannot be written or trusted: expected, found, what to do."""
