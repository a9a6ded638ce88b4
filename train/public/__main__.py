"""`patchbloom train …` and `patchbloom engine …`: the two commands under one name."""

from __future__ import annotations

import sys
from difflib import get_close_matches

import patchbloom

USAGE = """usage: patchbloom {train,engine} …

  patchbloom train --data shapes --out runs/demo    the whole method; patchbloom train --help
  patchbloom engine doctor                          engines and coresets; patchbloom engine --help
  patchbloom --version

`train` and `engine` are the same commands under short names."""


def main() -> int:
    """Run the command; returns its exit code."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in ("-h", "--help"):
        print(USAGE)
        return 0
    if first == "--version":
        print(patchbloom.__version__)
        return 0
    if first not in ("train", "engine"):
        near = get_close_matches(first, ("train", "engine", "--version"), 1)
        hint = f"perhaps you meant {near[0]}" if near else "expected train or engine"
        print(f"patchbloom: error: unrecognized: {first}: {hint}", file=sys.stderr)
        return 2
    sys.argv = [first, *rest]
    if first == "train":
        from patchbloom.train.start import main as start
    else:
        from patchbloom.engine.start import main as start
    return start()


if __name__ == "__main__":
    sys.exit(main())
