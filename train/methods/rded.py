"""Method rded: mosaics of r² neighbouring patches of the teacher's choice, in a fresh order."""

from __future__ import annotations

from .method import Method, later
from .upsample import takes_patches

RDED = Method(
    name="rded",
    takes=takes_patches,
    make=later("patches.make_scored"),
    open=later("source.open_mosaics"),
)
