"""What a model is: sdxl-turbo, sdxl-tiny, or any local folder in diffusers' SDXL layout.

A model is a folder with unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and
scheduler/ as `StableDiffusionXLImg2ImgPipeline.save_pretrained` writes it; weights in safetensors
only, plain or of the fp16 variant. Nothing is unpickled and no remote code is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from .config import Precision, VaePrecision, Weights
from .durable import file_sha256
from .hub import fetch_sdxl_turbo

TINY_FOLDER = Path(__file__).parent / "sdxl_tiny"
TURBO_CONFIGURATION = Path(__file__).parent / "sdxl_turbo"
"""SDXL-Turbo's architecture as it is published, with the configuration of its fp16-fix VAE."""
TOKENS = 77  # of a CLIP prompt
NAMES = ("sdxl-turbo", "sdxl-tiny")
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
PRECISIONS: dict[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}
_DIFFUSERS_WEIGHTS, _TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "model"


class ModelError(ValueError):
    """The model asked for does not exist, is incomplete, or is of another kind."""


class Unavailable(OSError):  # noqa: N818 - reads as the message does
    """This machine lacks what was asked for; the message says what, and how to get it."""


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model lie."""

    name: str
    """As the user gave it, or as the folder is called."""
    folder: Path
    vae_folder: Path
    """Holds config.json and the VAE's weights; `folder`/vae unless another VAE is used."""
    revision: str | None = None
    """Commit on the hub, when it came from there."""
    vae_name: str | None = None
    """Hub id and revision of the VAE, when it is not the model's own."""
    weights: Weights = "pretrained"
    """`random`: the architecture alone, for export, memory and speed. Its pictures show nothing."""

    def part(self, name: str) -> Path:
        """Folder of unet, vae, text_encoder, …"""
        return self.vae_folder if name == "vae" else self.folder / name

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration as written in the folder."""
        return _read_json(self.folder / "scheduler" / "scheduler_config.json")

    def trained_px(self) -> int:
        """Side of the images that it was trained at: 512 for sdxl-turbo, 64 for sdxl-tiny."""
        return _read_json(self.part("unet") / "config.json")["sample_size"] * self.vae_factor()

    def vae_factor(self) -> int:
        """Image side / latent side."""
        vae = _read_json(self.part("vae") / "config.json")
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def text_widths(self) -> tuple[int, int]:
        """Widths of a token's embedding and of the pooled one, as the UNet takes them."""
        unet = _read_json(self.part("unet") / "config.json")
        times = 6 * unet["addition_time_embed_dim"]
        return unet["cross_attention_dim"], unet["projection_class_embeddings_input_dim"] - times


@dataclass
class ModelParts:
    """The networks that make images; the text encoders are loaded apart and freed early."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL


def find_model(name_or_folder: str | Path, weights: Weights = "pretrained") -> ModelSource:
    """Resolve a model's name or folder; `sdxl-turbo` is downloaded when it is not in the cache.

    With random weights nothing is downloaded, and only the configurations have to be there.
    ModelError: no such name or folder, or a folder that lacks a part. The download's own errors are
    those of `hub.fetch_sdxl_turbo`.
    """
    name = str(name_or_folder)
    if name == "sdxl-turbo" and weights == "random":
        source = ModelSource(name, TURBO_CONFIGURATION, TURBO_CONFIGURATION / "vae")
    elif name == "sdxl-turbo":
        folders = fetch_sdxl_turbo()
        source = ModelSource(
            name, folders.model, folders.vae, folders.revision, vae_name=folders.vae_name
        )
    elif name == "sdxl-tiny":
        source = ModelSource(name, TINY_FOLDER, TINY_FOLDER / "vae")
    else:
        folder = Path(name_or_folder).expanduser()
        if not folder.is_dir():
            raise ModelError(
                f"unknown model {name!r}: it is neither a folder nor one of {', '.join(NAMES)}"
            )
        source = ModelSource(folder.resolve().name, folder.resolve(), folder.resolve() / "vae")
    source = replace(source, weights=weights)
    _check_parts(source)
    return source


def _check_parts(source: ModelSource) -> None:
    expected = [source.folder / "scheduler" / "scheduler_config.json"]
    expected += [source.part(part) / "config.json" for part in _needed_parts(source)]
    for path in expected:
        if not path.is_file():
            raise ModelError(
                f"{source.folder} is no model in diffusers' SDXL layout: {path} is missing; "
                "expected what StableDiffusionXLImg2ImgPipeline.save_pretrained writes"
            )
    if source.weights == "pretrained":
        for part in _weights_by_part():
            _weight_files(source, part)


def _needed_parts(source: ModelSource) -> tuple[str, ...]:
    return tuple(_weights_by_part()) if source.weights == "pretrained" else ("unet", "vae")


def _weights_by_part() -> dict[str, str]:
    parts = {"unet": _DIFFUSERS_WEIGHTS, "vae": _DIFFUSERS_WEIGHTS}
    return parts | {"text_encoder": _TRANSFORMERS_WEIGHTS, "text_encoder_2": _TRANSFORMERS_WEIGHTS}


def _weight_files(source: ModelSource, part: str) -> tuple[str | None, list[Path]]:
    """The variant to load, None or "fp16", and the files of one part."""
    stem, folder = _weights_by_part()[part], source.part(part)
    plain = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-0*.safetensors")])
    half = sorted(folder.glob(f"{stem}.fp16*.safetensors"))
    if not plain and not half:
        raise ModelError(
            f"{folder} holds no weights: expected {stem}.safetensors "
            "(pickled .bin weights are refused; convert them to safetensors)"
        )
    return (None, plain) if plain else ("fp16", half)


def resolve_vae_precision(
    source: ModelSource, precision: Precision, vae_precision: VaePrecision = "auto"
) -> Precision:
    """What the VAE computes in. `auto` is `precision`, but fp32 for fp16 and a VAE that overflows.

    SDXL's own VAE does, and its configuration says so by `force_upcast`; its fp16-fix does not.
    """
    if vae_precision != "auto":
        return vae_precision
    upcast = _read_json(source.part("vae") / "config.json").get("force_upcast", True)
    return "fp32" if upcast and precision == "fp16" else precision


def load_parts(
    source: ModelSource,
    *,
    precision: Precision,
    vae_precision: VaePrecision = "auto",
    device: str,
) -> ModelParts:
    """Load UNet and VAE, in eval mode and without gradients; the VAE's type may be another."""
    unet_dtype = DTYPES[precision]
    vae_dtype = DTYPES[resolve_vae_precision(source, precision, vae_precision)]
    if source.weights == "random":
        unet = _random(UNet2DConditionModel, source, "unet", unet_dtype, device)
        return ModelParts(unet, _random(AutoencoderKL, source, "vae", vae_dtype, device))
    # Said, because diffusers wants it, and complains where accelerate is not installed.
    light = {"low_cpu_mem_usage": find_spec("accelerate") is not None}
    unet = _load(UNet2DConditionModel, source, "unet", device, torch_dtype=unet_dtype, **light)
    vae = _load(AutoencoderKL, source, "vae", device, torch_dtype=vae_dtype, **light)
    return ModelParts(unet, vae)


def _random(kind: type, source: ModelSource, part: str, dtype: torch.dtype, device: str) -> Any:
    """The part's architecture with torch's own initialisation, seeded; none on "meta".

    Made where and as it is used: both networks of SDXL-Turbo in fp16 take 45 s and 6 GB on one
    core of a CPU, the half of it for the memory's first touch.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            module = kind(**_arguments(source, part))
        finally:
            torch.set_default_dtype(before)
    return module.eval().requires_grad_(False)


def _arguments(source: ModelSource, part: str) -> dict[str, Any]:
    config = _read_json(source.part(part) / "config.json")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _load(kind: type, source: ModelSource, part: str, device: str, **options: Any) -> Any:
    """`kind.from_pretrained`, safetensors only, in eval mode, without gradients."""
    variant, _ = _weight_files(source, part)
    loader: Any = kind
    module = loader.from_pretrained(
        source.part(part), variant=variant, use_safetensors=True, **options
    )
    return module.to(device).eval().requires_grad_(False)


def model_reference(source: ModelSource) -> str:
    """What `--model` has to be given to find the model again, from any folder."""
    embedded = source.folder in (TINY_FOLDER, TURBO_CONFIGURATION)
    return source.name if embedded or source.revision else str(source.folder)


def load_text_encoder(source: ModelSource, part: str, *, device: str) -> tuple[Any, Any]:
    """Tokenizer and text encoder of "text_encoder" or "text_encoder_2", in fp32.

    fp32 in any case: a prompt is encoded once, and rounding there would touch every image.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    tokenizer_folder = source.folder / part.replace("text_encoder", "tokenizer")
    with _quiet_transformers():
        encoder = _load(kind, source, part, device, dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(tokenizer_folder), encoder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the bar that transformers shows for every weight file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weights_sha256(source: ModelSource) -> str:
    """One hash over the weights and configurations of all parts: the model's identity.

    Of random weights it covers the configurations.
    """
    digest = hashlib.sha256()
    if source.weights == "random":
        for part in _needed_parts(source):
            digest.update((source.part(part) / "config.json").read_bytes())
        return digest.hexdigest()
    for part in sorted(_weights_by_part()):
        for path in [source.part(part) / "config.json", *_weight_files(source, part)[1]]:
            digest.update(f"{part}/{path.name} {_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def weights_bytes(source: ModelSource) -> int:
    """Bytes on disk of all weights: what a coreset's images need beside the coreset.

    0 for random weights.
    """
    if source.weights == "random":
        return 0
    parts = _weights_by_part()
    return sum(path.stat().st_size for part in parts for path in _weight_files(source, part)[1])


def _file_sha256(path: Path) -> str:
    status = os.stat(path)
    return _hash_once(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_once(path: str, size_bytes: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time make a changed file another key."""
    return file_sha256(Path(path))


def seen_classes(folder: Path) -> tuple[str, ...] | None:
    """Class names that the model was trained on, from its model card; None when it has no card."""
    card = folder / "model_card.json"
    return tuple(_read_json(card)["class_names"]) if card.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
