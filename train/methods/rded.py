"""Method rded: mosaics of r² neighbouring patches that the teacher chose, shuffled every epoch."""

from __future__ import annotations

from .method import Method, later

RDED = Method(
    name="rded",
    takes="patches",
    make=later("patches.make_scored"),
    open=later("source.open_mosaics"),
)
