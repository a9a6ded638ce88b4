"""For tests of `train`: a command's outcome, small data and models, quick options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.prior.model import new_parts, save_parts

SMALL = (
    *("--recipe", "small", "--image-size", "32", "--seeds", "1"),
    *("--teacher", "convnet-d3-w8", "--student", "convnet-d3-w8"),
    *("--teacher-epochs", "1", "--epochs", "1"),
)


@dataclass
class Outcome:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line of stderr, which must be the only error line."""
        lines = [line for line in self.err.splitlines() if line.startswith("train: error: ")]
        assert self.code == 2, self.err
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]

    @property
    def result(self) -> dict:
        """The last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def told(self) -> dict[str, Any]:
        """The result, or {"error": the error line}."""
        return {"error": self.error} if self.code else self.result


Command = Callable[..., Outcome]


def runner(capsys: pytest.CaptureFixture[str]) -> Command:
    """A Command that runs `train ...` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


def write_small_model(folder: Path) -> None:
    """Write a 32 px model with seeded random weights to `folder`/model."""
    torch.manual_seed(0)
    channels: dict[str, Any] = {"unet_channels": (16, 32, 64), "vae_channels": (8, 16, 16)}
    save_parts(new_parts(32, folder / "tokenizer", **channels), folder / "model")


def write_small_set(folder: Path) -> Path:
    """Write six training and two validation images of each of the ten classes."""
    return write_shapes(folder / "s", train_per_class=6, val_per_class=2)
