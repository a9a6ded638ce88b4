"""Writes the archives of tests/golden: whole and stopped runs, and an engine with its model.

An earlier version wrote them and this one must read them: rerun `python tests/golden_fixtures.py`
only after a format change that refuses the old ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from golden_cases import (
    ENGINE,
    GOLDEN,
    RUNS,
    SMALL,
    STOPPED,
    elsewhere,
    engine_main,
    run_all,
    train_main,
)
from patchbloom.train.prior.model import new_parts, save_parts
from patchbloom.train.run.progress import Report

NOT_KEPT = ("tensorboard", "pictures", "report.html")
"""Parts of a run folder that name the host or derive from the rest."""
PLACE = Path("/tmp/patchbloom-golden")
"""Folder of the engine's model, which the engine's manifest names."""


def write_runs() -> None:
    with elsewhere():
        run_all()
        for name, options in STOPPED.items():
            with patch.object(Report, "scalar", _stop):
                assert train_main([*SMALL, "--out", name, *options]) == 130
        for name in (*RUNS, *STOPPED):
            for each in NOT_KEPT:
                path = Path(name, each)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _pack("runs", *RUNS, *STOPPED)


def _stop(self: Report, tag: str, step: int, value: float) -> None:
    """Ctrl-C at the loss of the second epoch, of students or of a three-epoch teacher."""
    if (tag, step) in (("upsample/loss", 1), ("teacher/loss", 1)):
        os.kill(os.getpid(), signal.SIGINT)


def write_engine() -> None:
    """Write a model of few distinct weights, so that it compresses well, and its engine.

    ONNX files name their source files, so packages were imported through links in /tmp.
    """
    shutil.rmtree(PLACE, ignore_errors=True)
    torch.manual_seed(0)
    channels: dict[str, Any] = {"unet_channels": (16, 16, 16), "vae_channels": (8, 8, 8)}
    parts = new_parts(32, PLACE / "tokenizer", **channels)
    for module in (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2):
        for value in module.parameters():
            value.data = (value.data * 16).round() / 16
    save_parts(parts, PLACE / "model")
    built = ("--model", str(PLACE / "model"), "--bundles", str(PLACE / "bundles"))
    assert engine_main(["build", *built, *ENGINE]) == 0
    os.chdir(PLACE)
    _pack("engine", "model", "bundles")


def _pack(archive: str, *folders: str) -> None:
    """Pack folders of the current folder, without owners."""

    def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if member.name.endswith(".lock") else member

    with tarfile.open(GOLDEN / f"{archive}.tar.xz", "w:xz", preset=9) as tar:
        for folder in folders:
            tar.add(folder, filter=without_owner)


if __name__ == "__main__":
    for write in sys.argv[1:] or ("runs", "engine"):
        {"runs": write_runs, "engine": write_engine}[write]()
