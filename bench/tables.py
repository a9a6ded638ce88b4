"""The tables of bench/README.md, rendered from bench/results: `make bench-table`.

    python bench/tables.py        (rewrites bench/README.md in place)

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing else is touched. A
block covers one device and setting, at the commit that measured it last. All rows of that commit
add their peers, each compared with the diffusers pipeline of its own row, since `make gpu` runs
every backend in its own process. A table only combines rows of the same work. A backend in a lower
precision than diffusers' usual one is faster by itself, so another column has its gain within its
own precision, where that pipeline was timed. Figures are medians, with p20–p80 in brackets. An
expansion row with diffusers alone compares nothing and is skipped.
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
from peer_names import default_precision, is_peer, split_name

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "bench" / "README.md"
Row = dict[str, Any]
Columns = dict[str, Callable[[Row, str], str]]
"""Cell text by column head, from a peer's row and the peer's name in it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the tables of bench/README.md from the results."""

    results: Path = RESULTS
    """Folder of result files, by device."""
    readme: Path = README
    """File to rewrite in place."""


def rendered(readme: str, results: Path) -> str:
    """The text with every table between its markers rendered from the results.

    Raises ValueError when a table lacks its two markers.
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
    for setting, rows in _blocks(results, "expand", _expansion_setting):
        model, weights, size_px, batch, evals, images, classes, _, threads = setting
        told = "" if weights == "pretrained" else f" with {weights} weights"
        columns: Columns = {
            "backend": lambda _, name: name,
            "precision": _precision,
            "images/s": lambda row, name: _interval(row["spread"][name], ".0f"),
            f"× diffusers ({_usual(rows[-1])})": _ratio,
            "× diffusers, same precision": _ratio_within_precision,
            "× diffusers, VAE in fp32": lambda row, name: _over(row, name, "diffusers-upcast"),
            "of the roofline": _share,
            "memory added": _memory,
            "error of pictures": _pictures,
        }
        yield from _block(
            f"`{model}`{told}, {size_px} px, batch {batch}, {evals} evals, {images} images of "
            f"{classes} classes, {threads} threads",
            rows,
            columns,
        )


def scoring(results: Path) -> Iterator[str]:
    """Images per second of the loaders that feed patch scoring."""
    for setting, rows in _blocks(results, "score", _scoring_setting):
        crops, crop_px, _, threads, data, images, decoder = setting
        columns: Columns = {
            "loader": lambda _, name: "ours" if name == "dali" else name,
            "images/s": lambda row, name: _interval(row["spread"][name], ".0f"),
            "ours is faster by": _ratio,
        }
        where = "" if decoder == "cpu" else ", decoded on the GPU"
        yield from _block(
            f"{images} images of {data}, {crops} crops of {crop_px} px each, {threads} threads"
            f"{where}",
            rows,
            columns,
        )


TABLES: dict[str, Callable[[Path], Iterator[str]]] = {"expand": expansion, "score": scoring}


def _expansion_setting(row: Row) -> tuple[Any, ...] | None:
    """Setting of a row. None: it compares nothing, or is too old to record its setting."""
    if "size_px" not in row or len(row["spread"]) < 2:
        return None
    told = (row[key] for key in ("model", "weights", "size_px", "batch", "evals"))
    return (
        *told,
        row["images"],
        row.get("classes", 10),
        row.get("patches_per_class", 40),
        row["threads"],
    )


def _scoring_setting(row: Row) -> tuple[Any, ...]:
    """Setting of a row; old rows without the data's name are Imagenette, decoded on the CPU."""
    told = (row[key] for key in ("crops", "crop_px", "batch", "threads"))
    return *told, row.get("data", "imagenette"), row["images"], row.get("decoder", "cpu")


def _blocks(
    results: Path, benchmark: str, setting: Callable[[Row], tuple[Any, ...] | None]
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Each setting with the rows of its last commit, in order of first appearance."""
    blocks: dict[tuple[Any, ...], list[Row]] = {}
    for path in sorted(results.glob(f"*/{benchmark}.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            found = setting(row)
            if found:
                block = blocks.setdefault((row["device"], *found), [])
                if block and _commit(block[-1]) != _commit(row):
                    block.clear()
                block.append(row)
    for (_, *found), block in blocks.items():
        yield tuple(found), block


def _commit(row: Row) -> str:
    return f"{row['commit']}{'-dirty' if row.get('dirty') else ''}"


def _block(setting: str, rows: list[Row], columns: Columns) -> Iterator[str]:
    """A caption and a table with a line per peer; empty columns are omitted."""
    last = rows[-1]
    of_peers = {name: row for row in rows for name in row["spread"]}
    counts = {row["spread"][name]["n"] for name, row in of_peers.items()}
    rounds = "–".join(str(n) for n in sorted({min(counts), max(counts)}))
    when = f"{last['time'][:10]}, commit {_commit(last)}, n = {rounds}"
    yield f"\n{setting}; {last['device']} ({when}):\n"
    cells = {
        head: [cell(row, name) for name, row in of_peers.items()] for head, cell in columns.items()
    }
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


def _precision(row: Row, name: str) -> str:
    """Precision of the denoiser, and of the decoder if it differs."""
    if "precision" not in row:  # old rows: ours recorded it, peers used the usual one
        told = row["engines"].get(name, {}).get("precision")
        return told or split_name(name)[1] or _usual(row)
    precision, of_vae = row["precision"][name], row["vae_precision"][name]
    return precision if precision == of_vae else f"{precision}, VAE {of_vae}"


def _usual(row: Row) -> str:
    """Precision of `diffusers` on the row's device; only rows of GPUs have `sm_count`."""
    return default_precision("cuda" if "sm_count" in row else "cpu")


def _ratio_within_precision(row: Row, name: str) -> str:
    """Speed-up over diffusers' pipeline in the backend's precision; empty for peers."""
    if is_peer(name):
        return ""
    precision = _precision(row, name).partition(",")[0]
    if precision == _usual(row):
        return _ratio(row, name)
    return _over(row, name, f"diffusers-{precision}")


def _over(row: Row, name: str, peer: str) -> str:
    spread = row.get("speedup_over", {}).get(peer, {}).get(name)
    return _interval(spread, ".2f") if spread else ""


def _share(row: Row, name: str) -> str:
    """Percent of roofline; empty for old rows, whose roofline ignored convolutions."""
    held = "reached_tflops" in row.get("roofline", {})
    percent = row["percent_of_roofline"].get(name) if held else None
    return "" if percent is None else f"{percent:.0f} %"


def _memory(row: Row, name: str) -> str:
    """Memory added on the whole device, or in the process."""
    found = row.get("peak_memory", {}).get(name, {})
    size_bytes = found.get("device_bytes", found.get("process_bytes"))
    return "" if size_bytes is None else f"{size_bytes / 2**20:.0f} MiB"


def _pictures(row: Row, name: str) -> str:
    """Distance from diffusers' pictures: max abs error in fp32, PSNR in half precision.

    A tiny decoder's from the pictures of the own decoder.
    """
    if name not in row["errors"]:
        return ""
    errors = row["errors"][name]
    same = errors.get("own_decoder", errors["same"])
    if _precision(row, name) == _usual(row) == "fp32":
        return f"{same['max_abs']:.0e}"
    return f"{same['psnr_db']:.0f} dB"


def main(options: Options) -> None:
    """Rewrite the file, and print whether it changed."""
    before = options.readme.read_text(encoding="utf-8")
    after = rendered(before, options.results)
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: {'unchanged' if after == before else 'rewritten'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
