"""Doping: margins are right, the lowest images are taken, and students see them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patchbloom.engine.coreset.coreset import Coreset, open_coreset, write_coreset
from patchbloom.engine.data.crops import to_unit
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.engine.errors import CoresetError
from patchbloom.train.commands.doping import all_margins, lowest_margins, margins_of, write_doped
from patchbloom.train.methods.open import with_doped
from patchbloom.train.methods.whole_images import StoredImages
from patchbloom.train.run.progress import Report
from patchbloom.train.teacher.normalisation import IMAGENET
from patchbloom.train.teacher.teacher import Teacher
from PIL import Image
from torch import Tensor, nn

SIZE = 8
GREENS = {"leaf": (200, 120, 160, 90), "wine": (10, 140, 60, 110)}
"""Green of each image; red is 100, blue 0."""


class Colour(nn.Module):
    """Logits: `sharpness` times the mean green and red, in [0, 1]."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, inputs_BCHW: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
        red_green = (inputs_BCHW * std + mean)[:, :2].mean((2, 3))
        return self.sharpness * red_green.flip(1)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for name, greens in GREENS.items():
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number, green in enumerate(greens):
            pixels = np.full((SIZE, SIZE, 3), (100, green, 0), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{number}.png")
    return open_image_set(tmp_path / "data", "train")


def test_a_margin_is_what_it_is_called() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    margins = margins_of(probabilities, torch.tensor([0, 2, 1]))
    assert margins.tolist() == pytest.approx([0.5, -0.6, 0.0])


def test_the_lowest_of_every_class_are_taken_the_first_of_equal_ones() -> None:
    margins = np.array([0.5, -0.2, 0.1, -0.2, 0.3, 0.0, 0.0, 0.0], np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert lowest_margins(margins, labels, 2).tolist() == [1, 3, 5, 6]
    assert lowest_margins(margins, labels, 4).tolist() == [1, 3, 2, 0, 5, 6, 7, 4]


def test_known_margins(images: ImageSet) -> None:
    """Margin of two classes: tanh(sharpness · |green − red| / 2), colours in [0, 1]."""
    teacher = Teacher(Colour(1.0), architecture="colour", class_ids=images.class_ids, size_px=SIZE)
    margins = all_margins(Colour(5.0), teacher, images, size_px=SIZE, report=Report())
    greens = np.array([*GREENS["leaf"], *GREENS["wine"]])
    expected = np.tanh(5.0 * np.abs(greens - 100) / 255 / 2)
    np.testing.assert_allclose(margins, expected, atol=1e-5)
    assert lowest_margins(margins, images.labels, 1).tolist() == [3, 7]
    contrary = all_margins(Colour(-5.0), teacher, images, size_px=SIZE, report=Report())
    np.testing.assert_allclose(contrary, -expected, atol=1e-5)


@pytest.fixture
def coreset(images: ImageSet, tmp_path: Path) -> Coreset:
    patches = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, SIZE, SIZE, 3))
    return write_coreset(
        tmp_path / "own",
        patches_NHWC=patches.astype(np.uint8),
        class_ids=images.class_ids,
        class_names=images.class_ids,
        settings={
            **{"method": "dsco", "seed": 0, "image_size_px": SIZE, "factor": 1},
            **{"patch_px": SIZE, "ipc": 2, "samples_per_class": 4},
        },
        provenance={"command": "made"},
    )


def doped(coreset: Coreset, images: ImageSet, folder: Path) -> Coreset:
    """Doped with the second image of each class, shown twice an epoch."""
    margins = np.array([1, 0, 1, 1, 1, 0, 1, 1], np.float32)
    options: dict[str, Any] = {"per_class": 1, "views": 2, "device": "cpu"}
    return write_doped(
        coreset, folder, images, margins, **options, made_with={}, provenance={"command": "doped"}
    )


def test_a_doped_coreset_shows_both(coreset: Coreset, images: ImageSet, tmp_path: Path) -> None:
    opened = open_coreset(doped(coreset, images, tmp_path / "doped").folder)
    assert opened.content_sha256 != coreset.content_sha256
    assert coreset.doped_per_class == 0
    assert coreset.doped().shape == (0, SIZE, SIZE, 3)
    own = StoredImages(
        method="dsco",
        images_NHWC=coreset.patches(),
        class_ids=images.class_ids,
        samples_per_class=4,
    )
    assert with_doped(own, coreset, "cpu") is own
    source = with_doped(own, opened, "cpu")
    assert source.labels_N.tolist() == [0] * 6 + [1] * 6
    assert source.describe() == {**own.describe(), "doped_images_per_class": 1}
    asked = torch.tensor([11, 0, 4, 6, 3, 5, 7, 10, 1])
    shown = source.render(asked, 0)
    red = ((shown[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    green = ((shown[:, 1, 0, 0] + 1) * 127.5).round().int().tolist()
    assert red == [100, 0, 100, 2, 1, 100, 3, 100, 1]
    assert [green[row] for row in (0, 2, 5, 7)] == [140, 120, 120, 140]
    for rows in ([2, 5], [1, 3]):  # one kind alone
        assert torch.equal(source.render(asked[rows], 0), shown[rows])
    assert torch.equal(own.render(torch.arange(4), 1), to_unit(coreset.patches()[[0, 1, 0, 1]]))


@pytest.mark.parametrize("damage", ["stray", "missing", "changed"])
def test_damage_to_a_doped_image_is_found(
    coreset: Coreset, images: ImageSet, tmp_path: Path, damage: str
) -> None:
    folder = doped(coreset, images, tmp_path / "doped").folder
    path = folder / "doped" / "leaf" / "000000.png"
    if damage == "stray":
        shutil.copy(path, path.with_name("000001.png"))
        told = "000001.png is not part of this coreset"
    elif damage == "missing":
        path.unlink()
        told = "000000.png is missing from the coreset"
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        told = "000000.png was changed"
    with pytest.raises(CoresetError, match=told):
        open_coreset(folder)


def test_doped_images_of_another_size_are_refused(coreset: Coreset, tmp_path: Path) -> None:
    with pytest.raises(
        CoresetError, match=r"expected uint8 \[2, 8, 8, 3\], 1 of each of 2 classes"
    ):
        write_coreset(
            tmp_path / "doped",
            patches_NHWC=coreset.patches(),
            class_ids=coreset.class_ids,
            class_names=coreset.class_names,
            settings=coreset.settings,
            doped_DHWC=torch.zeros(3, 8, 8, 3, dtype=torch.uint8),
            provenance={},
        )
    assert not (tmp_path / "doped").exists()
