"""The files of a part's weights: safetensors, plain, of the fp16 variant or in shards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configurations import ModelError, read_object

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Stem of each part's weight files."""


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files that hold one part's weights: one, or an index and its shards.

    They are the ones that are hashed and the ones that are loaded. A file may be a link, as in the
    hub's cache: its content is hashed. Raises ModelError when there are none or too many.
    """
    stem = STEMS.get(part, STEMS["vae"])
    for variant in ("", ".fp16"):
        file = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file() and file.is_file():
            raise ModelError(
                f"{folder}: expected {file.name} or {index.name}, got both: remove the one that is "
                "not the model's"
            )
        if index.is_file():
            return [index, *_shards(index)]
        if file.is_file():
            return [file]
    raise ModelError(
        f"{folder} holds no weights: expected {stem}.safetensors "
        "(pickled .bin weights are refused; convert them to safetensors)"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names: plain names of safetensors beside it."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index}: expected a weight_map from tensors to files, got none")
    for name in listed.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ModelError(
                f"{index}: expected names of .safetensors files in its folder, got {name!r}"
            )
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, but {index.name} names it")
    return [index.parent / name for name in sorted(set(listed.values()))]


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part, by name. Raises ModelError for a damaged file or a tensor in two."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, part):
        if path.suffix != ".safetensors":
            continue
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged ({error}): copy or download it again") from error
        if twice := tensors.keys() & found.keys():
            raise ModelError(f"{path}: {min(twice)} is in another file of {path.parent} too")
        tensors |= found
    return tensors


def check_tensors(folder: Path, **faults: Iterable[str]) -> None:
    """Raise ModelError for tensors that are missing, unexpected or of another shape.

    CLIP's position_ids are not weights: transformers saved them once, and no longer does.
    """
    for fault, names in faults.items():
        names = sorted(name for name in names if not name.endswith("embeddings.position_ids"))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"{folder}: expected weights that fit its config.json, got {fault} tensors: "
                f"{names[0]}{more}: copy or download the folder again"
            )
