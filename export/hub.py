"""SDXL-Turbo from the Hugging Face hub: pinned revisions, the half-precision parts, its licence."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

MODEL_ID = "stabilityai/sdxl-turbo"
MODEL_REVISION = "71153311d3dbb46851df1931d3ca6e939de83304"
VAE_ID = "madebyollin/sdxl-vae-fp16-fix"
VAE_REVISION = "207b116dae70ace3637169f1ddd2434b91b3a8cd"
MODEL_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "tokenizer/*",
    "tokenizer_2/*",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
)
TOKENIZER_FILES = ("merges.txt", "tokenizer_config.json", "vocab.json")
"""Without tokenizer_config.json, transformers pads prompts otherwise and says nothing."""
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
LICENCE_NOTE = (
    "SDXL-Turbo is Stability AI's, under its non-commercial research licence: "
    f"read https://huggingface.co/{MODEL_ID}/blob/{MODEL_REVISION}/LICENSE.md before you use it. "
    "Its VAE here is sdxl-vae-fp16-fix (MIT)."
)


class DownloadError(OSError):
    """The hub could not be reached, or a download stopped; what arrived is kept."""


@dataclass(frozen=True)
class TurboFolders:
    """Snapshots of the model and of its VAE."""

    model: Path
    vae: Path
    revision: str = MODEL_REVISION
    vae_name: str = f"{VAE_ID}@{VAE_REVISION}"


def fetch_sdxl_turbo() -> TurboFolders:
    """Return SDXL-Turbo's folders, from the hub's cache or by a download of about 7 GB.

    A download that stopped goes on where it was. DownloadError says what to do instead.
    """
    model = _snapshot(MODEL_ID, MODEL_REVISION, MODEL_FILES)
    return TurboFolders(model, _snapshot(VAE_ID, VAE_REVISION, VAE_FILES))


def _snapshot(repository: str, revision: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=local_files_only,
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if _is_complete(cached, patterns):
            return cached
    except LocalEntryNotFoundError:
        pass
    if repository == MODEL_ID:
        print(LICENCE_NOTE, file=sys.stderr)
    try:
        folder = snapshot(local_files_only=False)
        _check_against_hub(folder, repository, revision)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"download of {repository} did not finish ({reason}): run the same command again "
            "and it goes on where it stopped, or give --model a folder that holds the model"
        ) from error
    return folder


def _is_complete(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a cached snapshot has every file; a link whose target is gone is no file."""
    names = [pattern for pattern in patterns if not pattern.endswith("/*")]
    for pattern in set(patterns) - set(names):
        names += [pattern.replace("*", name) for name in TOKENIZER_FILES]
    return all((folder / name).is_file() for name in names)


def _check_against_hub(folder: Path, repository: str, revision: str) -> None:
    """Compare every large file with the sha256 in the hub's own listing."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    for entry in HfApi().list_repo_tree(repository, revision=revision, recursive=True):
        if not isinstance(entry, RepoFile) or entry.lfs is None:
            continue
        path = folder / entry.path
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.lfs.sha256:
            path.resolve().unlink()
            raise OSError(f"{entry.path} has sha256 {found}, the hub says {entry.lfs.sha256}")
