"""Where a training stands, as one safetensors file that is there whole or not at all.

The file's metadata holds the config that decides the result; another one is refused, and the
message names what differs. Nothing is ever unpickled.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...export.durable import differences, full_disk_explained, replace_file

Tensors = dict[str, Tensor]
METADATA = "patchbloom"


class CheckpointError(ValueError):
    """A checkpoint or weights file that cannot be used: expected, found, what to do."""


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write `tensors` and plain JSON `metadata` to `path` atomically; OSError on a full disk."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One key: safetensors writes several in random order, and equal content shall be equal bytes.
    data = save(kept, {METADATA: json.dumps(metadata, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path, len(data)):
        replace_file(path, data)


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `write_tensors` wrote; CheckpointError for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None


def read_metadata(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """The metadata of what `write_tensors` wrote; `whole` also reads every tensor once."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys() if whole else ():
                file.get_tensor(name)
            return json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no weights file of ours, or is damaged ({error}): remove or replace it"
    )


class Checkpoints:
    """The last checkpoints of one training: NAME.checkpoint-NUMBER.safetensors in a folder."""

    def __init__(self, folder: Path, name: str, kept: int) -> None:
        self.folder, self.name, self.kept = folder, name, kept

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob(f"{glob.escape(self.name)}.checkpoint-[0-9]*.safetensors"))

    def write(self, tensors: Tensors, metadata: dict[str, Any]) -> None:
        """One more; then those are removed that are too many. OSError on a full disk."""
        number = self._number(self.paths()[-1]) + 1 if self.paths() else 0
        path = self.folder / f"{self.name}.checkpoint-{number:06d}.safetensors"
        write_tensors(path, tensors, {**metadata, "versions": _versions()})
        for old in self.paths()[: -self.kept]:
            old.unlink()

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The last that can be read; damaged ones are removed, and that is said."""
        for path in reversed(self.paths()):
            try:
                metadata = read_metadata(path, whole=True)
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
        """All of them, when the training is done, and what a killed process left of one."""
        partial = self.folder.glob(f"{glob.escape(self.name)}.checkpoint-*.partial")
        for path in (*self.paths(), *partial):
            path.unlink()

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.stem.rsplit("-", 1)[1])


def _versions() -> dict[str, str]:
    """What the last digits of a training depend on."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def require_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """CheckpointError, naming the first key that differs, unless both configs are the same."""
    for key, was, asked in differences(before, now):
        raise CheckpointError(
            f"{path} was begun with {key} = {was}, now it is {asked}: "
            "give the same options to resume, or begin anew in another folder"
        )


def training_state(network: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> Tensors:
    """Weights, buffers and the optimiser's moments, as tensors whose names begin with `prefix`."""
    tensors = {f"{prefix}net.{name}": value for name, value in network.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"{prefix}opt.{index}.{name}"] = value
    return tensors


def restore_training(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, prefix: str
) -> None:
    """Put back what `training_state` took.

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
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter.detach()).copy_(value)
