"""Models: sdxl-turbo, sdxl-tiny, or any local folder in diffusers' SDXL layout.

A model is a folder with unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and
scheduler/, as `StableDiffusionXLImg2ImgPipeline.save_pretrained` writes it. Weights are safetensors
only, plain or fp16 variant. Nothing is unpickled; no remote code runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from .config import EIGHT_BITS, Precision, VaePrecision, Weights
from .configurations import (
    ModelError,
    check_scheduler,
    check_text_widths,
    limited,
    naming,
    read_config,
    read_object,
    text_widths,
    vae_factor,
    whole_number,
)
from .hashes import known_sha256
from .hub import MODEL_REVISION, VAE_ID, VAE_REVISION, fetch_sdxl_turbo
from .weights import STEMS, check_tensors, read_tensors, weight_files

TINY_FOLDER = Path(__file__).parent / "sdxl_tiny"
TURBO_CONFIGURATION = Path(__file__).parent / "sdxl_turbo"
"""SDXL-Turbo's published architecture, with the configuration of its fp16-fix VAE."""
TOKENS = 77  # per CLIP prompt
TINY_DECODER = "tiny_decoder"
"""Part that a model may have besides: an AutoencoderTiny, whose decoder takes the VAE's place."""
_SHIPPED = {"sdxl-turbo": TURBO_CONFIGURATION, "sdxl-tiny": TINY_FOLDER}
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
PRECISIONS: dict[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}


class Unavailable(OSError):  # noqa: N818 - reads as the message does
    """This machine lacks something that is needed; the message says what, and how to get it."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts are stored."""

    name: str
    """Name given by the user, or the folder's name."""
    folder: Path
    vae_folder: Path
    """Holds config.json and the VAE's weights; `folder`/vae unless another VAE is used."""
    revision: str | None = None
    """Hub commit, if the model came from the hub."""
    vae_name: str | None = None
    """Hub id and revision of the VAE, if it is not the model's own."""
    weights: Weights = "pretrained"
    """`random`: the architecture only, to test export, memory and speed; images mean nothing."""

    def part(self, name: str) -> Path:
        """Folder of unet, vae, text_encoder, …"""
        return self.vae_folder if name == "vae" else self.folder / name

    @property
    def has_tiny_decoder(self) -> bool:
        """Whether a tiny decoder makes its images."""
        return (self.part(TINY_DECODER) / "config.json").is_file()

    def weighted_parts(self) -> list[str]:
        """Names of the parts with weights."""
        return [*STEMS, *([TINY_DECODER] if self.has_tiny_decoder else [])]

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration as written in the folder."""
        return read_config(self.folder / "scheduler" / "scheduler_config.json")

    def trained_px(self) -> int:
        """Side of its training images: 512 for sdxl-turbo, 64 for sdxl-tiny."""
        return whole_number(self.part("unet") / "config.json", "sample_size") * self.vae_factor()

    def vae_factor(self) -> int:
        """Image side / latent side."""
        return vae_factor(self.part("vae") / "config.json")

    def text_widths(self) -> tuple[int, int]:
        """Widths of a token's embedding and of the pooled embedding, as the UNet takes them."""
        return text_widths(self.part("unet") / "config.json")


@dataclass
class ModelParts:
    """The networks that make images; the text encoders are loaded separately and freed early."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tiny_decoder: AutoencoderTiny | None = None
    """Decodes in the VAE's place."""


def find_model(name_or_folder: str | Path, weights: Weights = "pretrained") -> ModelSource:
    """Resolve a model's name or folder; download `sdxl-turbo` if it is not cached.

    With random weights nothing is downloaded, and only the configurations are required. Raises
    ModelError when the name or folder does not exist or a part is missing; a download raises as
    `hub.fetch_sdxl_turbo` does.
    """
    name = str(name_or_folder)
    if name == "sdxl-turbo" and weights == "pretrained":
        model, vae = fetch_sdxl_turbo()
        source = ModelSource(name, model, vae, MODEL_REVISION, f"{VAE_ID}@{VAE_REVISION}")
    else:
        folder = _SHIPPED.get(name) or Path(name).expanduser().resolve()
        if not folder.is_dir():
            raise ModelError(
                f"unknown model {name!r}: it is neither a folder nor one of {', '.join(_SHIPPED)}"
            )
        shown = name if name in _SHIPPED else folder.name
        source = ModelSource(shown, folder, folder / "vae", weights=weights)
    _check_parts(source)
    return source


def _check_parts(source: ModelSource) -> None:
    expected = [source.folder / "scheduler" / "scheduler_config.json"]
    expected += [source.part(part) / "config.json" for part in _needed_parts(source)]
    if source.weights == "pretrained":
        for part in ("tokenizer", "tokenizer_2"):
            slow = (source.folder / part / "vocab.json").is_file()
            vocabulary = ("vocab.json", "merges.txt") if slow else ("tokenizer.json",)
            names = ("tokenizer_config.json", *vocabulary)
            expected += [source.folder / part / name for name in names]
    for path in expected:
        if not path.is_file():
            raise ModelError(
                f"{source.folder} is not a model in diffusers' SDXL layout: {path} is missing; "
                "expected what StableDiffusionXLImg2ImgPipeline.save_pretrained writes"
            )
        if path.suffix == ".json":  # the libraries that read it later do not name it
            read_object(path)
    source.trained_px()
    source.text_widths()
    check_scheduler(source.folder / "scheduler" / "scheduler_config.json")
    if source.weights == "pretrained":
        check_text_widths(source.folder)
        for part in source.weighted_parts():
            weight_files(source.part(part), part)
    if source.has_tiny_decoder:
        _check_tiny_decoder(source)


def _check_tiny_decoder(source: ModelSource) -> None:
    """Raise ModelError unless it decodes the VAE's latents."""
    path = source.part(TINY_DECODER) / "config.json"
    found, vae = read_object(path), read_object(source.part("vae") / "config.json")
    blocks = found.get("decoder_block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None
    got = (found.get("latent_channels"), factor, found.get("scaling_factor", 1.0))
    expected = (vae.get("latent_channels"), source.vae_factor(), 1.0)
    if got != expected:
        raise ModelError(
            f"{path}: expected latent channels, factor and scaling of {expected}, which the VAE's "
            f"latents have, got {got}: remove the folder, or make it with `train decoder`"
        )


def _needed_parts(source: ModelSource) -> tuple[str, ...]:
    return tuple(STEMS) if source.weights == "pretrained" else ("unet", "vae")


def resolve_vae_precision(
    source: ModelSource, precision: Precision, vae_precision: VaePrecision = "auto"
) -> Precision:
    """Precision of the VAE. `auto` is `precision`, or fp32 if the VAE overflows in fp16, in which
    eight bits compute the other layers on a GPU.

    SDXL's own VAE does, and its configuration says so with `force_upcast`; the fp16-fix does not.
    """
    if vae_precision != "auto":
        return vae_precision
    upcast = read_config(source.part("vae") / "config.json").get("force_upcast", True)
    return "fp32" if upcast and precision in ("fp16", *EIGHT_BITS) else precision


def rest_precision(precision: Precision, device: str) -> Precision:
    """Precision of the layers that are not in eight bits; any other precision is its own."""
    if precision not in EIGHT_BITS:
        return precision
    return "fp16" if device == "cuda" else "fp32"


def load_parts(
    source: ModelSource,
    *,
    precision: Precision,
    vae_precision: VaePrecision = "auto",
    device: str,
    runs_on: str | None = None,
) -> ModelParts:
    """Load UNet and VAE in eval mode, without gradients; the VAE's dtype may differ.

    For eight bits, in the rest's precision. `runs_on`: the device of an engine built elsewhere.
    """
    vae_precision = resolve_vae_precision(source, precision, vae_precision)
    unet_dtype, vae_dtype = (
        DTYPES[rest_precision(each, runs_on or device)] for each in (precision, vae_precision)
    )
    unet = _load(UNet2DConditionModel, source, "unet", unet_dtype, device)
    vae, tiny = load_vae(source, vae_dtype, device), None
    if source.has_tiny_decoder:
        tiny = _load(AutoencoderTiny, source, TINY_DECODER, vae_dtype, device)
    return ModelParts(unet, vae, tiny)


def load_vae(source: ModelSource, dtype: torch.dtype, device: str) -> AutoencoderKL:
    """The VAE alone, in eval mode, without gradients."""
    return _load(AutoencoderKL, source, "vae", dtype, device)


def _random(kind: Any, source: ModelSource, part: str, dtype: torch.dtype, device: str) -> Any:
    """The part's architecture with torch's own initialisation, seeded; none on "meta".

    Created directly on its device and in its dtype: both networks of SDXL-Turbo in fp16 take 45 s
    and 6 GB on one CPU core, half of the time for first touching the memory.
    """
    path = source.part(part) / "config.json"
    config = read_config(path)
    with (
        torch.random.fork_rng(),
        torch.device(device),
        naming(path),
        limited(),
        default_dtype(dtype),
    ):
        torch.manual_seed(0)
        module = kind.from_config(config)
    return module.eval().requires_grad_(False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype, which a user's program may have set, is `dtype` in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _load(kind: Any, source: ModelSource, part: str, dtype: torch.dtype, device: str) -> Any:
    """A part with random weights or the tensors of `weight_files`, in eval mode, without gradients.

    diffusers' from_pretrained would look for other files as well, and leave missing tensors random.
    """
    if source.weights == "random":
        return _random(kind, source, part, dtype, device)
    module = _random(kind, source, part, dtype, "meta")
    found = read_tensors(source.part(part), part)
    module._fix_state_dict_keys_on_load(found)  # old VAEs name their attention otherwise
    expected = module.state_dict()
    both = expected.keys() & found.keys()
    check_tensors(
        source.part(part),
        missing=expected.keys() - both,
        unexpected=found.keys() - both,
        mismatched=(name for name in both if expected[name].shape != found[name].shape),
    )
    loaded = {name: found[name].to(device, dtype, copy=True) for name in expected}
    module.load_state_dict(loaded, assign=True)
    return module


def model_reference(source: ModelSource) -> str:
    """The `--model` value that finds the model again, from any working directory."""
    shipped = source.folder in _SHIPPED.values()
    return source.name if shipped or source.revision else str(source.folder)


def load_tokenizer(source: ModelSource, part: str) -> Any:
    """The tokenizer of "text_encoder" or "text_encoder_2"; asks no hub."""
    from transformers import CLIPTokenizer

    folder = source.folder / part.replace("text_encoder", "tokenizer")
    with naming(folder):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=TOKENS)


def load_text_encoder(source: ModelSource, part: str, *, device: str) -> tuple[Any, Any]:
    """Tokenizer and text encoder of "text_encoder" or "text_encoder_2", in fp32.

    Always fp32: a prompt is encoded once, and its rounding would affect every image.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    tokenizer, path = load_tokenizer(source, part), source.part(part) / "config.json"
    config, tensors = read_config(path), read_tensors(source.part(part), part)
    stored = sum(tensor.numel() for tensor in tensors.values())
    with naming(path), limited(4 * stored), _quiet_transformers():  # each is registered twice
        encoder, found = cast(Any, kind).from_pretrained(
            None,
            config=CLIPTextConfig.from_dict(config),
            state_dict=tensors,
            dtype=torch.float32,
            attn_implementation="sdpa",  # the configuration might name code of a hub
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    check_tensors(
        source.part(part),
        missing=found["missing_keys"],
        unexpected=found["unexpected_keys"],
        mismatched=(name for name, *_ in found["mismatched_keys"]),
    )
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for every file, and no table of tensors that do not fit."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def weights_sha256(source: ModelSource) -> str:
    """One hash over the weights and configurations of all parts: the model's identity.

    For random weights it covers only the configurations.
    """
    digest = hashlib.sha256()
    if source.weights == "random":
        for part in [*_needed_parts(source), *[TINY_DECODER] * source.has_tiny_decoder]:
            digest.update((source.part(part) / "config.json").read_bytes())
        return digest.hexdigest()
    for part in sorted(source.weighted_parts()):
        for path in [source.part(part) / "config.json", *weight_files(source.part(part), part)]:
            digest.update(f"{part}/{path.name} {known_sha256(path)}\n".encode())
    return digest.hexdigest()


def weights_bytes(source: ModelSource) -> int:
    """Bytes on disk of all weights, which expanding a coreset also needs; 0 for random weights."""
    if source.weights == "random":
        return 0
    files = [
        path for part in source.weighted_parts() for path in weight_files(source.part(part), part)
    ]
    return sum(path.stat().st_size for path in files)
