"""Method rded: mosaics of r² neighbouring patches that the teacher chose, shuffled every epoch."""

from __future__ import annotations

from .method import Method, later, takes_patches

RDED = Method(
    name="rded",
    takes=takes_patches,
    make=later("patches.make_scored"),
    open=later("source.open_mosaics"),
)
