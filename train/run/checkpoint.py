"""The state of a training as one safetensors file, written atomically.

The file's metadata holds the config that decides the result; a different config is refused by
naming the difference. A checkpoint's metadata also holds the hash of all it contains, so that no
flipped bit is trained on. Nothing is unpickled.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...export.documents import parse_json
from ...export.durable import differences, full_disk_explained, json_sha256, replace_file

Tensors = dict[str, Tensor]
METADATA, SHA256 = "patchbloom", "sha256"


class CheckpointError(ValueError):
    """A checkpoint or weights file that cannot be used: expected, found, what to do."""


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write `tensors` and plain JSON `metadata` to `path` atomically; OSError on a full disk."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One key: safetensors writes several in random order, and equal content must give equal bytes.
    data = save(kept, {METADATA: json.dumps(metadata, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path, len(data)):
        replace_file(path, data)


def write_checkpoint(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """As `write_tensors`, with the hash that `read_tensors` compares."""
    write_tensors(path, tensors, {**metadata, SHA256: _content_sha256(tensors, metadata)})


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata of a file; CheckpointError when it is damaged.

    Files without a hash, as earlier versions wrote their checkpoints, are taken as they are.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no weights file of ours, or is damaged ({error}): remove or replace it"
        ) from None
    described = parse_json(
        metadata, str(path), CheckpointError, "remove or replace the file", dict[str, Any]
    )
    expected = described.pop(SHA256, None)
    if expected is not None and expected != _content_sha256(tensors, described):
        raise CheckpointError(
            f"{path} is no weights file of ours, or is damaged (its content does not match its "
            "hash): remove or replace it"
        )
    return tensors, described


def _content_sha256(tensors: Tensors, metadata: dict[str, Any]) -> str:
    return json_sha256([metadata, weights_sha256(tensors)])


def weights_sha256(state: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The last checkpoints of one training: NAME.checkpoint-NUMBER.safetensors in a folder."""

    def __init__(self, folder: Path, name: str, kept: int) -> None:
        self.folder, self.name, self.kept = folder, name, kept

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob(f"{glob.escape(self.name)}.checkpoint-[0-9]*.safetensors"))

    def write(self, tensors: Tensors, metadata: dict[str, Any]) -> None:
        """Write the next checkpoint, then remove the oldest surplus. OSError on a full disk."""
        before = self.paths()
        number = int(before[-1].stem.rsplit("-", 1)[1]) + 1 if before else 0
        path = self.folder / f"{self.name}.checkpoint-{number:06d}.safetensors"
        write_checkpoint(path, tensors, {**metadata, "versions": _versions()})
        for old in self.paths()[: -self.kept]:
            old.unlink()

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest readable checkpoint; damaged ones are removed with a warning."""
        for path in reversed(self.paths()):
            try:
                metadata = read_tensors(path)[1]
            except CheckpointError as error:
                say(f"warning: {error}; it is removed, and the one before, if any, goes on")
                path.unlink()
                continue
            if metadata.get("versions") != _versions():
                say(
                    f"warning: {path.name} was written with {metadata.get('versions')}, this is "
                    f"{_versions()}: the result may differ in its last digits"
                )
            return path
        return None

    def remove(self) -> None:
        """Remove all checkpoints and partial files."""
        partial = self.folder.glob(f"{glob.escape(self.name)}.checkpoint-*.partial")
        for path in (*self.paths(), *partial):
            path.unlink()


def _versions() -> dict[str, str]:
    """Versions that the last digits of a training depend on."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def require_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises CheckpointError for the first key that differs between the configs."""
    for key, was, requested in differences(before, now):
        raise CheckpointError(
            f"{path} was begun with {key} = {was}, now it is {requested}: "
            "give the same options to resume, or begin anew in another folder"
        )


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Raises CheckpointError, which names `path`, when its content does not fit its use."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} does not hold what is read from it ({reason}): remove or replace it"
        ) from None


def training_state(network: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> Tensors:
    """Weights, buffers and the optimiser's moments; `prefix` begins every name."""
    tensors = {f"{prefix}net.{name}": value for name, value in network.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"{prefix}opt.{index}.{name}"] = value
    return tensors


def restore_training(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, prefix: str
) -> None:
    """Restore what `training_state` returned; ValueError for moments that do not fit AdamW's.

    Moments get the memory layout of their parameter: the fused optimiser pairs the two by address,
    and a file keeps no layout.
    """
    net, opt = f"{prefix}net.", f"{prefix}opt."
    network.load_state_dict(
        {k.removeprefix(net): v for k, v in tensors.items() if k.startswith(net)}
    )
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        if key.startswith(opt):
            index, name = key.removeprefix(opt).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {name: value.shape for name, value in moments.items()} != shapes:
            raise ValueError("the optimiser's moments do not fit the weights")
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter.detach()).copy_(moments[name])
