"""What ImageNet would take at measured rates: arithmetic, and no measurement.

    scored images      min(300, images per class) · classes             RDED's pool
    samples            classes · ipc · 2²
    expansion          samples · epochs / rate of labels (expansion and teacher, one pass: record)
    labels             dense: epochs · samples · classes · 2 B;  top-10: epochs · samples · 40 B
    keys and values    classes · bytes of a prompt: what would lie on the device if all were kept

Rates hold for the model, the size and the machine that they were measured with, and so does this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POOL_PER_CLASS, TILES, EPOCHS, TOP_K_BYTES = 300, 4, 300, 40
RATES = {
    "score_images_per_s": "decode, crops and teacher",
    "labels_per_s": "expansion and teacher",
    "write_patches_per_s": "PNG files with their hashes",
    "bytes_per_patch": "of the PNG files",
    "bytes_per_prompt": "keys and values",
}
"""What a projection needs, and of what it is."""


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


def read_rates(path: Path) -> dict[str, float]:
    """The rates in the last row of a results file, or in a JSON object of rates.

    FileNotFoundError: no such file. ValueError: other content, or a rate that is missing or not
    positive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--rates {path}: no such file")
    try:
        found = json.loads(path.read_text().strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = None
    rates = found.get("rates", found) if isinstance(found, dict) else {}
    if missing := missing_rates(rates):
        raise ValueError(
            f"--rates {path}: expected {', '.join(missing)}, positive, in its last line; give a "
            "scale.jsonl of all parts, or one JSON object of these"
        )
    return {name: float(rates[name]) for name in RATES}


def missing_rates(rates: dict[str, Any]) -> list[str]:
    """Names in RATES that are not there as positive numbers."""
    return [
        name
        for name in RATES
        if not isinstance(rates.get(name), int | float) or not rates[name] > 0
    ]


def project(rates: dict[str, float]) -> list[dict[str, Any]]:
    """A row per set and IPC: hours and bytes."""
    return [_row(each, ipc, rates) for each in DATASETS for ipc in each.ipc]


def _row(dataset: Dataset, ipc: int, rates: dict[str, float]) -> dict[str, Any]:
    samples = dataset.classes * ipc * TILES
    pool = min(POOL_PER_CLASS * dataset.classes, dataset.images)
    return {
        "projection": True,
        "dataset": dataset.name,
        "ipc": ipc,
        "scoring_h": pool / rates["score_images_per_s"] / 3600,
        "writing_h": samples / rates["write_patches_per_s"] / 3600,
        "labels_h": samples * EPOCHS / rates["labels_per_s"] / 3600,
        "patch_bytes": samples * rates["bytes_per_patch"],
        "dense_label_bytes": EPOCHS * samples * dataset.classes * 2,
        "top_10_label_bytes": EPOCHS * samples * TOP_K_BYTES,
        "keys_values_bytes": dataset.classes * rates["bytes_per_prompt"],
    }


def table(rows: list[dict[str, Any]], source: str) -> str:
    """As people read it; `source` is whose rates they are."""
    lines = [
        f"PROJECTION, not measured: {EPOCHS} epochs, {TILES} patches per image, one device, rates "
        f"of {source}",
        f"{'set':13} {'IPC':>3} {'scoring h':>10} {'writing h':>10} {'labels h':>10} "
        f"{'patches':>9} {'dense':>9} {'top-10':>9} {'K/V':>9}",
    ]
    for row in rows:
        hours = " ".join(f"{row[name]:10.2f}" for name in ("scoring_h", "writing_h", "labels_h"))
        sizes = (row[name] for name in row if name.endswith("_bytes"))
        lines.append(
            f"{row['dataset']:13} {row['ipc']:3} {hours} "
            + " ".join(f"{size / 1e9:6.1f} GB" for size in sizes)
        )
    return "\n".join(lines)
