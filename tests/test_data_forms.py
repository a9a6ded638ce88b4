"""Every form of --data against the image folder of the same images, and what each refuses."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import datasets
import numpy as np
import patchbloom
import pytest
import torch
from cli_cases import SMALL, Command
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.data.arrow import open_rows
from patchbloom.engine.data.crops import CorruptImageError, stream_center
from patchbloom.engine.data.images import InputError
from patchbloom.engine.data.shards import open_shards, shard_files
from patchbloom.engine.formats.exports import export_coreset
from patchbloom.export.durable import cache_folder
from patchbloom.train.coreset_options import DataOptions
from patchbloom.train.data.folder import check_content, images_sha256, validation_sha256
from patchbloom.train.data.forms import open_data
from patchbloom.train.run.progress import Report
from PIL import Image
from pyarrow.parquet import write_table
from torch import nn

CLASSES = ("n01 tench, Tinca", "straße/é", "東京")
"""With spaces, a slash and letters of three scripts."""
COUNTS = {"train": 5, "val": 2}
SIZE = 24
Images = dict[tuple[str, str, str], bytes]
"""Encoded images by split, class and name."""


def new_images() -> Images:
    random = np.random.default_rng(0)
    images: Images = {}
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                suffix = ("png", "jpg", "webp")[number % 3]
                pixels = random.integers(0, 256, (SIZE + number, SIZE, 3), np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG" if suffix == "jpg" else suffix)
                images[split, name, f"{number:03d}.{suffix}"] = stream.getvalue()
    return images


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def rows(images: Images, split: str) -> list[dict[str, Any]]:
    """In the order of an image folder."""
    return [
        {"image": {"bytes": content, "path": name}, "label": CLASSES.index(of)}
        for (found, of, name), content in images.items()
        if found == split
    ]


def dataset(rows: list[dict[str, Any]], label: Any = None) -> datasets.Dataset:
    label = label or datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    return datasets.Dataset.from_list(rows, features=features)


def write_forms(root: Path, images: Images) -> dict[str, tuple[str, DataOptions]]:
    """The same images in every form: --data and what else it takes."""
    folder, members = root / "folder", {split: [] for split in COUNTS}
    for (split, of, name), content in images.items():
        path = f"{split}/{of.replace('/', '_')}/{name}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        members[split].append((f"./{path}", content))
    write_tar(root / "train-00.tar", [("./train/東京/._000.png", b""), *members["train"][:4]])
    write_tar(root / "train-01.tar", members["train"][4:])
    write_tar(root / "val-00.tar", members["val"])
    for split, found in members.items():
        labelled = []
        for path, content in found[::-1]:
            key, named = path[:-4].rstrip("."), path.split("/")[2]
            told = {"label": CLASSES[[c.replace("/", "_") for c in CLASSES].index(named)]}
            labelled += [(path, content), (f"{key}.json", json.dumps(told).encode())]
            labelled += [(f"{key}.cls", b"7"), (f"{key}.mask.png", b"no picture")]
        write_tar(root / f"labelled-{split}.tar", labelled)
    for kind in ("parquet/plain", "files/data"):
        (root / kind).mkdir(parents=True)
    saved: dict[str, dict[str, datasets.Dataset]] = {"saved": {}, "numbered": {}}
    for split, name in (("train", "train"), ("val", "validation")):
        found = rows(images, split)
        saved["saved"][name] = dataset(found[::-1])
        saved["numbered"][name] = dataset(
            [{**row, "image": {**row["image"], "path": None}} for row in found]
        )
        for row in found:
            path = folder / split / CLASSES[row["label"]].replace("/", "_") / row["image"]["path"]
            row["image"] = {"bytes": None, "path": str(path)}
        file = f"{name}-00000-of-00001.parquet"
        saved["saved"][name].to_parquet(root / "parquet/plain" / file)
        # to_parquet would put the files' bytes into it.
        write_table(dataset(found[::-1]).with_format("arrow")[:], root / "files/data" / file)
    for kind, splits in saved.items():
        datasets.DatasetDict(splits).save_to_disk(root / kind)
    kinds = ("folder", "parquet", "files", *saved)
    forms = {kind: (str(root / kind), DataOptions()) for kind in kinds}
    val = DataOptions(val_data=str(root / "val-*.tar"))
    forms["shards"] = (str(root / "train-{00..01}.tar"), val)
    val = DataOptions(val_data=str(root / "labelled-val.tar"))
    return forms | {"labelled shards": (str(root / "labelled-train.tar"), val)}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, DataOptions]]:
    datasets.disable_progress_bars()
    return write_forms(tmp_path_factory.mktemp("forms"), new_images())


FORMS = ("parquet", "saved", "files", "numbered", "shards", "labelled shards")
SAME_NAMES = ("parquet", "saved", "files", "shards")


def scorer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(CLASSES)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_coreset_of_the_folder(
    forms: dict[str, tuple[str, DataOptions]], form: str, tmp_path: Path
) -> None:
    made = []
    for name in ("folder", form):
        data, where = forms[name]
        sets = open_data(data, ("train", "val"), Report(), where)
        (tmp_path / name).mkdir()
        check_content(tmp_path / name, sets, Report(), begun=True)
        options: dict[str, Any] = {"teacher": scorer(), "model": None, "device": "cpu"}
        core = patchbloom.select(data, ipc=1, size_px=32, out=tmp_path / f"{name} c", **options)
        record = validation_sha256(tmp_path / name)
        made.append((core.manifest["content_sha256"], record, [*map(len, sets)]))
        if form in SAME_NAMES:
            made[-1] += (images_sha256(*sets), sets[0].paths, sets[1].paths)
    assert made[0] == made[1]
    (files,) = open_data(forms["folder"][0], ("train",), Report())
    assert sets[0].status(0)[0] == len(sets[0].read(0)) == files.status(0)[0]
    assert (sets[0].status(0) == files.status(0)) is (form == "files")
    assert core.class_ids == ("n01 tench, Tinca", "straße_é", "東京")
    assert made[0][2] == [15, 6]


def test_a_run_goes_on_with_the_same_images_in_another_form(
    forms: dict[str, tuple[str, DataOptions]], train: Command, tmp_path: Path
) -> None:
    (folder, _), (tars, where) = forms["folder"], forms["shards"]
    words = ("coreset", "--out", tmp_path / "run", "--method", "random", "--factor", "1", *SMALL)
    begun = train(*words, "--data", folder).result
    again = train(*words, "--data", tars, "--val-data", str(where.val_data))
    assert again.result == begun
    assert "3 of" not in again.err
    patches = open_coreset(tmp_path / "run/coreset").manifest["provenance"]["patches"]
    assert patches[0]["image"].startswith("n01 tench, Tinca/00")


def test_a_fraction_is_split_off_by_names(
    forms: dict[str, tuple[str, DataOptions]], train: Command, tmp_path: Path
) -> None:
    """Not by order, seed, or form; the manifest tells the fraction."""
    tars, fraction = forms["shards"][0], DataOptions(val_fraction=0.4)
    sets = open_data(tars, ("train", "val"), Report(), fraction)
    assert [np.bincount(each.labels).tolist() for each in sets] == [[3, 3, 3], [2, 2, 2]]
    assert sorted(sets[0].paths + sets[1].paths) == sorted(
        open_data(tars, ("train",), Report())[0].paths
    )
    assert sets[1].paths == open_data(tars, ("val",), Report(), fraction)[0].paths
    assert sets[1].split == "val"
    plain = Path(forms["folder"][0]) / "train"
    of_folder = open_data(str(plain), ("val", "train"), Report(), fraction)
    assert [each.paths for each in of_folder] == [each.paths for each in sets[::-1]]
    assert images_sha256(*of_folder[::-1]) == images_sha256(*sets)
    numbers = [path[-7:-4] for path in sets[1].paths]
    assert numbers == ["001", "004", "001", "004", "001", "003"]  # of all versions
    words = ("--method", "random", "--factor", "1", "--val-fraction", "0.4", "--seed", "5", *SMALL)
    result = train("coreset", "--data", plain, "--out", tmp_path / "run", *words).result
    coreset = open_coreset(tmp_path / "run" / "coreset")
    assert coreset.settings["val_fraction"] == 0.4
    assert result["coresets"]["random"]["settings"]["val_fraction"] == 0.4
    used = {each["image"] for each in coreset.manifest["provenance"]["patches"]}
    assert used <= {*sets[0].paths}


def test_shards_alone_are_the_validation_images(
    forms: dict[str, tuple[str, DataOptions]],
) -> None:
    (folder, _), (tars, where) = forms["folder"], forms["shards"]
    accuracy = patchbloom.evaluate(scorer(), folder, size_px=32)
    assert 0 < accuracy < 100
    assert patchbloom.evaluate(scorer(), str(where.val_data), size_px=32) == accuracy
    plain = DataOptions(val_data=str(Path(folder) / "val"))
    (val,) = open_data(tars, ("val",), Report(), plain)
    assert (val.split, len(val)) == ("val", 6)


def test_our_own_exports_are_data(
    forms: dict[str, tuple[str, DataOptions]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": None, "device": "cpu", "size_px": 32}
    core = patchbloom.select(forms["folder"][0], ipc=1, out=tmp_path / "core", **options)
    opened = open_coreset(core.folder)
    export_coreset(opened, "webdataset", tmp_path / "tars")
    export_coreset(opened, "parquet", tmp_path / "parquet")
    from_tars = open_shards(str(tmp_path / "tars/train-*.tar"), "train", lambda *_: None)
    from_rows = open_rows(str(tmp_path / "parquet"), "train")
    assert from_tars.class_ids == from_rows.class_ids == opened.class_ids
    assert from_tars.labels.tolist() == from_rows.labels.tolist() == opened.labels_N.tolist()


def test_labels_of_shards(tmp_path: Path) -> None:
    """Numbers become padded folders; a class_id counts before all; shards may repeat their keys."""
    first = write_tar(tmp_path / "s-8.tar", [("a.jpg", b"1"), ("a.cls", b"3"), ("b.cls", b"12")])
    write_tar(tmp_path / "s-9.tar", [("a.cls", b" 3\n"), ("a.jpg", b"22"), ("a.txt", b"")])
    named = [("b.cls", b"1"), ("b.json", b'{"class_id": "12", "label": 4}'), ("b.x.jpg", b"1")]
    told = [("c.json", b'{"label": 12}'), ("c.cls", b"0"), ("c.jpg", b"333"), ("d.json", b"[]")]
    write_tar(tmp_path / "s-10.tar", [*named, *told])
    found = open_shards(str(tmp_path / "s-{8..10}.tar"), "val", lambda *_: None)
    assert found.paths == ("03/s-8_a.jpg", "03/s-9_a.jpg", "12/s-10_c.jpg")
    assert [found.read(index).tobytes() for index in range(3)] == [b"1", b"22", b"333"]
    assert [found.status(index)[0] for index in range(3)] == [1, 2, 3]
    assert found.status(0)[1] == first.stat().st_mtime_ns
    assert found.passed_over == (f"{tmp_path}/s-10.tar: b.x.jpg",)
    assert shard_files(str(tmp_path / "s-?.tar")) == tuple(
        f"{tmp_path}/s-{number}.tar" for number in (8, 9)
    )


def test_shards_are_indexed_once(tmp_path: Path) -> None:
    """By the first of the processes that open them together; others wait."""
    shard = write_tar(tmp_path / "s.tar", [(f"a/{k}.jpg", b"%d" % k) for k in range(5)])
    begun: list[tuple[int, ...]] = []

    def slowly(*done: int) -> None:
        begun.append(done)
        time.sleep(0.2)

    with ThreadPoolExecutor(4) as pool:
        opens = [pool.submit(open_shards, str(shard), "train", slowly) for _ in range(4)]
        found = [each.result() for each in opens]
    assert begun == [(1, 1)]
    assert all(each.paths == found[0].paths for each in found)
    (index,) = [
        path
        for path in (cache_folder() / "shards").glob("*.npz")
        if b"a/4.jpg" in path.read_bytes()
    ]
    index.write_bytes(index.read_bytes()[:-200])
    open_shards(str(shard), "train", lambda *done: begun.append(done))
    assert len(begun) == 2
    os.utime(shard, ns=(1, 1))
    assert open_shards(str(shard), "train", lambda *done: begun.append(done)).status(0)[1] == 1
    assert len(begun) == 3
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(InputError, match=r"s.tar was cut after it was opened"):
        found[0].read(4)


def test_a_damaged_image_is_named_with_what_holds_it(
    forms: dict[str, tuple[str, DataOptions]], tmp_path: Path
) -> None:
    good = rows(new_images(), "train")
    bytes_ = good[2]["image"]["bytes"]
    good[2]["image"]["bytes"] = bytes_[: len(bytes_) // 2]
    saved = tmp_path / "saved"
    dataset(good).save_to_disk(saved)
    members = [(f"a/{k}.x", b"") for k in range(2)] + [("a/b.png", b"no picture")]
    tar = write_tar(tmp_path / "t.tar", members)
    for images, place in (
        (open_rows(str(saved), "train"), f"{saved}, split train, row 2: n01 tench, Tinca/002.webp"),
        (open_shards(str(tar), "train", lambda *_: None), f"{tar}: a/b.png"),
    ):
        with pytest.raises(CorruptImageError) as told:
            list(stream_center(images, size_px=8))
        assert str(told.value).startswith(f"cannot decode {place}: it")
        assert "replace or remove the image" in str(told.value)
        stream = stream_center(images, size_px=8, skip_corrupt=True)
        assert sum(len(batch.labels_B) for batch in stream) == len(images) - 1


def broken(tmp_path: Path, how: str) -> Path:
    members = [(f"a/{k}.png", bytes(700)) for k in range(3)]
    path = write_tar(tmp_path / "s.tar", members)
    content = path.read_bytes()
    if how == "cut in a member":
        path.write_bytes(content[:2500])
    elif how == "cut between members":
        path.write_bytes(content[: 3 * 1536])
    elif how == "damaged header":
        path.write_bytes(content[:1536] + b"x" * 512 + content[2048:])
    elif how == "compressed":
        path.write_bytes(b"\x1f\x8b" + content)
    return path


@pytest.mark.parametrize(
    ("how", "member"),
    [
        ("cut in a member", "in or after member a/1.png"),
        ("cut between members", "in or after member a/2.png"),
        ("damaged header", "in or after member a/0.png"),
        ("compressed", "from the start"),
    ],
)
def test_a_broken_shard_is_refused(train: Command, tmp_path: Path, how: str, member: str) -> None:
    path = broken(tmp_path, how)
    before = {*(cache_folder() / "shards").glob("*.npz")}
    words = ("--out", tmp_path / "run", "--val-fraction", "0.5", "--method", "random")
    error = train("--data", path, *words).error
    assert f"{path}: cut, damaged or compressed {member}: give a whole tar file" in error
    assert not (tmp_path / "run").exists()
    assert {*(cache_folder() / "shards").glob("*.npz*")} == before


def refused(folder: Path, kind: str) -> tuple[tuple[Any, ...], str]:
    """Words for `train`, and what the error says."""
    image = next(iter(new_images().values()))
    row = {"image": {"bytes": image, "path": "a.png"}, "label": 0}
    number = datasets.Value("int64")
    made = folder / "made"
    match kind:
        case "no label":
            dataset([row, {**row, "label": -1}], number).save_to_disk(made)
            return (made,), f"{made}, split train, row 1: -1 is no label: give images with labels"
        case "no column of labels":
            dataset([row]).remove_columns("label").save_to_disk(made)
            return (made,), f"{made}, split train: no column of labels, it has image: give"
        case "no column of images":
            dataset([row]).remove_columns("image").save_to_disk(made)
            return (made,), f"{made}, split train: no column of images, it has label"
        case "no image":
            missing = {"image": {"bytes": None, "path": None}, "label": 0}
            untyped = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            features = datasets.Features(image=untyped, label=number)
            datasets.Dataset.from_list([row, missing], features=features).save_to_disk(made)
            return (made,), "split train, row 1: there is no image in it: remove the row"
        case "no split":
            datasets.DatasetDict(train=dataset([row])).save_to_disk(made)
            return (made,), f"{made}: no split validation or valid or val or test in it, it has"
        case "collision":
            names = datasets.ClassLabel(names=["a/b", "a_b"])
            dataset([row, {**row, "label": 1}], names).save_to_disk(made)
            return (made,), "classes 'a/b' and 'a_b' would both be in folder 'a_b': rename one"
        case "hidden class":
            dataset([row], datasets.ClassLabel(names=[".."])).save_to_disk(made)
            return (made,), "class '..' cannot be a folder name: rename the class"
        case "no tar label":
            tar = write_tar(folder / "s.tar", [("a.png", image)])
            return (tar, "--val-data", tar), f"{tar}: no images with a class in it"
        case "bad tar label":
            tar = write_tar(folder / "s.tar", [("a.png", image), ("a.cls", b"-1")])
            told = f"{tar}: member a.cls: no name or number of a class: give images with labels"
            return (tar, "--val-data", tar), told
        case "one split":
            tar = write_tar(folder / "s.tar", [("a/a.png", image)])
            return (tar,), f"{tar}: these shards are one split: give --val-data or --val-fraction"
        case "missing shard":
            write_tar(folder / "s-0.tar", [])
            told = f"s-{{0..2}}.tar: 2 of 3 files are not there, first {folder}/s-1.tar: give tar"
            return (folder / "s-{0..2}.tar", "--val-data", "shapes"), told
        case "two parts":
            words = ("--val-data", "x", "--val-fraction", "0.1")
            return ("shapes", *words), "--val-data and --val-fraction: give one of them"
        case "whole":
            return ("shapes", "--val-fraction", "1"), "--val-fraction 1: expected more than 0, less"
        case "single image":
            (folder / "d/a").mkdir(parents=True)
            (folder / "d/a/a.png").write_bytes(image)
            words = (folder / "d", "--val-fraction", "0.1")
            return words, f"--val-fraction: class 'a' of {folder}/d has a single image"
        case "own validation":
            words = ("shapes", "--shapes-per-class", "2", "--val-fraction", "0.1")
            return words, "--val-fraction: shapes has validation images: leave it out"
        case "torchvision":
            told = "--data torchvision:Food101: expected one of CIFAR10, CIFAR100, FashionMNIST, "
            return ("torchvision:Food101",), told
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("no label", "no column of labels", "no column of images", "no image", "no split"),
        *("collision", "hidden class", "no tar label", "bad tar label", "one split"),
        *("missing shard", "two parts", "whole", "single image", "own validation", "torchvision"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(train: Command, tmp_path: Path, kind: str) -> None:
    words, told = refused(tmp_path, kind)
    error = train("--out", tmp_path / "run", "--method", "random", "--data", *words).error
    assert told in error
    assert not (tmp_path / "run").exists()


def test_an_unlabelled_test_split_leaves_room_for_a_fraction(tmp_path: Path) -> None:
    found, number = rows(new_images(), "train"), datasets.Value("int64")
    unlabelled = dataset([{**row, "label": -1} for row in found], number)
    splits = {"train": dataset(found, number), "test": unlabelled}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    options = DataOptions(val_fraction=0.2)
    train, val = open_data(str(tmp_path / "d"), ("train", "val"), Report(), options)
    assert (len(train), len(val), train.class_ids) == (12, 3, ("0", "1", "2"))


def test_an_image_folder_may_hold_parquet(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "a.png").write_bytes(b"1")
    (tmp_path / "features.parquet").touch()
    sets = open_data(str(tmp_path), ("train", "val"), Report())
    assert [each.paths for each in sets] == [("a/a.png",), ("a/a.png",)]


def test_a_hub_out_of_reach(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    words = ("--out", tmp_path / "run", "--method", "random", "--data")
    error = train(*words, "hf:nobody/nothing:small").error
    assert "hf:nobody/nothing:small cannot be opened (Couldn't reach 'nobody/nothing'" in error
    assert "`hf download nobody/nothing --repo-type dataset --local-dir DIR`" in error
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    error = train(*words, "hf:nobody/nothing").error
    assert "`datasets` is not installed: pip install 'patchbloom[data]'" in error
    assert not (tmp_path / "run").exists()


def write_fashion(root: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """The four files of FashionMNIST, with few images."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for name, count in counts.items():
        pixels[name] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels[name].tobytes())
        labels = bytes(k % 10 for k in range(count))
        head = struct.pack(">II", 2049, count)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels)
    return pixels


def test_a_set_of_torchvision_is_written_once(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_fashion(tmp_path, {"train": 120, "t10k": 20})
    options = DataOptions(root=tmp_path)
    sets = open_data("torchvision:FashionMNIST", ("train", "val"), Report(), options)
    assert [len(each) for each in sets] == [120, 20]
    assert sets[0].class_ids[-3:] == ("Sneaker", "T-shirt_top", "Trouser")
    assert sets[0].paths[108:110] == ("Trouser/001.png", "Trouser/011.png")
    assert np.array_equal(Image.open(sets[0].place(108)), pixels["train"][1])
    assert np.array_equal(Image.open(sets[1].place(0)), pixels["t10k"][9])
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", None)
    again = open_data("torchvision:FashionMNIST", ("val",), Report(), options)
    assert again[0].root == sets[1].root


def test_a_root_without_torchvision(train: Command, tmp_path: Path) -> None:
    error = train("--data", "shapes", "--root", tmp_path, "--out", tmp_path / "run").error
    assert f"--root {tmp_path}: only torchvision:NAME has one: leave it out" in error


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte.gz, "),
        ("CIFAR10", "cifar-10-python.tar.gz there"),
    ],
)
def test_a_set_that_cannot_be_downloaded(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: str
) -> None:
    def urlopen(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    words = ("--root", tmp_path / "root", "--out", tmp_path / "run", "--method", "random")
    error = train("--data", f"torchvision:{name}", *words).error
    assert f"torchvision:{name} is not in {tmp_path}/root and cannot be downloaded (" in error
    assert f"put {files}" in error
    assert not (tmp_path / "run").exists()
    assert not [*cache_folder().glob(f"*torchvision-{name}*")]
