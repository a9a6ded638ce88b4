"""What ImageNet would take at measured rates: arithmetic, and no measurement.

    scored images      min(300, images per class) · classes             RDED's pool
    samples            classes · ipc · 2²
    expansion          samples · epochs / rate of labels (expansion and teacher, one pass: record)
    labels             as their file holds them (engine/labels/file.py): 2 B a class of an answer as
                       dense, 40 B of an answer by pca, and its basis
    keys and values    classes · bytes of a prompt: what would lie on the device if all were kept

A rate counts for what it was measured at alone: `NEEDS` says which settings of its row must be
those of the projection. Where no row fits, there is no figure but the command that measures it.
All rates are of one device, and each is printed with its file, commit and date.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchbloom.engine.labels.codecs import COMPONENTS, Dense, Pca
from patchbloom.engine.labels.file import LabelLayout

POOL_PER_CLASS, TILES, EPOCHS, EVALS = 300, 4, 300, 4
BENCHMARK = "scale-"
"""How the benchmark of a row begins; its part follows."""
NEEDS = {
    "score_images_per_s": ("scoring", ("size_px", "teacher", "generated")),
    "labels_per_s": ("labels", ("model", "backend", "size_px", "teacher", "evals")),
    "write_patches_per_s": ("coreset", ("size_px",)),
    "bytes_per_patch": ("coreset", ("size_px",)),
    "bytes_per_prompt": ("coreset", ("model", "precision")),
}
"""Of every rate, the part that measures it, and the settings that it depends on."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A set of images to distil."""

    name: str
    classes: int
    images: int
    ipc: tuple[int, ...]


DATASETS = (
    Dataset("ImageNet-1k", 1000, 1_281_167, (1, 10, 50)),
    Dataset("ImageNet-21k", 21_841, 14_197_122, (1, 10, 50)),
)
"""21k is the release of autumn 2011; its classes differ in size, so the pool is an upper bound."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is projected; a rate that was measured at anything else has no say."""

    model: str
    backend: str
    """With its precision: eager-fp16."""
    size_px: int
    teacher: str
    evals: int = EVALS
    generated: bool = False
    """Photographs: generated images of 64 px are decoded in no time."""

    @property
    def precision(self) -> str:
        """Of the backend."""
        return self.backend.partition("-")[2]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A rate, and where it is from."""

    value: float
    file: str
    """A results file, or `this run`."""
    device: str
    commit: str
    """With `-dirty` where files differed from it, and `, quick` of few and small points."""
    date: str

    def __str__(self) -> str:
        return f"{self.value:,.4g} from {self.file}: commit {self.commit}, {self.date}"


def read_rows(paths: Sequence[Path]) -> list[tuple[str, Row]]:
    """(file, row) of every measured part in these results files, in their order.

    FileNotFoundError: no such file. ValueError: a file that holds no such row.
    """
    rows: list[tuple[str, Row]] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"--rates {path}: expected a results file, found none")
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            measured = [(str(path), row) for row in found if _is_measured(row)]
        except (ValueError, KeyError, TypeError, AttributeError):
            measured = []
        if not measured:
            raise ValueError(
                f"--rates {path}: expected rows with rates, found none: give files that "
                f"bench_scale.py wrote, {BENCHMARK}scoring.jsonl and the like"
            )
        rows += measured
    return rows


def _is_measured(row: Row) -> bool:
    return row["benchmark"].startswith(BENCHMARK) and isinstance(row.get("rates"), dict)


def rates_for(target: Target, rows: Sequence[tuple[str, Row]]) -> dict[str, Origin]:
    """The last rate of each kind that was measured at the target, on the device of the last row."""
    device = rows[-1][1]["device"] if rows else None
    return {
        name: _origin(row["rates"][name], file, row)
        for file, row in rows
        if row["device"] == device
        for name in NEEDS
        if row["rates"].get(name, 0) > 0 and _fits(name, row, target)
    }


def _fits(name: str, row: Row, target: Target) -> bool:
    return all(row.get(key) == getattr(target, key) for key in NEEDS[name][1])


def _origin(value: float, file: str, row: Row) -> Origin:
    marks = f"{'-dirty' if row['dirty'] else ''}{', quick' if row['quick'] else ''}"
    return Origin(
        value=value,
        file=file,
        device=row["device"],
        commit=f"{row['commit']}{marks}",
        date=row["time"][:10],
    )


def commands(target: Target, rates: dict[str, Origin]) -> dict[str, str]:
    """Of every rate that is missing, the command that measures it."""
    of_model = f"--model {target.model} --backend {target.backend} --size {target.size_px}"
    words = {
        "scoring": f"--teacher {target.teacher} --size {target.size_px} --data DIR",
        "labels": f"--teacher {target.teacher} {of_model}",
        "coreset": of_model,
    }
    return {
        name: f"python bench/bench_scale.py --parts {part} {words[part]}"
        for name, (part, _) in NEEDS.items()
        if name not in rates
    }


def project(rates: dict[str, Origin]) -> list[Row]:
    """A row per set and IPC: hours and bytes; None where the rate is missing."""
    return [_row(each, ipc, rates) for each in DATASETS for ipc in each.ipc]


def _row(dataset: Dataset, ipc: int, rates: dict[str, Origin]) -> Row:
    samples = dataset.classes * ipc * TILES
    pool = min(POOL_PER_CLASS * dataset.classes, dataset.images)

    def hours(items: int, name: str) -> float | None:
        return items / rates[name].value / 3600 if name in rates else None

    def size(items: int, name: str) -> float | None:
        return items * rates[name].value if name in rates else None

    sizes = {"epochs": EPOCHS, "samples": samples, "classes": dataset.classes}
    return {
        "projection": True,
        "dataset": dataset.name,
        "ipc": ipc,
        "scoring_h": hours(pool, "score_images_per_s"),
        "writing_h": hours(samples, "write_patches_per_s"),
        "labels_h": hours(samples * EPOCHS, "labels_per_s"),
        "patch_bytes": size(samples, "bytes_per_patch"),
        "dense_label_bytes": LabelLayout(codec=Dense(), **sizes).bytes,
        "pca_label_bytes": LabelLayout(codec=Pca(), **sizes).bytes,
        "keys_values_bytes": size(dataset.classes, "bytes_per_prompt"),
    }


def table(target: Target, rates: dict[str, Origin]) -> str:
    """As people read it: the figures, whose rates they are, and how to get those that are not."""
    device = next(iter(rates.values())).device if rates else "no device"
    lines = [
        f"PROJECTION, not measured: {EPOCHS} epochs, {TILES} patches per image, {target.size_px} "
        f"px, {target.model}, {target.backend}, {target.evals} evals, teacher "
        f"{target.teacher}; one device: {device}",
        f"{'set':13} {'IPC':>3} {'scoring h':>10} {'writing h':>10} {'labels h':>10} "
        f"{'patches':>9} {'dense':>9} {f'pca-{COMPONENTS}':>9} {'K/V':>9}",
    ]
    for row in project(rates):
        hours = " ".join(_cell(row[name], 1, "", 10) for name in row if name.endswith("_h"))
        sizes = " ".join(_cell(row[name], 1e9, " GB", 9) for name in row if name.endswith("_bytes"))
        lines.append(f"{row['dataset']:13} {row['ipc']:3} {hours} {sizes}")
    lines += [f"{name}: {origin}" for name, origin in rates.items()]
    missing = commands(target, rates)
    lines += [f"{name}: not measured at this: {command}" for name, command in missing.items()]
    return "\n".join(lines)


def _cell(value: float | None, unit: float, name: str, width: int) -> str:
    """Hours to two places, sizes to one."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{value / unit:{width - len(name)}.{1 if name else 2}f}{name}"
