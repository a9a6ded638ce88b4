"""Method random: random patches, enlarged; no teacher chooses them."""

from __future__ import annotations

from .method import Method, later

RANDOM = Method(
    name="random",
    takes="patches",
    make=later("patches.make_random"),
    open=later("source.open_enlarged"),
)
