"""Regression check: compare two result files of one device, row by row of the same configuration.

    python bench/check.py OLD.jsonl NEW.jsonl

The last row of each configuration in either file counts. Every figure that both rows have, rate or
time, is compared by the ratio of its medians, new speed / old speed. A figure is **slower** when
both conditions hold, and **faster** when both hold the other way round:

- beyond noise: the intervals p20-p80 of old and new, each WIDER times its width wider at both
  ends, do not overlap;
- beyond the floor: the ratio is below 1 - FLOOR (or above 1 / (1 - FLOOR)).

Otherwise it is the `same`. Under 1 % of figures of equal speed are called slower (simulated:
normal, heavy-tailed, with dips; 0.3 to 0.9 % at 5 rounds, less at more). Below LEAST_ROUNDS rounds
the spread says little: `too few`, which is no verdict. A figure without a spread is one round.

Where the row has the ratio to a peer of the same rounds (`speedup_spread`), that ratio is judged:
it cancels what the machine did to both. The rate beside it is `shown`, without a verdict. Figures
of other projects are shown as `peer`. A configuration or a figure of ours that only OLD has is
`missing`, and counts like a slower one. `--partial` says that NEW is meant to have less.

Exit status: 1 when a figure of ours is slower or missing; 2 when the files cannot be compared
(different devices, nothing to judge, not JSON lines).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from peer_names import is_peer

FLOOR = 0.05
WIDER = 0.5
LEAST_ROUNDS = 5
CONFIGURATION = (
    *("benchmark", "cell", "model", "weights", "size_px", "batch", "engine_batch", "evals"),
    *("images", "classes", "patches_per_class", "ipc", "data", "crops", "crop_px", "score_px"),
    *("backend", "threads", "student", "student_batch", "student_precision", "seeds", "epochs"),
    *("teacher", "teacher_images", "codec", "top_k", "components", "quick", "generated", "world"),
    *("expanded", "cached_prompts", "shapes_per_class", "allocator"),
)
"""Keys whose values must be equal for two rows to be compared; a key that neither has is equal."""
RATIOS = "speedup_spread"
OVER_PEERS = {"score"}
"""Benchmarks whose ratios are named after the peer that ours is compared with."""
DERIVED = {"speedup_over", "ratio_spread", "waited_s"}
"""Ratios of other figures, and figures that are not speeds."""
TIMES = ("_us", "_s", "_ms", "seconds")
"""Endings of the names of times; every other figure is a rate."""
SINGLE = ("seconds", "images_per_s", "labels_per_s")
"""Figures that a point of bench_scale.py may hold as one number, measured once."""
Row = dict[str, Any]
Where = tuple[str, ...]
"""Keys down to a figure."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare two result files of one device."""

    old: tyro.conf.Positional[Path]
    """Earlier result file."""
    new: tyro.conf.Positional[Path]
    """Current result file."""
    partial: bool = False
    """NEW has fewer configurations or figures; report what it lacks, but do not fail."""


class Incomparable(ValueError):  # noqa: N818 - reads as the message does
    """The two files cannot be compared; the message says why."""


@dataclass(frozen=True)
class Figure:
    """One figure of two rows, as speeds; a time is inverted."""

    name: str
    """Its path in the row, such as spread/ort."""
    old: tuple[float, float, float]
    """p20, p50, p80: slow, middle, fast."""
    new: tuple[float, float, float]
    rounds: int | None
    """The smaller count of both rows. None: not recorded, and large."""
    judged: str | None = None
    """Fixed verdict: peer or shown. None: judge by the rule."""

    @property
    def ratio(self) -> float:
        """New speed over old speed: below 1 is slower."""
        return self.new[1] / self.old[1]

    @property
    def verdict(self) -> str:
        """slower, faster, same, too few, shown, or peer."""
        if self.judged is not None:
            return self.judged
        if self.rounds is not None and self.rounds < LEAST_ROUNDS:
            return "too few"
        (old_low, old_high), (new_low, new_high) = _widened(self.old), _widened(self.new)
        if self.ratio < 1 - FLOOR and new_high < old_low:
            return "slower"
        if self.ratio > 1 / (1 - FLOOR) and new_low > old_high:
            return "faster"
        return "same"


def _widened(figure: tuple[float, float, float]) -> tuple[float, float]:
    slow, _, fast = figure
    more = WIDER * (fast - slow)
    return slow - more, fast + more


def read_rows(path: Path) -> dict[str, Row]:
    """The last row of every configuration. Raises Incomparable unless all are of one device."""
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


@dataclass(frozen=True)
class Comparison:
    """One configuration of both files."""

    name: str
    figures: list[Figure]
    missing: list[str]
    """Figures of ours that only the old row has."""
    notes: list[str]
    """Other differences of the two rows."""


def compare(old: dict[str, Row], new: dict[str, Row]) -> tuple[list[Comparison], list[str]]:
    """Configurations in common, and the names of those that only `old` has.

    Raises Incomparable when the devices differ or no figure can be judged.
    """
    (was, now) = (next(iter(rows.values()))["device"] for rows in (old, new))
    if was != now:
        raise Incomparable(f"expected results of one device, found {was!r} and {now!r}")
    found = [_compare_rows(name, old[name], new[name]) for name in new if name in old]
    if not any(each.figures for each in found):
        raise Incomparable(
            f"no row of NEW has the configuration of one of OLD, or no figure in common: NEW has "
            f"{'; '.join(new)}; OLD has {'; '.join(old)}; measure the same again"
        )
    verdicts = {figure.verdict for each in found for figure in each.figures}
    if verdicts <= {"peer", "too few", "shown"}:
        raise Incomparable(
            f"nothing can be judged: expected figures of ours of at least {LEAST_ROUNDS} rounds in "
            f"both files, found only {' and '.join(sorted(verdicts))}; measure with more --rounds"
        )
    return found, [name for name in old if name not in new]


def _compare_rows(name: str, old: Row, new: Row) -> Comparison:
    was, now = dict(_spreads(old)), dict(_spreads(new))
    both = [path for path in now if path in was]
    figures = [_figure(path, was[path], now[path], _unjudged(path, both, new)) for path in both]
    missing = [path for path in was if path not in now and _unjudged(path, was, old) != "peer"]
    return Comparison(name, figures, ["/".join(path) for path in missing], differences(old, new))


def _unjudged(path: Where, both: Collection[Where], row: Row) -> str | None:
    """`peer`: another project's; `shown`: a rate of ours beside its ratio; None: to be judged."""
    over_peers = row["benchmark"] in OVER_PEERS
    if path[0] == RATIOS and over_peers:
        return None
    if is_peer(path[-1]):
        return "peer"
    ratios = {each[-1] for each in both if each[0] == RATIOS}
    return (
        "shown" if path[0] == "spread" and (over_peers or path[-1] in ratios) and ratios else None
    )


def _spreads(value: Any, path: Where = ()) -> Iterator[tuple[Where, Row]]:
    """Every figure, with quantiles or as one number, with its path in the row."""
    parts = _parts(value)
    if {"p20", "p50", "p80"} <= parts.keys():
        yield path, parts
        return
    for key, part in parts.items():
        if key in SINGLE and isinstance(part, int | float) and part > 0:
            yield (*path, key), {"p20": part, "p50": part, "p80": part, "n": 1}
        elif key not in DERIVED:
            yield from _spreads(part, (*path, key))


def _figure(path: Where, old: Row, new: Row, judged: str | None) -> Figure:
    timed = any(part.endswith(TIMES) and "per_s" not in part for part in path)
    rounds = [row["n"] for row in (old, new) if "n" in row]
    speeds = _speeds(old, timed), _speeds(new, timed)
    return Figure("/".join(path), *speeds, min(rounds, default=None), judged)


def _parts(value: Any) -> Row:
    """Parts of a row by key, of a list of points by configuration; a number has none."""
    if isinstance(value, list):
        return {configuration(point): point for point in value if isinstance(point, dict)}
    return value if isinstance(value, dict) else {}


def _speeds(row: Row, timed: bool) -> tuple[float, float, float]:
    if timed:
        return 1 / row["p80"], 1 / row["p50"], 1 / row["p20"]
    return row["p20"], row["p50"], row["p80"]


def differences(old: Row, new: Row) -> list[str]:
    """Other differences: libraries, driver, power limit, highest clocks; and the load."""
    was, now = (
        {f"version of {name}": version for name, version in row.get("versions", {}).items()}
        | {key: row.get(key) for key in ("driver", "power_limit_w", "clock_sm_max_mhz")}
        for row in (old, new)
    )
    found = [f"{k} {was[k]} → {now[k]}" for k in now if k in was and was[k] != now[k]]
    return [*found, f"load {old.get('load_1min')} → {new.get('load_1min')}"]


def main(options: Options) -> int:
    """Print the table; 1 when a figure is slower or missing, else 0."""
    found, lost = compare(read_rows(options.old), read_rows(options.new))
    for each in found:
        print(f"\n{each.name}\n  {'; '.join(each.notes)}")
        width = max(map(len, [*(figure.name for figure in each.figures), *each.missing]), default=0)
        for figure in each.figures:
            noise = "".join(f"  {side}" for side in _intervals(figure))
            print(f"  {figure.name:{width}}  {figure.ratio:5.2f} x  {figure.verdict:8}{noise}")
        for name in each.missing:
            print(f"  {name:{width}}          missing")
    for name in lost:
        print(f"\n{name}\n  missing")
    counts = Counter(figure.verdict for each in found for figure in each.figures)
    counts["missing"] = len(lost) + sum(len(each.missing) for each in found)
    told = [f"{counts[name]} {name}" for name in ("slower", "missing", "too few") if counts[name]]
    print(f"\n{', '.join(told) or 'nothing slower, nothing missing'}")
    return 1 if counts["slower"] or (counts["missing"] and not options.partial) else 0


def _intervals(figure: Figure) -> Iterator[str]:
    """p20 to p80 of old and new, relative to the old median."""
    for name, (slow, _, fast) in (("old", figure.old), ("new", figure.new)):
        yield f"{name} {slow / figure.old[1]:.2f}–{fast / figure.old[1]:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
