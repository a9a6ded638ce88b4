"""`engine coreset export`: readable by the libraries it targets, whole, reproducible bytes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_cases import LabelBlock, write_labelled
from patchbloom.engine.cli import main
from patchbloom.engine.coreset.coreset import Coreset, open_coreset
from patchbloom.engine.data.names import imagenet_names
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.formats import exports
from patchbloom.engine.formats import webdataset as shards
from patchbloom.engine.formats.ddranking import CIFAR_NAMES, SUBSETS
from patchbloom.engine.formats.exports import export_coreset
from patchbloom.engine.options import ExportFormat
from patchbloom.train.networks import build_network
from patchbloom.train.teacher.teacher import Teacher
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

EPOCHS, IPC, FACTOR, PATCH_PX = 3, 2, 2, 8
EACH = IPC * FACTOR**2
IMAGENET = imagenet_names()
CIFAR10, CIFAR100 = (names.split() for names in CIFAR_NAMES.values())
WOOF = tuple(sorted(tuple(IMAGENET)[index] for index in SUBSETS["ImageWoof"]))
ROOT = Path(__file__).parents[1]
DD_RANKING = ROOT / ".ddranking" / str(sys.implementation.cache_tag)
FORMATS: tuple[ExportFormat, ...] = ("imagefolder", "webdataset", "parquet", "hf", "ddranking")
LOGITS = 4 * torch.randn(EPOCHS, 10 * EACH, 10, generator=torch.Generator().manual_seed(1))
PATCHES = torch.randint(
    0, 256, (10 * EACH, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = np.repeat(np.arange(10), EACH)


def new_coreset(folder: Path, **changed: Any) -> Coreset:
    """ImageWoof's ten classes, which DD-Ranking numbers in its own order."""
    settings = {
        "method": "rded",
        "seed": 3,
        "image_size_px": 16,
        "factor": FACTOR,
        "patch_px": PATCH_PX,
        "ipc": IPC,
    }
    given = {
        "patches_NHWC": PATCHES,
        "class_ids": WOOF,
        "class_names": tuple(IMAGENET[class_id] for class_id in WOOF),
        "settings": settings,
        "labels": LabelBlock(codec="dense", logits=LOGITS),
        "provenance": {},
    }
    return write_labelled(folder, **{**given, **changed})


@pytest.fixture(scope="module")
def coreset(tmp_path_factory: pytest.TempPathFactory) -> Coreset:
    """With dense labels; tests only read it."""
    return new_coreset(tmp_path_factory.mktemp("given") / "coreset")


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory) -> Coreset:
    """The same with top-3 labels."""
    labels = LabelBlock(codec="topk", logits=LOGITS, k=3)
    return new_coreset(tmp_path_factory.mktemp("given") / "topk", labels=labels)


@pytest.fixture(scope="module")
def pca(tmp_path_factory: pytest.TempPathFactory) -> Coreset:
    """The same with labels in three components."""
    labels = LabelBlock(codec="pca", logits=LOGITS, k=3)
    return new_coreset(tmp_path_factory.mktemp("given") / "pca", labels=labels)


def export(coreset: Coreset, to: ExportFormat, out: Path, **options: Any) -> dict[str, Any]:
    named = {"dataset": "ImageWoof"} if to == "ddranking" else {}
    return export_coreset(coreset, to, out, **named, **options)


def sha256s(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_torchvision_opens_an_image_folder(coreset: Coreset, tmp_path: Path) -> None:
    export(coreset, "imagefolder", tmp_path / "out")
    images = ImageFolder(str(tmp_path / "out" / "train"))
    assert tuple(images.classes) == WOOF
    assert images.targets == LABELS.tolist()
    for row, (picture, _) in enumerate(images):
        np.testing.assert_array_equal(np.array(picture), PATCHES[row])
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [entry["name"] for entry in told["classes"]] == list(coreset.class_names)
    assert told["coreset"] == coreset.content_sha256
    assert told["labels"] is None


def test_webdataset_opens_shards(
    coreset: Coreset, topk: Coreset, pca: Coreset, tmp_path: Path
) -> None:
    import webdataset

    shards.write_shards(coreset, coreset.soft_labels(), tmp_path, shard_bytes=60_000)
    tars = sorted(str(path) for path in tmp_path.iterdir())
    assert len(tars) > 2
    assert all(Path(path).stat().st_size <= 60_000 for path in tars)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["cls"] for sample in samples] == LABELS.tolist()
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["png"], PATCHES[row])
        np.testing.assert_array_equal(sample["logits.npy"], LOGITS[:, row].half().numpy())
        class_id = WOOF[LABELS[row]]
        expected = {"class_id": class_id, "class_name": IMAGENET[class_id], "doped": False}
        assert sample["json"] == expected
    export(topk, "webdataset", tmp_path / "topk")
    (path,) = (tmp_path / "topk").glob("*.tar")
    kept = topk.soft_labels()
    assert kept is not None
    for row, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False).decode()):
        targets = [kept.targets(epoch, [row]) for epoch in range(EPOCHS)]
        classes = [target.classes for target in targets if target.classes is not None]
        probabilities = torch.cat([target.labels for target in targets])
        np.testing.assert_array_equal(sample["probabilities.npy"], probabilities.numpy())
        np.testing.assert_array_equal(sample["classes.npy"], torch.cat(classes).numpy())
        views = [[row, epoch, 0] for epoch in range(EPOCHS)]
        assert sample["views.npy"].tolist() == views
    export(pca, "webdataset", tmp_path / "pca")
    (path,) = (tmp_path / "pca").glob("*.tar")
    kept = pca.soft_labels()
    assert kept is not None
    for row, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False).decode()):
        logits = torch.cat([kept.targets(epoch, [row]).labels for epoch in range(EPOCHS)])
        np.testing.assert_array_equal(sample["logits.npy"], logits.numpy())


def test_the_card_of_hf_is_a_data_sets(coreset: Coreset, tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    for labels, told in ((True, ", and soft labels: logits, views."), (False, "and `doped`.")):
        export(coreset, "hf", tmp_path / "out", labels=labels, overwrite=True)
        card = DatasetCard.load(tmp_path / "out" / "README.md")
        assert f"# {10 * EACH} images of 10 classes, method rded\n" in card.text
        assert told in card.text
        (config,) = card.data.to_dict()["configs"]
        (files,) = config["data_files"]
        assert [path.name for path in (tmp_path / "out").glob(files["path"])]


@pytest.mark.parametrize(
    ("codec", "to"), [("coreset", "hf"), ("topk", "parquet"), ("pca", "parquet")]
)
def test_hugging_face_datasets_opens_parquet(
    codec: str,
    to: ExportFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    import datasets

    monkeypatch.setattr(
        "patchbloom.engine.formats.parquet.GROUP_ROWS", 7
    )  # several groups, the last short
    exported: Coreset = request.getfixturevalue(codec)
    export(exported, to, tmp_path / "out")
    opened = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(opened) == ["train"]
    rows = opened["train"]
    assert rows.features["label"].names == list(WOOF)
    assert rows["label"][:] == LABELS.tolist()
    assert not any(rows["doped"][:])
    labels = exported.soft_labels()
    assert labels is not None
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(np.array(row["image"]), PATCHES[number])
        assert row["class_name"] == IMAGENET[WOOF[LABELS[number]]]
        assert row["views"] == [[number, epoch, 0] for epoch in range(EPOCHS)]
        answers = labels.answers(np.arange(EPOCHS), np.full(EPOCHS, number))
        for name, expected in answers.items():
            np.testing.assert_array_equal(np.array(row[name], expected.dtype), expected)


def test_groups_of_rows_are_of_decoded_labels(
    coreset: Coreset, pca: Coreset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group of pca labels takes no more memory than one of dense labels."""
    import pyarrow.parquet

    monkeypatch.setattr("patchbloom.engine.formats.parquet.GROUP_BYTES", 3 * EPOCHS * 10 * 2)
    for given in (coreset, pca):
        export(given, "parquet", tmp_path / given.folder.name)
        (path,) = (tmp_path / given.folder.name / "data").iterdir()
        assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).num_rows == 3
        told = json.loads((tmp_path / given.folder.name / "export.json").read_text())
        assert told["labels"]["parts"] == ["logits"]


def test_dd_ranking_is_given_what_it_documents(coreset: Coreset, tmp_path: Path) -> None:
    """DD-Ranking's own steps: torch.load of images.pt, an ImageFolder, its class numbers."""
    told = export(coreset, "ddranking", tmp_path / "out")
    images = torch.load(tmp_path / "out" / "images.pt", map_location="cpu", weights_only=True)
    labels = torch.load(tmp_path / "out" / "labels.pt", map_location="cpu", weights_only=True)
    assert images.shape == (10 * IPC, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.tolist() == [number for number in range(10) for _ in range(IPC)]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    folder = ImageFolder(str(tmp_path / "out" / "images"), transform)
    assert folder.targets == labels.tolist()
    assert torch.allclose(torch.stack([image for image, _ in folder]), images, atol=1e-6)
    assert told["class_order"] == [tuple(IMAGENET)[index] for index in SUBSETS["ImageWoof"]]
    first = WOOF.index(tuple(IMAGENET)[193]) * EACH  # the class that DD-Ranking calls 0
    with Image.open(tmp_path / "out" / "images" / "00000" / "000001.png") as picture:
        canvas = np.array(picture)
    tiles = PATCHES[first + 4 : first + 8]  # the second image
    np.testing.assert_array_equal(canvas[:8, :8], tiles[0])
    np.testing.assert_array_equal(canvas[8:, :8], tiles[2])


def coloured_by_class(folder: Path, class_ids: list[str]) -> Coreset:
    """A class of one image per id; class n, counted in `class_ids`, has the grey n."""
    ordered = sorted(class_ids)
    greys = torch.tensor([class_ids.index(class_id) for class_id in ordered], dtype=torch.uint8)
    one = {"method": "rded", "seed": 0, "image_size_px": 4, "factor": 1, "patch_px": 4, "ipc": 1}
    return new_coreset(
        folder,
        patches_NHWC=greys[:, None, None, None].expand(-1, 4, 4, 3),
        class_ids=ordered,
        class_names=[f"class {class_id}" for class_id in ordered],
        settings=one,
        labels=None,
    )


NUMBERS = [str(number) for number in range(100)]


@pytest.mark.parametrize("class_ids", [NUMBERS, [f"{n:0>3}" for n in NUMBERS], CIFAR100, CIFAR10])
def test_dd_ranking_numbers_classes_as_cifar_does(class_ids: list[str], tmp_path: Path) -> None:
    """Folders 0 to 99 sort as strings: 0, 1, 10. Label 2 still is class 2."""
    coreset = coloured_by_class(tmp_path / "coreset", class_ids)
    dataset = f"CIFAR{len(class_ids)}"
    told = export_coreset(coreset, "ddranking", tmp_path / "out", dataset=dataset)
    assert told["class_order"] == class_ids
    for label, class_id in enumerate(class_ids):
        with Image.open(tmp_path / "out" / "images" / f"{label:05d}" / "000000.png") as picture:
            assert picture.getpixel((0, 0)) == (label, label, label), class_id
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    labels = torch.load(tmp_path / "out" / "labels.pt", weights_only=True)
    assert labels.tolist() == list(range(len(class_ids)))
    assert images[:, 0, 0, 0].diff().min() > 0  # greys in order


@pytest.mark.parametrize(
    ("dataset", "class_ids"),
    [
        ("CIFAR100", [str(number) for number in range(1, 101)]),
        ("CIFAR100", [f"{number}_{name}" for number, name in enumerate(CIFAR100)]),
        ("CIFAR10", [*CIFAR10[2:], "car", "plane"]),  # sorted, bird would be 0
        ("CIFAR10", [*"0123456789", "09"]),
        ("TinyImageNet", [str(number) for number in range(200)]),
    ],
)
def test_dd_ranking_is_refused_classes_whose_numbers_are_not_known(
    dataset: str, class_ids: list[str], tmp_path: Path
) -> None:
    coreset = coloured_by_class(tmp_path / "coreset", class_ids)
    with pytest.raises(CoresetError, match=r"expected \d+ class folders .* got \d+"):
        export_coreset(coreset, "ddranking", tmp_path / "out", dataset=dataset)
    assert not (tmp_path / "out").exists()


def test_other_formats_keep_each_image_with_its_class(tmp_path: Path) -> None:
    """Folders of plain numbers: every library's label leads back to the class of the image."""
    import datasets
    import webdataset

    coreset = coloured_by_class(tmp_path / "coreset", NUMBERS)
    for to in FORMATS[:3]:
        export(coreset, to, tmp_path / to)
    pictures = ImageFolder(str(tmp_path / "imagefolder" / "train"))
    found = [(pictures.classes[label], picture) for picture, label in pictures]
    rows = datasets.load_dataset(str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache"))
    names = rows["train"].features["label"].names
    found += [(names[row["label"]], row["image"]) for row in rows["train"]]
    (shard,) = (tmp_path / "webdataset").glob("*.tar")
    listed = json.loads((tmp_path / "webdataset" / "export.json").read_text())["classes"]
    for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"):
        assert listed[sample["cls"]]["id"] == sample["json"]["class_id"]
        found.append((sample["json"]["class_id"], sample["png"]))
    assert len(found) == 300
    assert all(picture.getpixel((0, 0))[0] == int(class_id) for class_id, picture in found)


def taught(images_N3HW: torch.Tensor, path: Path) -> str:
    """A teacher that knows the images, one per class of WOOF; its file."""
    torch.manual_seed(0)
    network = build_network("convnet-d3-w32-in", 10, images_N3HW.shape[-1])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(network(images_N3HW), torch.arange(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    Teacher(network, architecture="convnet-d3-w32-in", class_ids=WOOF, size_px=8).save(path)
    return str(path)


def test_dd_ranking_scores_an_export(tmp_path: Path) -> None:
    """DD-Ranking's LRS and ARS with hard and soft labels, of the real images themselves.

    They are its training and its test images too, so students learn them only if classes have the
    same number in the export's tensors and folders, the real images and the teacher's logits.
    """
    if not DD_RANKING.is_dir():
        missing = f"DD-Ranking is not in {DD_RANKING}: run make setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    one = {"method": "rded", "seed": 0, "image_size_px": 8, "factor": 1, "patch_px": 8, "ipc": 1}
    patches_NHWC = PATCHES[::EACH]
    given = new_coreset(tmp_path / "one", patches_NHWC=patches_NHWC, settings=one, labels=None)
    told = export(given, "ddranking", tmp_path / "out")
    for class_id, picture in zip(WOOF, patches_NHWC, strict=True):
        for split in ("train", "test"):
            (tmp_path / "data" / split / class_id).mkdir(parents=True)
            path = tmp_path / "data" / split / class_id / "0.png"
            Image.fromarray(picture.numpy()).save(path)
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    order = [told["class_order"].index(class_id) for class_id in WOOF]
    words = f"{tmp_path / 'out'} --data {tmp_path / 'data'} --model MLP --device cpu"
    words += f" --teacher {taught(images[order], tmp_path / 'teacher.safetensors')}"
    words += " --full-accuracy 90 --epochs 10 --evaluations 1 --workers 0"
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "ddranking_scores.py"), *words.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    scores = json.loads(run.stdout)
    (hard, random), (again, soft, random_soft) = (
        scores[name]["accuracies"] for name in ("lrs_hard", "lrs_soft")
    )
    points = {"lrs_hard": hard - random + hard - 90, "lrs_soft": soft - random_soft + again - 90}
    for name in ("ars_hard", "ars_soft"):
        mixed, random_mixed, plain, random_plain = scores[name]["accuracies"]
        points[name] = mixed - random_mixed + plain - random_plain
    for name, difference in points.items():
        assert min(scores[name]["accuracies"]) > 60, name
        mean = "label_robust_score_mean" if "lrs" in name else "augmentation_robust_score_mean"
        for key, alpha in ((mean, difference / 2), ("of_fractions", difference / 200)):
            expected = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
            assert scores[name][key] == pytest.approx(expected), (name, key)
    source = (DD_RANKING / "ddranking" / "utils" / "data.py").read_text()
    known: dict[str, Any] = {}
    exec(source[source.index("class ImageNetSubsets") : source.index("imagenet_subsets =")], known)
    orders = known["ImageNetSubsets"].dict
    assert orders == {name: [*order] for name, order in SUBSETS.items() if name != "ImageNet1K"}


@pytest.mark.parametrize("to", FORMATS)
def test_equal_coresets_make_equal_bytes_and_no_pickle(
    coreset: Coreset, to: ExportFormat, tmp_path: Path
) -> None:
    first = export(coreset, to, tmp_path / "a")
    export(new_coreset(tmp_path / "again", provenance={"time": 1}), to, tmp_path / "b")
    assert sha256s(tmp_path / "a") == sha256s(tmp_path / "b")
    assert first["files"] == len(sha256s(tmp_path / "a"))
    told = json.loads((tmp_path / "a" / "export.json").read_text())
    found = {
        name: digest for name, digest in sha256s(tmp_path / "a").items() if name[-5:] != ".json"
    }
    assert {name: entry["sha256"] for name, entry in told["files"].items()} == found
    pickled = [path.name for path in (tmp_path / "a").rglob("*") if zipfile.is_zipfile(path)]
    assert sorted(pickled) == (["images.pt", "labels.pt"] if to == "ddranking" else [])
    for name in pickled:  # only tensors are pickled
        with zipfile.ZipFile(tmp_path / "a" / name) as archive:
            stream = io.BytesIO(archive.read(f"{name.removesuffix('.pt')}/data.pkl"))
        named = [
            argument for code, argument, _ in pickletools.genops(stream) if code.name == "GLOBAL"
        ]
        assert all(name.split()[0] in ("torch._utils", "torch", "collections") for name in named)


def test_an_export_is_whole_or_not_at_all(
    coreset: Coreset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(coreset, "imagefolder", out)
    before = sha256s(out)
    with pytest.raises(ValueError, match="is not empty: choose another --out, or --overwrite"):
        export(coreset, "webdataset", out)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(exports.shutil, "copyfile", full)
        with pytest.raises(OSError, match="no space left for"):
            export(coreset, "imagefolder", out, overwrite=True)
    assert sha256s(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(coreset, "webdataset", out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"train-000000.tar", "export.json"}
    mark = out / "export.json"
    mark.write_text(mark.read_text().replace("patchbloom.export/2", "patchbloom.export/1"))
    export(coreset, "webdataset", out, overwrite=True)
    for name in ("mine.txt", "labels.safetensors"):
        (out / name).write_text("keep me")
        with pytest.raises(ValueError, match=rf"{name} is not part of an export"):
            export(coreset, "imagefolder", out, overwrite=True)
        assert (out / name).read_text() == "keep me"
        (out / name).unlink()


def test_labels_can_be_left_out(coreset: Coreset, tmp_path: Path) -> None:
    assert export(coreset, "webdataset", tmp_path / "with")["soft_labels"] == "dense"
    assert export(coreset, "webdataset", tmp_path / "without", labels=False)["soft_labels"] is None
    sizes = [next((tmp_path / name).glob("*.tar")).stat().st_size for name in ("without", "with")]
    assert sizes[0] < sizes[1]
    assert b".npy" not in next((tmp_path / "without").glob("*.tar")).read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--to tfrecord --out OUT", "invalid choice 'tfrecord'"),
        ("--to ddranking --out OUT", "--dataset None: expected DD-Ranking's name of the data set"),
        ("--to ddranking --out OUT --dataset ImageNette", "10 class folders (n01440764, "),
        ("--to ddranking --out OUT --dataset CIFAR100", "expected 100 class folders (apple, "),
        ("--to ddranking --out OUT --dataset CIFAR10", "got 10, 'n02086240' among them"),
        ("--to parquet --out OUT --dataset ImageNette", "--dataset is for --to ddranking"),
        ("--to imagefolder --out IN/x", "lies in the coreset, which holds its own files only"),
        ("--to imagefolder --out IN/..", "holds the coreset itself"),
    ],
)
def test_unusable_input_is_one_line(
    coreset: Coreset, words: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words.replace("OUT", str(tmp_path / "out")).replace("IN", str(coreset.folder))
    assert main(["coreset", "export", str(coreset.folder), *words.split()]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    coreset: Coreset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OSError, match=r"needs pyarrow.*pip install 'patchbloom\[parquet\]'"):
        export(coreset, "parquet", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_tells(
    coreset: Coreset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(coreset.folder), "--to", "webdataset", "--out", str(out), "--json"]
    assert main(["coreset", "export", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == len(LABELS)
    assert told["coreset"] == open_coreset(coreset.folder).content_sha256
    assert (out / "train-000000.tar").is_file()
