"""Method random: random patches, enlarged; no teacher chooses them."""

from __future__ import annotations

from .method import Method, later, takes_patches

RANDOM = Method(
    name="random",
    takes=takes_patches,
    make=later("patches.make_random"),
    open=later("source.open_enlarged"),
)
