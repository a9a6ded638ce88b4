"""A model folder's JSON: read within bounds, and refused in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from .documents import read_json

_MOST_JSON_BYTES = 1 << 22  # SDXL's largest index of shards has 0.2 MB
_MOST = 1 << 16  # in a configuration; CLIP's vocabulary has 49,408 tokens
_MOST_LEVELS = 8  # of a VAE; SDXL's has 4
_MOST_TENSORS = 1 << 13  # of a part, built in 3 s; SDXL's UNet has 1680
_MOST_WEIGHTS = 1 << 32  # of a part; SDXL's UNet has 2.6e9


class ModelError(ValueError):
    """The requested model does not exist, is incomplete, or has another layout."""


def read_config(path: Path) -> dict[str, Any]:
    """A part's configuration. Raises ModelError for quantised weights and huge numbers too."""
    config = read_object(path, _MOST)
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: expected plain weights, got a quantization_config: give the folder of the "
            "model before its quantisation"
        )
    return config


def read_object(path: Path, most: int | None = None) -> dict[str, Any]:
    """The JSON object in a file, with whole numbers up to `most`."""
    remedy = "copy or download it again"
    bounds = {"most_bytes": _MOST_JSON_BYTES, "most": most}
    return read_json(path, ModelError, remedy, dict[str, Any], **bounds)


def whole_number(path: Path, name: str) -> int:
    """A positive number of a configuration. Raises ModelError for anything else."""
    value = read_config(path).get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{path}: expected a whole number as {name}, got {_short(value)}: give SDXL's "
            "configuration of this part"
        )
    return value


def vae_factor(path: Path) -> int:
    """Image side / latent side of the VAE that `path` configures."""
    channels = read_config(path).get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= _MOST_LEVELS:
        raise ModelError(
            f"{path}: expected 1 to {_MOST_LEVELS} numbers as block_out_channels, got "
            f"{_short(channels)}: give SDXL's configuration of this VAE"
        )
    return 2 ** (len(channels) - 1)


def text_widths(unet: Path) -> tuple[int, int]:
    """Widths of a token's embedding and of the pooled embedding, as the UNet takes them."""
    pooled_and_times = whole_number(unet, "projection_class_embeddings_input_dim")
    times = 6 * whole_number(unet, "addition_time_embed_dim")
    return whole_number(unet, "cross_attention_dim"), pooled_and_times - times


def seen_classes(folder: Path) -> tuple[str, ...] | None:
    """Class names that the model was trained on, from its model card; None without a card."""
    card = folder / "model_card.json"
    if not card.is_file():
        return None
    names = read_object(card).get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{card}: expected a list of names as class_names, got {_short(names)}: mend or remove "
            "the card"
        )
    return tuple(names)


def check_scheduler(path: Path) -> None:
    """Raise ModelError for a model that was trained for another scheduler or prediction."""
    config = read_config(path)
    name = config.get("_class_name", "EulerAncestralDiscreteScheduler")
    prediction = config.get("prediction_type", "epsilon")
    if name != "EulerAncestralDiscreteScheduler" or prediction != "epsilon":
        raise ModelError(
            f"{path}: expected a model for EulerAncestralDiscreteScheduler with epsilon "
            f"prediction, as SDXL-Turbo is, got one for {_short(name)} with {_short(prediction)}: "
            "give another model"
        )
    with naming(path):
        EulerAncestralDiscreteScheduler.from_config(config)


def check_text_widths(folder: Path) -> None:
    """Raise ModelError for text encoders whose embeddings the UNet does not take."""
    parts = ("unet", "text_encoder", "text_encoder_2")
    unet, first, second = (folder / part / "config.json" for part in parts)
    made = whole_number(first, "hidden_size") + whole_number(second, "hidden_size")
    pooled = whole_number(second, "projection_dim")
    taken, pooled_taken = text_widths(unet)
    if (made, pooled) != (taken, pooled_taken):
        raise ModelError(
            f"{unet}: expected a UNet for embeddings of widths {made} and {pooled}, as {first} and "
            f"{second} make them, got one for {taken} and {pooled_taken}: give parts of one model"
        )


@contextmanager
def limited(most_weights: int = _MOST_WEIGHTS) -> Iterator[None]:
    """Raise ValueError in the block when a module grows beyond what its weights can be.

    A configuration of a few bytes describes any number of layers, which take minutes to build.
    """
    tensors = weights = 0

    def count(_module: Any, _name: str, parameter: Tensor) -> None:
        nonlocal tensors, weights
        tensors, weights = tensors + 1, weights + parameter.numel()
        if tensors > _MOST_TENSORS or weights > most_weights:
            raise ValueError(
                f"expected at most {_MOST_TENSORS} tensors and {most_weights} weights, got more"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file or folder of which a library raised an error of any kind but lack of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"{path} is damaged or not SDXL's ({reason}): copy or download it again"
        ) from error


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
