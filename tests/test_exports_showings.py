"""Exports of coresets with variants, mosaics or doped images, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_cases import LabelBlock, write_labelled
from patchbloom.engine.coreset.coreset import Coreset, attach_labels
from patchbloom.engine.data.names import imagenet_names
from patchbloom.engine.formats.ddranking import SUBSETS
from patchbloom.engine.formats.exports import export_coreset
from patchbloom.train.methods.open import open_coreset_source
from patchbloom.train.methods.source import Machine
from patchbloom.train.run.world import ALONE
from PIL import Image
from torchvision.datasets import ImageFolder

EPOCHS, SIZE_PX = 3, 16
CLASSES = tuple(imagenet_names())[:3]
OWN_COLOURS, DOPED_COLOUR = (0, 1), 2
"""Brightest channel of each image of a class; variants keep it."""


def coloured(channels: list[int], size_px: int) -> torch.Tensor:
    """uint8 [N, size_px, size_px, 3], no two equal; `channels` are the brightest."""
    generator = torch.Generator().manual_seed(len(channels) * size_px)
    shape = (len(channels), size_px, size_px, 3)
    images = torch.randint(0, 40, shape, dtype=torch.uint8, generator=generator)
    images[range(len(channels)), :, :, channels] += 120
    return images


def written(folder: Path, classes: tuple[str, ...] = CLASSES, **changed: Any) -> Coreset:
    """t2i, per class: two images, a variant of each, three samples; a doped image, two samples."""
    settings = {"method": "t2i", "seed": 5, "image_size_px": SIZE_PX, "factor": 1, "ipc": 4}
    settings |= {"patch_px": SIZE_PX, "generated": 2, "variants": 1, "samples_per_class": 3}
    given = {
        "patches_NHWC": coloured([*OWN_COLOURS] * len(classes), SIZE_PX),
        "doped_DHWC": coloured([DOPED_COLOUR] * len(classes), SIZE_PX),
        "class_ids": classes,
        "class_names": classes,
        "settings": settings | {"doping": {"images_per_class": 1, "samples_per_class": 2}},
        "labels": LabelBlock(codec="dense", logits=logits(5, len(classes))),
        "provenance": {},
    }
    return write_labelled(folder, **{**given, **changed})


def logits(each: int, classes: int = len(CLASSES)) -> torch.Tensor:
    """fp16 [E, K · each, K], no two equal."""
    generator = torch.Generator().manual_seed(each)
    return torch.randn(EPOCHS, classes * each, classes, generator=generator).half()


def rded(folder: Path, image_size_px: int = SIZE_PX) -> Coreset:
    """rded, per class: two mosaics, and two doped images in four samples."""
    doping = {"images_per_class": 2, "samples_per_class": 4}
    settings = {"method": "rded", "seed": 5, "factor": 2, "patch_px": SIZE_PX // 2, "ipc": 2}
    return written(
        folder,
        patches_NHWC=coloured([0] * 24, SIZE_PX // 2),
        doped_DHWC=coloured([DOPED_COLOUR] * 6, image_size_px),
        settings={**settings, "image_size_px": image_size_px, "doping": doping},
        labels=LabelBlock(codec="dense", logits=logits(12)),
    )


def opened(out: Path, to: str, cache: Path) -> list[dict[str, Any]]:
    """Rows as read by the library that the format targets."""
    if to == "webdataset":
        import webdataset

        (tar,) = out.glob("*.tar")
        return [
            {
                "image": sample["png"],
                "label": sample["cls"],
                "doped": sample["json"]["doped"],
                "logits": sample["logits.npy"],
                "views": sample["views.npy"].tolist(),
            }
            for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8")
        ]
    import datasets

    rows = datasets.load_dataset(str(out), cache_dir=str(cache))["train"]
    return [{**row, "image": np.array(row["image"])} for row in rows]


@pytest.mark.parametrize("to", ["webdataset", "parquet"])
def test_an_image_has_the_labels_of_what_students_saw_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    """Compared with the images that training renders for each sample and epoch."""
    monkeypatch.setattr("patchbloom.engine.formats.parquet.GROUP_ROWS", 4)
    coreset = written(tmp_path / "coreset")
    stored = torch.cat(
        [coreset.patches().unflatten(0, (3, 2)), coreset.doped().unflatten(0, (3, 1))], 1
    ).numpy()
    seen: dict[tuple[int, int], dict[tuple[int, int], bool]] = {}
    with open_coreset_source(coreset, Machine(device="cpu", world=ALONE)) as source:
        for epoch in range(EPOCHS):
            shown = source.render(torch.arange(source.samples), epoch).add(1).mul(127.5).round()
            for sample, image_CHW in enumerate(shown):
                key = int(source.labels_N[sample]), int(image_CHW.mean((1, 2)).argmax())
                varied = not np.array_equal(image_CHW.permute(1, 2, 0), stored[key])
                seen.setdefault(key, {})[sample, epoch] = varied
    assert len({len(views) for views in seen.values()}) > 1  # label counts differ
    assert sum(sum(views.values()) for views in seen.values()) == 12  # four per class

    told = export_coreset(coreset, to, tmp_path / "out")
    assert (told["images"], told["doped_images"]) == (9, 3)
    rows = opened(tmp_path / "out", to, tmp_path / "cache")
    assert [row["label"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, row in enumerate(rows):
        key = number // 3, number % 3
        np.testing.assert_array_equal(row["image"], stored[key])
        assert row["doped"] == (key[1] == DOPED_COLOUR)
        views = {(sample, epoch): variant > 0 for sample, epoch, variant in row["views"]}
        assert views == seen[key]
        samples, epochs = np.array(row["views"])[:, 0], np.array(row["views"])[:, 1]
        np.testing.assert_array_equal(np.array(row["logits"]), logits(5)[epochs, samples])
    mark = json.loads((tmp_path / "out" / "export.json").read_text())
    assert mark["views"]["columns"] == ["sample", "epoch", "variant"]
    assert "augmented variant" in mark["views"]["meaning"]


def test_patches_of_a_doped_coreset_keep_their_own_labels(tmp_path: Path) -> None:
    """Per class, samples 0–7 are its patches, 8–11 show its 2 real images."""
    export_coreset(rded(tmp_path / "coreset"), "parquet", tmp_path / "out")
    rows = opened(tmp_path / "out", "parquet", tmp_path / "cache")
    assert [row["image"].shape[0] for row in rows] == ([8] * 8 + [16] * 2) * 3
    first = [sorted({sample for sample, _, _ in row["views"]}) for row in rows[10:20]]
    assert first == [*([sample] for sample in range(12, 20)), [20, 22], [21, 23]]
    for row in rows:
        expected = torch.stack([logits(12)[epoch, sample] for sample, epoch, _ in row["views"]])
        np.testing.assert_array_equal(np.array(row["logits"]), expected)


def test_doped_images_are_in_every_format(tmp_path: Path) -> None:
    coreset = rded(tmp_path / "coreset")
    doped = coreset.doped().unflatten(0, (3, 2)).numpy()
    export_coreset(coreset, "imagefolder", tmp_path / "folder")
    images = ImageFolder(str(tmp_path / "folder" / "train"))
    assert images.targets == [0] * 10 + [1] * 10 + [2] * 10
    for label in range(3):
        for number in range(2):
            np.testing.assert_array_equal(images[10 * label + 8 + number][0], doped[label, number])
    assert images[10][0].size == (8, 8)
    without = export_coreset(coreset, "webdataset", tmp_path / "tar", labels=False)
    assert (without["images"], without["soft_labels"]) == (30, None)


@pytest.mark.parametrize("method", ["t2i", "rded"])
def test_dd_ranking_gets_doped_images_after_those_of_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """t2i exports as many images as are stored, whatever its IPC."""
    monkeypatch.setitem(SUBSETS, "ImageNette", (1, 2, 0))  # its own order
    make, made, real = (written, 2, 1) if method == "t2i" else (rded, 2, 2)
    coreset = make(tmp_path / "coreset")
    told = export_coreset(coreset, "ddranking", tmp_path / "out", dataset="ImageNette")
    each = made + real
    assert (told["ipc"], told["images"], told["doped_images"]) == (each, 3 * each, 3 * real)
    assert told["classes_checked"] == "by id"
    labels = torch.load(tmp_path / "out" / "labels.pt", weights_only=True)
    assert labels.tolist() == [0] * each + [1] * each + [2] * each
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    assert images.shape == (3 * each, 3, SIZE_PX, SIZE_PX)
    patches = coreset.patches().unflatten(0, (3, -1))[0]  # DD-Ranking's number 2
    with Image.open(tmp_path / "out" / "images" / "00002" / f"{made - 1:06d}.png") as picture:
        side = patches.shape[1]
        expected = patches[1 if method == "t2i" else 4]  # the first tile of the second mosaic
        np.testing.assert_array_equal(np.array(picture)[:side, :side], expected)
    with Image.open(tmp_path / "out" / "images" / "00002" / f"{made:06d}.png") as picture:
        np.testing.assert_array_equal(picture, coreset.doped()[0])


def test_dd_ranking_refuses_doped_images_of_another_size(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("patchbloom.engine.formats.ddranking._TINY_CLASSES", 3)
    coreset = rded(tmp_path / "coreset", image_size_px=17)
    with pytest.raises(ValueError, match=r"doped images of 16 px, .* got 17 px: export to another"):
        export_coreset(coreset, "ddranking", tmp_path / "out", dataset="TinyImageNet")
    assert not (tmp_path / "out").exists()
    whole = written(tmp_path / "whole")
    told = export_coreset(whole, "ddranking", tmp_path / "out", dataset="TinyImageNet")
    assert told["classes_checked"] == "by number alone"


def test_imagenet_is_known_by_its_classes(tmp_path: Path) -> None:
    ids = tuple(imagenet_names())
    one_px = {"method": "rded", "seed": 0, "image_size_px": 1, "factor": 1, "patch_px": 1, "ipc": 1}
    plain = {
        "patches_NHWC": coloured([0] * 1000, 1),
        "doped_DHWC": None,
        "settings": one_px,
        "labels": None,
    }
    told = export_coreset(
        written(tmp_path / "own", ids, **plain), "ddranking", tmp_path / "a", dataset="ImageNet1K"
    )
    assert told["class_order"] == list(ids)
    assert told["classes_checked"] == "by id"
    others = written(tmp_path / "others", (*ids[:999], "zebra"), **plain)
    with pytest.raises(ValueError, match=r"--dataset ImageNet1K: .*got 1000, 'zebra' among them"):
        export_coreset(others, "ddranking", tmp_path / "b", dataset="ImageNet1K")


def test_labels_of_no_stored_image_are_refused(tmp_path: Path) -> None:
    coreset = written(tmp_path / "noise", model={"start": "noise"})
    with pytest.raises(ValueError, match=r"from the prompt alone .* export without .* --no-labels"):
        export_coreset(coreset, "webdataset", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_coreset(coreset, "webdataset", tmp_path / "out", labels=False)["images"] == 9
    shorter = attach_labels(
        written(tmp_path / "shorter").folder, LabelBlock(codec="dense", logits=logits(4))
    )
    with pytest.raises(ValueError, match=r"expected 15 samples, .* got 12: .* --no-labels"):
        export_coreset(shorter, "parquet", tmp_path / "other")
