"""Method random: patches that no teacher chose, enlarged."""

from __future__ import annotations

from .method import Method, later
from .upsample import takes_patches

RANDOM = Method(
    name="random",
    takes=takes_patches,
    make=later("patches.make_random"),
    open=later("source.open_enlarged"),
)
