"""What `engine` can be asked for. Torch-free, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class CoresetInfo:
    """Say what a coreset is, how it was made and how many bytes it takes."""

    folder: Positional[Path]
    """The coreset's folder: the one with manifest.json in it."""
    json: bool = False
    """Print nothing but the last line, the JSON object."""


@dataclass(frozen=True, kw_only=True)
class CoresetVerify:
    """Compare every file of a coreset with the hash in its manifest."""

    folder: Positional[Path]
    """The coreset's folder: the one with manifest.json in it."""
    json: bool = False
    """Print nothing but the last line, the JSON object."""


@dataclass(frozen=True, kw_only=True)
class CoresetShow:
    """Draw a contact sheet of a coreset: a row of patches per class."""

    folder: Positional[Path]
    """The coreset's folder: the one with manifest.json in it."""
    out: Path | None = None
    """The PNG to write; FOLDER.png, beside the folder, when left out."""
    patches_per_class: int = 10
    """The longest row, at least 1."""
    json: bool = False
    """Print nothing but the last line, the JSON object."""

    def __post_init__(self) -> None:
        if self.patches_per_class < 1:
            raise ValueError(
                f"--patches-per-class: expected at least 1, got {self.patches_per_class}"
            )
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise ValueError(f"--out: expected a name that ends in .png, got {self.out}")
