"""Watch `train` under torchrun: python torchrun_probe.py NOTES KILLED ARGUMENTS…

KILLED "-": NOTES/METHOD.json gets every rank's results of shared work: hashes of images and
answers, and an accuracy. KILLED a rank: that rank is killed (SIGKILL) while it labels its third
pool, and NOTES/killed holds the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from patchbloom.engine.data.images import open_image_set
from patchbloom.train import cli
from patchbloom.train.commands import pipeline as distil
from patchbloom.train.labels import recording as labels
from patchbloom.train.labels.views import make_views
from patchbloom.train.methods.pools import answer_pool
from patchbloom.train.students import lockstep
from patchbloom.train.teacher.evaluation import evaluate

EPOCH = 7
_answer, _train = labels.answer_pool, distil.train_students


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def watch(notes: Path, data: str) -> None:
    """After a method's students, repeat the shared work and write every rank's results."""

    def trained(source, kept, config, *, world, **rest):
        results = _train(source, kept, config, world=world, **rest)
        samples_P = torch.randperm(source.samples, generator=torch.manual_seed(3))
        images_PCHW = source.render(samples_P, EPOCH)
        logits_PK = answer_pool(
            kept.teacher, make_views(images_PCHW, samples_P, EPOCH, config), world
        )
        few_PCHW = source.render(samples_P[:2], EPOCH)
        val, network = open_image_set(data, "val"), kept.teacher.network
        size_px, device = config.size_px, torch.device("cpu")
        (score,) = evaluate([network], val, size_px=size_px, device=device, world=world)
        found = {
            "images": sha256(images_PCHW),
            "few": torch.equal(few_PCHW, images_PCHW[:2]),
            "answers": sha256(logits_PK),
            "accuracy": [score.accuracy, *score.by_class],
            "any": [world.any(False), world.any(world.rank == world.size - 1)],
        }
        of_ranks = world.all_gather(found)
        if world.leads:
            notes.mkdir(exist_ok=True)
            method = source.describe()["method"]
            (notes / f"{method}.json").write_text(json.dumps(of_ranks))
        return results

    distil.train_students = trained


def fall_behind() -> None:
    """Fill every other slot late: ranks then take pools in groups of different sizes."""
    fill = lockstep.fill_slot

    def late(slot, pool, *rest) -> None:
        time.sleep(0.15 * (pool.index % 2))
        fill(slot, pool, *rest)

    lockstep.fill_slot = late


def kill_in_third_pool(notes: Path) -> None:
    pools = []

    def answered(teacher, views_PCHW, world) -> torch.Tensor:
        pools.append(len(views_PCHW))
        if len(pools) == 3:
            notes.mkdir(exist_ok=True)
            (notes / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return _answer(teacher, views_PCHW, world)

    labels.answer_pool = answered


if __name__ == "__main__":
    folder, killed, *arguments = sys.argv[1:]
    if os.environ["RANK"] == killed:
        kill_in_third_pool(Path(folder))
    elif killed == "-":
        if os.environ["RANK"] == "1":
            fall_behind()
        watch(Path(folder), arguments[arguments.index("--data") + 1])
    sys.exit(cli.main(arguments))
