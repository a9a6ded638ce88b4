"""README's tables of figures, rendered from bench/results: `make bench-table`.

    python bench/tables.py        (rewrites README.md in place)

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, which stay; nothing else is
touched. Of every device and setting the last row counts, as a whole: its peers were measured side
by side. Figures are medians, in brackets p20–p80. A row of expansion without an engine of ours
compares nothing and is left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write README's tables from the results."""

    results: Path = RESULTS
    """Folder of result files, by device."""
    readme: Path = README
    """What is rewritten in place."""


def rendered(readme: str, results: Path) -> str:
    """The text with every table between its markers as the results have it.

    ValueError: a table without its two markers.
    """
    for name, blocks in TABLES.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        around = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        if len(around.findall(readme)) != 1:
            raise ValueError(f"README: expected {begin} and {end} once, in this order; put them in")
        table = "\n".join([begin, *blocks(results), end])
        readme = around.sub(lambda _, table=table: table, readme)
    return readme


def expansion(results: Path) -> Iterator[str]:
    """Images per second by backend, beside diffusers' own pipeline."""
    for (model, size_px, batch, evals), row in _last_rows(results, "expand", _expansion_setting):
        setting = f"`{model}`, {size_px} px, batch {batch}, {evals} evals"
        columns = {
            "backend": str,
            "images/s": lambda name, row=row: _interval(row["spread"][name], ".0f"),
            "× diffusers": lambda name, row=row: _ratio(row, name),
            "of the roofline": lambda name, row=row: _share(row, name),
            "memory added": lambda name, row=row: _memory(row, name),
            "error of pictures": lambda name, row=row: _pictures(row, name),
        }
        yield from _block(setting, row, columns)


def scoring(results: Path) -> Iterator[str]:
    """Images per second of the loaders that feed patch scoring."""
    for (crops, crop_px, _, threads), row in _last_rows(results, "score", _scoring_setting):
        setting = f"{crops} crops of {crop_px} px an image, {threads} threads"
        columns = {
            "loader": lambda name: "ours" if name == "dali" else name,
            "images/s": lambda name, row=row: _interval(row["spread"][name], ".0f"),
            "ours is faster by": lambda name, row=row: _ratio(row, name),
        }
        yield from _block(setting, row, columns)


TABLES: dict[str, Callable[[Path], Iterator[str]]] = {"expand": expansion, "score": scoring}


def _expansion_setting(row: Row) -> tuple[Any, ...] | None:
    engine = next(iter(row["engines"].values()), None)
    return engine and tuple(engine[key] for key in ("model", "size_px", "batch", "evals"))


def _scoring_setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("crops", "crop_px", "batch", "threads"))


def _last_rows(
    results: Path, benchmark: str, setting: Callable[[Row], tuple[Any, ...] | None]
) -> Iterator[tuple[tuple[Any, ...], Row]]:
    """Setting and row, one per device and setting, in the order in which they came up."""
    rows: dict[tuple[Any, ...], Row] = {}
    for path in sorted(results.glob(f"*/{benchmark}.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            found = setting(row)
            if found:
                rows[(row["device"], *found)] = row
    for (_, *found), row in rows.items():
        yield tuple(found), row


def _block(setting: str, row: Row, columns: dict[str, Callable[[str], str]]) -> Iterator[str]:
    """A caption and a table with a line per peer; a column that is empty is left out."""
    commit = f"{row['commit']}{'-dirty' if row.get('dirty') else ''}"
    rounds = next(iter(row["spread"].values()))["n"]
    yield f"\n{setting}; {row['device']} ({row['time'][:10]}, commit {commit}, n = {rounds}):\n"
    cells = {head: [cell(name) for name in row["spread"]] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(column)}
    yield _line(list(cells))
    yield _line(["---"] * len(cells))
    yield from (_line(line) for line in zip(*cells.values(), strict=True))
    yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(spread: Row, digits: str) -> str:
    low, middle, high = (format(spread[name], digits) for name in ("p20", "p50", "p80"))
    return f"{middle} ({low}–{high})"


def _ratio(row: Row, name: str) -> str:
    spread = row["speedup_spread"].get(name)
    return _interval(spread, ".2f") if spread else ""


def _share(row: Row, name: str) -> str:
    percent = row.get("percent_of_roofline", {}).get(name)
    return "" if percent is None else f"{percent:.0f} %"


def _memory(row: Row, name: str) -> str:
    """Of the whole device, or of the process."""
    found = row.get("peak_memory", {}).get(name, {})
    size_bytes = found.get("device_bytes", found.get("process_bytes"))
    return "" if size_bytes is None else f"{size_bytes / 2**20:.0f} MiB"


def _pictures(row: Row, name: str) -> str:
    """How far from diffusers': max abs error in fp32, PSNR in half precision."""
    if name not in row["errors"]:
        return ""
    same = row["errors"][name]["same"]
    if row["engines"][name]["precision"] == "fp32":
        return f"{same['max_abs']:.0e}"
    return f"{same['psnr_db']:.0f} dB"


def main(options: Options) -> None:
    """Rewrite the file, and say whether it changed."""
    before = options.readme.read_text(encoding="utf-8")
    after = rendered(before, options.results)
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: {'as it was' if after == before else 'rewritten'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
