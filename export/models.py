"""Models: sdxl-turbo, sdxl-tiny, or any local folder in diffusers' SDXL layout.

A model is a folder with unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and
scheduler/, as `StableDiffusionXLImg2ImgPipeline.save_pretrained` writes it. Weights are safetensors
only, plain or fp16 variant. Nothing is unpickled; no remote code runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import Precision, VaePrecision, Weights
from .durable import file_sha256
from .hub import MODEL_REVISION, VAE_ID, VAE_REVISION, fetch_sdxl_turbo

TINY_FOLDER = Path(__file__).parent / "sdxl_tiny"
TURBO_CONFIGURATION = Path(__file__).parent / "sdxl_turbo"
"""SDXL-Turbo's published architecture, with the configuration of its fp16-fix VAE."""
TOKENS = 77  # per CLIP prompt
_SHIPPED = {"sdxl-turbo": TURBO_CONFIGURATION, "sdxl-tiny": TINY_FOLDER}
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
PRECISIONS: dict[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}
_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Stem of each part's weight files."""
_MOST_JSON_BYTES = 1 << 22  # SDXL's largest index of shards has 0.2 MB
_MOST = 1 << 16  # in a configuration; CLIP's vocabulary has 49,408 tokens
_MOST_LEVELS = 8  # of a VAE; SDXL's has 4


class ModelError(ValueError):
    """The requested model does not exist, is incomplete, or has another layout."""


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

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration as written in the folder."""
        return _read_config(self.folder / "scheduler" / "scheduler_config.json")

    def trained_px(self) -> int:
        """Side of its training images: 512 for sdxl-turbo, 64 for sdxl-tiny."""
        return self._unet_number("sample_size") * self.vae_factor()

    def vae_factor(self) -> int:
        """Image side / latent side."""
        path = self.part("vae") / "config.json"
        channels = _read_config(path).get("block_out_channels")
        if not isinstance(channels, list) or not 1 <= len(channels) <= _MOST_LEVELS:
            raise ModelError(
                f"{path}: expected 1 to {_MOST_LEVELS} numbers as block_out_channels, got "
                f"{_short(channels)}: give SDXL's configuration of this VAE"
            )
        return 2 ** (len(channels) - 1)

    def text_widths(self) -> tuple[int, int]:
        """Widths of a token's embedding and of the pooled embedding, as the UNet takes them."""
        pooled_and_times = self._unet_number("projection_class_embeddings_input_dim")
        times = 6 * self._unet_number("addition_time_embed_dim")
        return self._unet_number("cross_attention_dim"), pooled_and_times - times

    def _unet_number(self, name: str) -> int:
        path = self.part("unet") / "config.json"
        value = _read_config(path).get(name)
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{path}: expected a whole number as {name}, got {_short(value)}: give SDXL's "
                "configuration of this UNet"
            )
        return value


@dataclass
class ModelParts:
    """The networks that make images; the text encoders are loaded separately and freed early."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL


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
    source.trained_px()
    source.text_widths()
    _check_scheduler(source)
    if source.weights == "pretrained":
        for part in _WEIGHTS:
            _weight_files(source, part)


def _check_scheduler(source: ModelSource) -> None:
    """Raise ModelError for a model that was trained for another scheduler or prediction."""
    path, config = source.folder / "scheduler" / "scheduler_config.json", source.scheduler_config()
    name = config.get("_class_name", "EulerAncestralDiscreteScheduler")
    prediction = config.get("prediction_type", "epsilon")
    if name != "EulerAncestralDiscreteScheduler" or prediction != "epsilon":
        raise ModelError(
            f"{path}: expected a model for EulerAncestralDiscreteScheduler with epsilon "
            f"prediction, as SDXL-Turbo is, got one for {_short(name)} with {_short(prediction)}: "
            "give another model"
        )
    with _naming(path):
        EulerAncestralDiscreteScheduler.from_config(config)


def _needed_parts(source: ModelSource) -> tuple[str, ...]:
    return tuple(_WEIGHTS) if source.weights == "pretrained" else ("unet", "vae")


def _weight_files(source: ModelSource, part: str) -> list[Path]:
    """The files that hold one part's weights: one, or an index and its shards.

    They are the ones that are hashed and the ones that are loaded. A file may be a link, as in the
    hub's cache: its content is hashed. Raises ModelError when there are none or too many.
    """
    stem, folder = _WEIGHTS[part], source.part(part)
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
    listed = _read_json(index).get("weight_map")
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


def resolve_vae_precision(
    source: ModelSource, precision: Precision, vae_precision: VaePrecision = "auto"
) -> Precision:
    """Precision of the VAE. `auto` is `precision`, or fp32 if the VAE overflows in fp16.

    SDXL's own VAE does, and its configuration says so with `force_upcast`; the fp16-fix does not.
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
    """Load UNet and VAE in eval mode, without gradients; the VAE's dtype may differ."""
    unet_dtype = DTYPES[precision]
    vae_dtype = DTYPES[resolve_vae_precision(source, precision, vae_precision)]
    if source.weights == "random":
        unet = _random(UNet2DConditionModel, source, "unet", unet_dtype, device)
        return ModelParts(unet, _random(AutoencoderKL, source, "vae", vae_dtype, device))
    unet = _load(UNet2DConditionModel, source, "unet", unet_dtype, device)
    return ModelParts(unet, _load(AutoencoderKL, source, "vae", vae_dtype, device))


def _random(kind: Any, source: ModelSource, part: str, dtype: torch.dtype, device: str) -> Any:
    """The part's architecture with torch's own initialisation, seeded; none on "meta".

    Created directly on its device and in its dtype: both networks of SDXL-Turbo in fp16 take 45 s
    and 6 GB on one CPU core, half of the time for first touching the memory.
    """
    path = source.part(part) / "config.json"
    config = _read_config(path)
    with torch.random.fork_rng(), torch.device(device), _naming(path), default_dtype(dtype):
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
    """UNet or VAE with the tensors of `_weight_files`, in eval mode, without gradients.

    diffusers' from_pretrained would look for other files as well, and leave missing tensors random.
    """
    module = _random(kind, source, part, dtype, "meta")
    found = _read_tensors(source, part)
    module._fix_state_dict_keys_on_load(found)  # old VAEs name their attention otherwise
    expected = module.state_dict()
    both = expected.keys() & found.keys()
    _check_tensors(
        source.part(part),
        missing=expected.keys() - both,
        unexpected=found.keys() - both,
        mismatched=(name for name in both if expected[name].shape != found[name].shape),
    )
    loaded = {name: found[name].to(device, dtype, copy=True) for name in expected}
    module.load_state_dict(loaded, assign=True)
    return module


def _read_tensors(source: ModelSource, part: str) -> dict[str, Tensor]:
    """All tensors of a part, by name. Raises ModelError for a damaged file or a tensor in two."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(source, part):
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


def _check_tensors(folder: Path, **faults: Iterable[str]) -> None:
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


def model_reference(source: ModelSource) -> str:
    """The `--model` value that finds the model again, from any working directory."""
    shipped = source.folder in _SHIPPED.values()
    return source.name if shipped or source.revision else str(source.folder)


def load_tokenizer(source: ModelSource, part: str) -> Any:
    """The tokenizer of "text_encoder" or "text_encoder_2"; asks no hub."""
    from transformers import CLIPTokenizer

    folder = source.folder / part.replace("text_encoder", "tokenizer")
    with _naming(folder):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=TOKENS)


def load_text_encoder(source: ModelSource, part: str, *, device: str) -> tuple[Any, Any]:
    """Tokenizer and text encoder of "text_encoder" or "text_encoder_2", in fp32.

    Always fp32: a prompt is encoded once, and its rounding would affect every image.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    tokenizer, path = load_tokenizer(source, part), source.part(part) / "config.json"
    config, tensors = _read_config(path), _read_tensors(source, part)
    with _naming(path), _quiet_transformers():
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
    _check_tensors(
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
        for part in _needed_parts(source):
            digest.update((source.part(part) / "config.json").read_bytes())
        return digest.hexdigest()
    for part in sorted(_WEIGHTS):
        for path in [source.part(part) / "config.json", *_weight_files(source, part)]:
            status = path.stat()
            sha256 = _hash_once(path.resolve(), status.st_size, status.st_mtime_ns)
            digest.update(f"{part}/{path.name} {sha256}\n".encode())
    return digest.hexdigest()


def weights_bytes(source: ModelSource) -> int:
    """Bytes on disk of all weights, which expanding a coreset also needs; 0 for random weights."""
    if source.weights == "random":
        return 0
    files = [path for part in _WEIGHTS for path in _weight_files(source, part)]
    return sum(path.stat().st_size for path in files)


@lru_cache(maxsize=256)
def _hash_once(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time in the cache key detect a changed file."""
    return file_sha256(path)


def seen_classes(folder: Path) -> tuple[str, ...] | None:
    """Class names that the model was trained on, from its model card; None without a card."""
    card = folder / "model_card.json"
    if not card.is_file():
        return None
    names = _read_json(card).get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{card}: expected a list of names as class_names, got {_short(names)}: mend or remove "
            "the card"
        )
    return tuple(names)


def _read_config(path: Path) -> dict[str, Any]:
    """A part's configuration. Raises ModelError for quantised weights and huge numbers too."""
    config = _read_json(path, _bounded)
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: expected plain weights, got a quantization_config: give the folder of the "
            "model before its quantisation"
        )
    return config


def _bounded(digits: str) -> int:
    if abs(number := int(digits)) > _MOST:
        raise ValueError(f"a number of at most {_MOST} was expected, not {digits[:20]}")
    return number


def _read_json(path: Path, read_int: Callable[[str], int] = int) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError, which names the file, for anything else."""
    size_bytes, way_out = path.stat().st_size, "copy or download it again"
    if size_bytes > _MOST_JSON_BYTES:
        raise ModelError(
            f"{path}: expected at most {_MOST_JSON_BYTES} bytes, got {size_bytes}: {way_out}"
        )
    try:
        value = json.loads(path.read_bytes(), parse_int=read_int)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON, got what is none ({error}): {way_out}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {_short(value)}: {way_out}")
    return value


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
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
