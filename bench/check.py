"""Is it slower than before? Two result files of one device, row by row of the same configuration.

    python bench/check.py OLD.jsonl NEW.jsonl

Of each configuration the last row of either file counts. Every figure that both rows have, with
p20, p50 and p80, is compared by the ratio of its medians, new speed / old speed, whether it is a
rate or a time. The rule: a figure is **slower** when both hold, and **faster** the other way round:

- beyond noise: the intervals p20–p80 of old and new do not overlap;
- beyond the floor: the ratio is below 1 - FLOOR (or above 1 / (1 - FLOOR)).

Otherwise it is the `same`. Under LEAST_ROUNDS rounds the spread says little: `too few`. Peers that
are not ours are shown as `peer`, never judged: when they changed too, it was the machine.

Exit 1: something of ours is slower. Exit 2: the files cannot be compared (another device, no
figure in common, not JSON lines).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

FLOOR = 0.05
LEAST_ROUNDS = 3
CONFIGURATION = (
    *("benchmark", "model", "weights", "size_px", "batch", "evals", "images", "crops", "crop_px"),
    *("threads", "student", "student_batch", "student_precision", "backend", "codec", "top_k"),
    *(
        "epochs",
        "seeds",
        "ipc",
        "classes",
        "data",
        "teacher",
        "teacher_images",
        "score_px",
        "quick",
    ),
)
"""What two rows must have alike to be compared; a key that neither has is alike."""
PEERS = {
    *("diffusers", "diffusers-compiled", "torchvision", "torchvision-tensor"),
    *("eager_us", "compiled_us"),
}
DERIVED = {"speedup_spread", "ratio_spread", "waited_s"}
"""Ratios of other figures, and what is no speed."""
TIMES = ("_us", "_s", "_ms", "seconds")
"""How the names of times end; what is no time is a rate."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare two result files of one device."""

    old: tyro.conf.Positional[Path]
    """Result file of before."""
    new: tyro.conf.Positional[Path]
    """Result file of now."""


class Incomparable(ValueError):  # noqa: N818 - reads as the message does
    """Two files of which nothing can be compared; the message says why."""


@dataclass(frozen=True)
class Figure:
    """One figure of two rows, as speeds: of a time, its inverse."""

    name: str
    """Where it is in the row: spread/ort."""
    old: tuple[float, float, float]
    """p20, p50, p80: slow, middle, fast."""
    new: tuple[float, float, float]
    rounds: int | None
    """Fewest of both; None: they do not say, and are many."""

    @property
    def ratio(self) -> float:
        """New speed over old speed: below 1 is slower."""
        return self.new[1] / self.old[1]

    @property
    def verdict(self) -> str:
        """slower, faster, same, too few, or peer."""
        if self.name.rpartition("/")[2] in PEERS:
            return "peer"
        if self.rounds is not None and self.rounds < LEAST_ROUNDS:
            return "too few"
        if self.ratio < 1 - FLOOR and self.new[2] < self.old[0]:
            return "slower"
        if self.ratio > 1 / (1 - FLOOR) and self.new[0] > self.old[2]:
            return "faster"
        return "same"


def read_rows(path: Path) -> dict[str, Row]:
    """The last row of every configuration. Incomparable: not a file of results of one device."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        devices = {row["device"] for row in rows}
        last = {configuration(row): row for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Incomparable(
            f"{path}: expected rows of bench/results as JSON lines: {error}"
        ) from None
    if len(devices) != 1:
        raise Incomparable(f"{path}: expected rows of one device, found {sorted(devices)}")
    return last


def configuration(row: Row) -> str:
    """`benchmark expand, model sdxl-tiny, size_px 64, …`"""
    return ", ".join(f"{key} {row[key]}" for key in CONFIGURATION if row.get(key) is not None)


def compare(old: dict[str, Row], new: dict[str, Row]) -> dict[str, list[Figure]]:
    """Figures in common, by configuration. Incomparable: another device, or no such figure."""
    (was, now) = (next(iter(rows.values()))["device"] for rows in (old, new))
    if was != now:
        raise Incomparable(f"expected results of one device, found {was!r} and {now!r}")
    figures = {name: list(_figures(old[name], new[name])) for name in new if name in old}
    if not any(figures.values()):
        known = "; ".join(old)
        raise Incomparable(
            f"no row of NEW has the configuration of one of OLD, or no figure in common: NEW has "
            f"{'; '.join(new)}; OLD has {known}; measure the same again"
        )
    return figures


def _figures(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Figure]:
    old, new = _parts(old), _parts(new)
    if {"p20", "p50", "p80"} <= old.keys() & new.keys():
        rounds = [row["n"] for row in (old, new) if "n" in row]
        timed = any(part.endswith(TIMES) and "per_s" not in part for part in path)
        speeds = _speeds(old, timed), _speeds(new, timed)
        yield Figure("/".join(path), *speeds, min(rounds, default=None))
        return
    for key in new:
        if key in old and key not in DERIVED:
            yield from _figures(old[key], new[key], (*path, key))


def _parts(value: Any) -> Row:
    """Of a row by key, of a list of points by their configurations; nothing of a number."""
    if isinstance(value, list):
        return {configuration(point): point for point in value if isinstance(point, dict)}
    return value if isinstance(value, dict) else {}


def _speeds(row: Row, timed: bool) -> tuple[float, float, float]:
    if timed:
        return 1 / row["p80"], 1 / row["p50"], 1 / row["p20"]
    return row["p20"], row["p50"], row["p80"]


def differences(old: Row, new: Row) -> list[str]:
    """What else is not alike: libraries, driver, power limit, highest clocks; and the load."""
    was, now = (
        {f"version of {name}": version for name, version in row.get("versions", {}).items()}
        | {key: row.get(key) for key in ("driver", "power_limit_w", "clock_sm_max_mhz")}
        for row in (old, new)
    )
    found = [f"{k} {was[k]} → {now[k]}" for k in now if k in was and was[k] != now[k]]
    return [*found, f"load {old.get('load_1min')} → {new.get('load_1min')}"]


def main(options: Options) -> int:
    """Print the table; 1 if something is slower, else 0."""
    old, new = read_rows(options.old), read_rows(options.new)
    slower = 0
    for name, figures in compare(old, new).items():
        print(f"\n{name}\n  {'; '.join(differences(old[name], new[name]))}")
        width = max((len(figure.name) for figure in figures), default=0)
        for figure in figures:
            noise = "".join(f"  {each}" for each in _intervals(figure))
            print(f"  {figure.name:{width}}  {figure.ratio:5.2f} x  {figure.verdict:8}{noise}")
        slower += sum(figure.verdict == "slower" for figure in figures)
    print(f"\n{slower} slower" if slower else "\nnothing slower")
    return 1 if slower else 0


def _intervals(figure: Figure) -> Iterator[str]:
    """p20 to p80 of both, as shares of the old median."""
    for name, (slow, _, fast) in (("old", figure.old), ("new", figure.new)):
        yield f"{name} {slow / figure.old[1]:.2f}–{fast / figure.old[1]:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
