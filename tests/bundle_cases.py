"""A small bundle: its key, and the build that writes its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY: Mapping[str, Any] = {
    "backend": "ort",
    "model": "m",
    "weights": "pretrained",
    "device": "cpu",
    "precision": "fp32",
    "size_px": 64,
    "batch": 32,
    "images_per_prompt": 8,
    "gpu": None,
    "libraries": {"torch": "2.11"},
}


def fill(folder: Path) -> dict[str, Any]:
    """Write one file; return a report."""
    (folder / "graph.onnx").write_bytes(b"0123456789")
    return {"parity": {}}
