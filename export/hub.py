"""SDXL-Turbo from the Hugging Face hub: pinned revisions, the half-precision parts, its licence.

Downloads only safetensors, JSON and the tokenizers' text, and checks each file's size and hash
against the hub's listing. Nothing is unpickled; no remote code runs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .terminal import say

HUB = "hf:"
"""Begins the name of a data set, coreset or publication on the hub."""
MODEL_ID = "stabilityai/sdxl-turbo"
MODEL_REVISION = "71153311d3dbb46851df1931d3ca6e939de83304"
VAE_ID = "madebyollin/sdxl-vae-fp16-fix"
VAE_REVISION = "207b116dae70ace3637169f1ddd2434b91b3a8cd"
TOKENIZER_FILES = ("merges.txt", "tokenizer_config.json", "vocab.json")
"""Without tokenizer_config.json, transformers silently pads prompts differently."""
MODEL_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"tokenizer_2/{name}" for name in TOKENIZER_FILES),
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
)
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
OPTIONAL_FILES = ("tokenizer/special_tokens_map.json", "tokenizer_2/special_tokens_map.json")
LICENCE_NOTE = (
    "SDXL-Turbo is Stability AI's, under its non-commercial research licence: "
    f"read https://huggingface.co/{MODEL_ID}/blob/{MODEL_REVISION}/LICENSE.md before you use it. "
    "Its VAE here is sdxl-vae-fp16-fix (MIT)."
)


class DownloadError(OSError):
    """The hub could not be reached, or a download stopped; files already received are kept."""


def fetch_sdxl_turbo() -> tuple[Path, Path]:
    """The folders of SDXL-Turbo and its VAE in the hub's cache, after a download of 7 GB if needed.

    A stopped download resumes. Raises DownloadError, whose message says what to do instead.
    """
    model = _snapshot(MODEL_ID, MODEL_REVISION, MODEL_FILES)
    return model, _snapshot(VAE_ID, VAE_REVISION, VAE_FILES)


def is_sdxl_turbo_cached() -> bool:
    """Whether the hub's cache holds both snapshots completely; downloads nothing."""
    return None not in (
        _cached(MODEL_ID, MODEL_REVISION, MODEL_FILES),
        _cached(VAE_ID, VAE_REVISION, VAE_FILES),
    )


def _cached(repository: str, revision: str, names: tuple[str, ...]) -> Path | None:
    """The snapshot in the hub's cache, if it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Without the names, files that we never download count as missing.
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(names), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder) if _is_complete(Path(folder), names) else None


def _snapshot(repository: str, revision: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    if cached := _cached(repository, revision, names):
        return cached
    try:
        files = _listing(repository, revision, names)
        size_gb = sum(entry.size for entry in files) / 1e9
        if repository == MODEL_ID:
            say(LICENCE_NOTE)
        say(f"downloading {size_gb:.2f} GB of {repository}, revision {revision[:8]}")
        paths = [entry.path for entry in files]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=paths))
        say(f"comparing {len(files)} files with the hub's sizes and hashes")
        for entry in files:
            _check(folder / entry.path, entry)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"download of {repository} did not finish ({reason}): {_remedy()}"
        ) from error
    return folder


def _remedy() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = " and ".join(f"models--{name.replace('/', '--')}" for name in (MODEL_ID, VAE_ID))
    return (
        "run the same command again to resume where it stopped; without a network, put "
        f"{places} of another machine's cache into {HF_HUB_CACHE} (HF_HOME moves it), or give "
        "--model a folder with unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, "
        "tokenizer_2/ and scheduler/, weights as safetensors (or .fp16.safetensors), in vae/ "
        f"those of {VAE_ID}"
    )


def _listing(repository: str, revision: str, names: tuple[str, ...]) -> list[Any]:
    """The hub's entry for each file: path, size, git's hash, and sha256 for large files.

    Raises OSError when the hub lacks a required file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repository, revision=revision, recursive=True)
    wanted = {*names, *OPTIONAL_FILES}
    files = [entry for entry in tree if isinstance(entry, RepoFile) and entry.path in wanted]
    lacking = sorted(set(names) - {entry.path for entry in files})
    if lacking:
        raise OSError(f"the hub has no {', '.join(lacking)} at revision {revision}")
    return files


def _is_complete(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a cached snapshot has every file; a dangling link is not a file."""
    return all((folder / name).is_file() for name in names)


def _check(path: Path, entry: Any) -> None:
    """Remove the file and raise OSError unless it has the hub's size and hash.

    The hub lists large files by sha256 and small ones by git's blob sha1.
    """
    size_bytes = path.stat().st_size
    if entry.lfs is None:
        digest, expected = hashlib.sha1(b"blob %d\0" % size_bytes), entry.blob_id
    else:
        digest, expected = hashlib.sha256(), entry.lfs.sha256
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if (size_bytes, digest.hexdigest()) != (entry.size, expected):
        path.resolve().unlink()
        raise OSError(
            f"{entry.path} arrived with {size_bytes} bytes and {digest.name} {digest.hexdigest()}, "
            f"the hub says {entry.size} and {expected}"
        )
