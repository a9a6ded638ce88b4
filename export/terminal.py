"""Lines for people: names in them come from folders, models and manifests of others."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Print a line of progress, or an error, on stderr."""
    print(visible(line), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """`text` with its control and other unprintable characters escaped: a terminal obeys them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
