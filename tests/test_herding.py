"""Method herding: the greedy choice on the teacher's features, at any world size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import SMALL, Command
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.data.images import open_image_set
from patchbloom.train.methods.herding import herd, herded
from patchbloom.train.methods.method import Making
from patchbloom.train.methods.whole_images import read_whole
from patchbloom.train.run.world import ALONE
from patchbloom.train.teacher.evaluation import FORWARD_BATCH
from patchbloom.train.teacher.given import load_teacher
from patchbloom.train.teacher.teacher import Teacher
from student_cases import Sets, Silent, new_sets, untrained_teacher


def directly(features_CD: np.ndarray, count: int) -> list[int]:
    """Greedy by definition: try each further image, take the one with the nearest mean."""
    rows = features_CD.astype(np.float64)
    chosen: list[int] = []
    for _ in range(count):
        gaps = [
            np.inf
            if index in chosen
            else np.linalg.norm(rows[[*chosen, index]].mean(0) - rows.mean(0))
            for index in range(len(rows))
        ]
        chosen.append(int(np.argmin(gaps)))
    return chosen


def test_the_choice_is_the_greedy_one() -> None:
    for seed in range(20):
        features = np.random.default_rng(seed).standard_normal((30, 5)).astype(np.float32)
        assert herd(features, 12) == directly(features, 12)


def test_of_equal_images_the_first_is_taken_and_none_twice() -> None:
    features = np.array([[4.0], [1.0], [1.0], [1.0], [-2.0]], np.float32)
    assert herd(features, 3) == [1, 2, 3]
    assert sorted(herd(features, 5)) == [0, 1, 2, 3, 4]


def making(sets: Sets, teacher: Teacher, world: Any) -> Making:
    plan = SimpleNamespace(
        train=sets[0], class_names=sets[0].class_ids, image_size=32, ipc=2, device="cpu"
    )
    return Making(plan=plan, world=world, report=Silent(), teacher=lambda: teacher)  # type: ignore[arg-type]


class Rank:
    """A rank of a world, run as a thread."""

    def __init__(self, rank: int, met: list[Any], meeting: Barrier) -> None:
        self.rank, self.size, self.threads = rank, len(met), 1
        self._met, self._meeting = met, meeting

    def all_gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        self._met[self.rank] = rows
        self._meeting.wait()
        gathered = torch.cat(self._met)
        self._meeting.wait()
        return gathered


@pytest.mark.parametrize("size", [2, 8])
def test_every_rank_chooses_what_one_process_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setitem(FORWARD_BATCH, "cpu", 7)  # 40 images: six batches
    sets, meeting = new_sets(tmp_path / "s"), Barrier(size, timeout=60)
    met: list[Any] = [None] * size
    ranks = [
        making(sets, untrained_teacher(sets), Rank(rank, met, meeting)) for rank in range(size)
    ]
    alone = herded(making(sets, untrained_teacher(sets), ALONE))
    with ThreadPoolExecutor(size) as pool:
        for chosen in pool.map(herded, ranks):
            assert chosen.tolist() == alone.tolist()


def test_a_run_keeps_the_chosen_images_whole(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = (*SMALL, "--data", shapes, "--method", "herding", "--ipc", "2", "--factor", "2")
    result = train(*options, "--out", tmp_path / "run").result
    train("coreset", *options, "--out", tmp_path / "again")
    assert result["accuracy"].keys() == {"herding"}
    coreset = open_coreset(tmp_path / "run" / "coreset")
    other = open_coreset(tmp_path / "again" / "coreset")
    assert torch.equal(other.patches(), coreset.patches())
    assert coreset.settings["samples_per_class"] == 8
    assert coreset.soft_labels().samples == 80  # type: ignore[union-attr]

    images = open_image_set(shapes, "train")
    teacher = load_teacher(
        str(tmp_path / "run" / "teacher" / "teacher.safetensors"), images.class_ids
    )
    pixels = read_whole(images, np.arange(len(images)), 32, "cpu")
    with torch.inference_mode():
        _, features = teacher.logits_and_features(pixels)
    chosen = [
        first + pick
        for first in range(0, 60, 6)
        for pick in directly(features[first : first + 6].numpy(), 2)
    ]
    assert torch.equal(coreset.patches(), pixels[chosen])
    assert coreset.manifest["provenance"]["images"] == [images.paths[index] for index in chosen]


def test_too_few_images_are_refused(train: Command, shapes: Path, tmp_path: Path) -> None:
    options = ("--data", shapes, "--method", "herding", "--ipc", "7", "--out", tmp_path / "run")
    assert (
        "has 6 training images, but --ipc = 7 whole images are wanted: give a smaller one, or more "
        "images" in train(*SMALL, *options).error
    )
