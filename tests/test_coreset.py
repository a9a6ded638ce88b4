"""The coreset folder: read as written, whole or absent; every change is found and named."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import LabelBlock, label_online, write_labelled
from patchbloom.engine.cli import main
from patchbloom.engine.coreset import coreset as coreset_module
from patchbloom.engine.coreset.coreset import attach_labels, open_coreset
from patchbloom.engine.coreset.manifest import spelled
from patchbloom.engine.data.names import display_names, imagenet_names
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.labels.codecs import decode_topk, encode_topk
from patchbloom.engine.labels.stored import SoftLabels
from PIL import Image

IDS = ("n01440764", "with space", "zebra")
SETTINGS = {
    "method": "dace",
    "seed": 3,
    "image_size_px": 16,
    "factor": 2,
    "patch_px": 8,
    "ipc": 1,
}
PATCHES = torch.randint(
    0, 256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def _write(folder: Path, labels: LabelBlock | None = None, **changed):
    arguments = {
        "patches_NHWC": PATCHES,
        "class_ids": IDS,
        "class_names": ("tench", "with space", "zebra"),
        "settings": SETTINGS,
        "model": {"name": "sdxl-tiny", "weights_bytes": 1000},
        "provenance": {"command": "train", "time": time.time()},
    }
    return write_labelled(folder, labels, **{**arguments, **changed})


def _logits(epochs: int = 2, samples: int = 12, classes: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 4 * torch.randn(epochs, samples, classes, generator=generator)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    opened = open_coreset(tmp_path / "c")
    assert torch.equal(opened.patches(), PATCHES)
    assert opened.labels_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert opened.class_ids == IDS
    assert opened.class_names == ("tench", "with space", "zebra")
    assert opened.settings == SETTINGS
    assert opened.soft_labels() is None
    assert os.listdir(tmp_path) == ["c"]


def test_patches_are_a_plain_image_folder(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(tmp_path / "c" / "patches"))
    assert images.classes == sorted(IDS)
    assert [label for _, label in images.samples] == [0] * 4 + [1] * 4 + [2] * 4
    for row, (picture, _) in enumerate(images):
        np.testing.assert_array_equal(np.array(picture), PATCHES[row])
    everything = [path for path in (tmp_path / "c" / "patches").rglob("*") if path.is_file()]
    assert len(everything) == len(images)
    assert {path.suffix for path in everything} == {".png"}


def test_content_hash_names_content_and_not_its_making(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", provenance={"time": 1.0, "host": "x"})
    second = _write(tmp_path / "b", provenance={"time": 2.0})
    assert first.content_sha256 == second.content_sha256
    changed = PATCHES.clone()
    changed[0, 0, 0, 0] ^= 1
    others = [
        _write(tmp_path / "d", patches_NHWC=changed),
        _write(tmp_path / "e", settings={**SETTINGS, "seed": 4}),
        _write(tmp_path / "f", class_names=("tench", "with space", "horse")),
        _write(tmp_path / "g", model=None),
        _write(tmp_path / "h", teacher={"architecture": "resnet18"}),
        _write(tmp_path / "i", labels=LabelBlock(codec="dense", logits=_logits())),
    ]
    hashes = {first.content_sha256, *(other.content_sha256 for other in others)}
    assert len(hashes) == 1 + len(others)


def test_every_changed_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    _write(folder, labels=LabelBlock(codec="dense", logits=_logits()))
    open_coreset(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(CoresetError, match=path.name):
                open_coreset(folder)
        path.write_bytes(data[:-1])
        with pytest.raises(CoresetError, match=path.name):
            open_coreset(folder)
        path.unlink()
        with pytest.raises(CoresetError, match=path.name if path.suffix != ".json" else "manifest"):
            open_coreset(folder)
        path.write_bytes(data)
    open_coreset(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_byte_of_the_manifest_can_change(tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-coreset"
    if not folder.exists():
        _write(folder, provenance={"note": "a b", "pi": 3.14})
    raw = (folder / "manifest.json").read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != raw[place]))
    other = folder.parent / "changed-coreset"
    other.mkdir(exist_ok=True)
    (other / "manifest.json").write_bytes(raw[:place] + bytes([byte]) + raw[place + 1 :])
    with pytest.raises(CoresetError):
        open_coreset(other, verify=False)


def test_a_stray_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    _write(folder)
    (folder / "patches" / "zebra" / "extra.png").write_bytes(b"")
    with pytest.raises(CoresetError, match=r"extra\.png is not part of this coreset"):
        open_coreset(folder)


def test_a_stray_class_folder_is_refused(tmp_path: Path) -> None:
    """Even an empty one shifts the class indices of an ImageFolder."""
    folder = tmp_path / "c"
    _write(folder)
    (folder / "patches" / "aardvark").mkdir()
    with pytest.raises(CoresetError, match="aardvark is not part of this coreset"):
        open_coreset(folder)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    with pytest.raises(CoresetError, match="cannot be a folder name"):
        _write(tmp_path / "c", class_ids=("../a", "b", "c"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"class_ids": ("b", "a", "c")}, "sorted"),
        ({"class_ids": ("a", "a", "c")}, "unique"),
        ({"patches_NHWC": PATCHES[:11]}, "4 of each of 3 classes"),
        ({"patches_NHWC": PATCHES.float()}, "expected uint8"),
        ({"patches_NHWC": PATCHES[:, :4]}, r"expected uint8 \[12, 8, 8, 3\]"),
        ({"settings": {**SETTINGS, "folder": Path()}}, "plain JSON"),
        ({"model": {"loss": float("nan")}}, "plain JSON"),
    ],
)
def test_contradicting_arguments_are_refused(tmp_path: Path, changed: dict, told: str) -> None:
    with pytest.raises(CoresetError, match=told):
        _write(tmp_path / "c", **changed)
    assert os.listdir(tmp_path) == []


def test_labels_of_other_classes_are_refused(tmp_path: Path) -> None:
    block = LabelBlock(codec="dense", logits=_logits(classes=4))
    with pytest.raises(CoresetError, match="expected 3 classes"):
        _write(tmp_path / "c", labels=block)
    assert open_coreset(tmp_path / "c").soft_labels() is None


def test_overwrite_replaces_a_coreset_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    old = _write(folder)  # an empty folder may be used
    with pytest.raises(CoresetError, match="not empty: choose another --out, or --overwrite"):
        _write(folder)
    new = _write(folder, settings={**SETTINGS, "seed": 4}, overwrite=True)
    assert open_coreset(folder).content_sha256 == new.content_sha256 != old.content_sha256
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CoresetError, match=r"thesis\.tex"):
        _write(folder, overwrite=True)
    (folder / "thesis.tex").rename(folder / "patches" / "zebra" / "my zebra.png")
    with pytest.raises(CoresetError, match=r"my zebra\.png"):
        _write(folder, overwrite=True)
    (folder / "patches" / "zebra" / "my zebra.png").unlink()
    damaged = folder / "patches" / "zebra" / "000000.png"
    damaged.write_bytes(b"")
    _write(folder, overwrite=True)
    assert damaged.stat().st_size
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "manifest.json").write_text("{}")
    with pytest.raises(CoresetError, match="is not a coreset"):
        _write(photos, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["c", "photos"]


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", ["write_png", "write_durably"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    monkeypatch.setattr(coreset_module, writer, _full_disk)
    with pytest.raises(
        OSError, match=r"no space left for .*c: it needs up to .* MiB; free"
    ) as told:
        _write(tmp_path / "c")
    assert "\n" not in str(told.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_replacing_keeps_the_old_coreset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _write(tmp_path / "c")
    monkeypatch.setattr(coreset_module, "write_png", _full_disk)
    with pytest.raises(OSError, match="no space left"):
        _write(tmp_path / "c", settings={**SETTINGS, "seed": 4}, overwrite=True)
    assert open_coreset(tmp_path / "c").content_sha256 == old.content_sha256
    monkeypatch.undo()
    monkeypatch.setattr(coreset_module, "write_label_file", _full_disk)
    with pytest.raises(OSError, match="no space left"):
        attach_labels(tmp_path / "c", LabelBlock(codec="dense", logits=_logits()))
    assert open_coreset(tmp_path / "c").content_sha256 == old.content_sha256


def test_the_second_of_two_writers_leaves_the_first_ones_coreset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png, wrote = coreset_module.write_png, []

    def write_after_another(path: Path, patch_HWC: np.ndarray) -> None:
        if not wrote:
            wrote.append(path)
            shutil.copytree(other, tmp_path / "c")
        write_png(path, patch_HWC)

    other = _write(tmp_path / "other", settings={**SETTINGS, "seed": 4}).folder
    monkeypatch.setattr(coreset_module, "write_png", write_after_another)
    with pytest.raises(FileExistsError, match="another process wrote it; use what it wrote, or"):
        _write(tmp_path / "c")
    assert open_coreset(tmp_path / "c").settings["seed"] == 4
    assert sorted(os.listdir(tmp_path)) == ["c", "other"]


KILLED_WRITES = """
import json, os, signal, sys, torch
from pathlib import Path
from label_cases import LabelBlock
from patchbloom.engine.coreset import coreset
from patchbloom.export import durable

def write_and_label(folder, kill_at):
    calls = 0
    def counted(function):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call
    for owner, name in (
        (coreset, "write_png"), (coreset, "write_label_file"), (coreset, "write_durably"),
        (durable, "write_durably"), (os, "replace"), (os, "rename"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    if not folder.exists():
        coreset.write_coreset(
            folder,
            patches_NHWC=torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
            class_ids=["a", "b"], class_names=["a", "b"],
            settings=dict(method="random", seed=0, image_size_px=8, factor=1, patch_px=8, ipc=1),
            provenance={},
        )
    for value in (torch.zeros, torch.ones):
        coreset.attach_labels(folder, LabelBlock(codec="dense", logits=value(1, 2, 2)))

def what_opens(folder):
    if not folder.exists():
        return "absent"
    labels = coreset.open_coreset(folder).soft_labels()
    return "unlabelled" if labels is None else labels.targets(0, [0]).labels.tolist()

def in_a_process_of_its_own(folder, kill_at):
    child = os.fork()
    if child == 0:
        write_and_label(folder, kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

outcomes = []
for kill_at in range(1, 100):
    folder = Path(sys.argv[1]) / f"c{kill_at}"
    code = in_a_process_of_its_own(folder, kill_at)
    left = what_opens(folder)
    again = in_a_process_of_its_own(folder, 0)
    outcomes.append((code, left, again, what_opens(folder)))
    if code == 0:
        break
print(json.dumps(outcomes))
"""


def test_a_killed_write_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """Kill -9 before each step: whatever opens is whole, and the next run completes it."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED_WRITES, tmp_path],
        **{"cwd": Path(__file__).parent, "capture_output": True, "text": True},
    )
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    codes = [code for code, _, _, _ in outcomes]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    zeros, ones = [[0.0, 0.0]], [[1.0, 1.0]]
    stages = [stage for stage, _ in itertools.groupby(left for _, left, _, _ in outcomes)]
    assert stages == ["absent", "unlabelled", zeros, "unlabelled", ones]
    assert all((again, then) == (0, ones) for _, _, again, then in outcomes)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_dense_labels_keep_fp16_logits(tmp_path: Path) -> None:
    logits = _logits()
    _write(tmp_path / "c")
    unlabelled = open_coreset(tmp_path / "c").content_sha256
    attach_labels(
        tmp_path / "c",
        LabelBlock(codec="dense", logits=logits, temperature=4.0),
        provenance={"labelled": "later"},
    )
    opened = open_coreset(tmp_path / "c")
    assert opened.content_sha256 != unlabelled
    assert set(opened.manifest["provenance"]) == {"command", "time", "labelled"}
    labels = opened.soft_labels()
    assert labels is not None
    assert (labels.epochs, labels.samples, labels.classes) == (2, 12, 3)
    for epoch in (1, 0):
        rows = torch.tensor([11, 0, 5])
        expected = logits[epoch, rows].half().float()
        assert torch.equal(labels.targets(epoch, rows).labels.float(), expected)
        assert torch.equal(labels.probabilities(epoch, rows), (expected / 4.0).softmax(1))
    with pytest.raises(CoresetError, match=r"expected an epoch in 0\.\.1, got 2"):
        labels.targets(2, [0])
    sizes = opened.bytes()
    assert sizes["labels"] == (tmp_path / "c" / "labels.safetensors").stat().st_size
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    manifest = next(path for path in files if path.name == "manifest.json")
    without = json.loads(manifest.read_text()) | {"provenance": {}}
    saved = manifest.stat().st_size - len(spelled(without))  # provenance, useless to a student
    assert saved > 0
    assert sizes["with_labels"] == sum(path.stat().st_size for path in files) - saved
    assert sizes["with_generator"] == sizes["with_labels"] + 1000
    label_online(tmp_path / "c")
    assert open_coreset(tmp_path / "c").soft_labels() is None


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(3, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 3000.0]),
    temperature=st.sampled_from([0.5, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_topk_labels_keep_the_largest_and_spread_the_rest(
    classes: int, scale: float, temperature: float, seed: int
) -> None:
    k = (classes - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    logits_NK = scale * torch.randn(5, classes, generator=generator)
    probabilities_Nk, classes_Nk = encode_topk(logits_NK, k=k, temperature=temperature)
    assert probabilities_Nk.dtype == torch.float16
    assert classes_Nk.dtype == torch.int16
    decoded_NK = decode_topk(probabilities_Nk, classes_Nk, classes)
    exact_NK = (logits_NK / temperature).softmax(1)
    torch.testing.assert_close(decoded_NK.sum(1), torch.ones(5))
    kept = classes_Nk.long()
    torch.testing.assert_close(
        decoded_NK.gather(1, kept), exact_NK.gather(1, kept), atol=1e-3, rtol=2e-3
    )
    rest_NK = decoded_NK.scatter(1, kept, torch.nan)
    for row in rest_NK:
        others = row[~row.isnan()]
        assert float(others.max() - others.min()) == 0.0
    if scale == 0.0:
        assert classes_Nk.tolist() == [list(range(k))] * 5  # ties keep the lower class


def _stored(folder: Path, block: LabelBlock) -> SoftLabels:
    _write(folder, labels=block)
    labels = open_coreset(folder).soft_labels()
    assert labels is not None
    return labels


def test_topk_labels_are_stored_and_read(tmp_path: Path) -> None:
    logits = _logits()
    block = LabelBlock(codec="topk", logits=logits, k=1, temperature=2.0)
    labels = _stored(tmp_path / "c", block)
    expected = decode_topk(*encode_topk(logits[1], k=1, temperature=2.0), 3)
    assert torch.equal(labels.probabilities(1, range(12)), expected)


def test_labels_in_principal_components_are_stored_and_read(tmp_path: Path) -> None:
    logits = _logits()
    block = LabelBlock(codec="pca", logits=logits, k=2, temperature=2.0)
    labels = _stored(tmp_path / "c", block)
    centred = logits[1] - logits[1].mean(1, keepdim=True)
    torch.testing.assert_close(
        labels.targets(1, range(12)).labels.float(), centred, rtol=0, atol=0.05
    )
    close = {"rtol": 0, "atol": 0.02}
    expected = (logits[1] / 2.0).softmax(1)
    torch.testing.assert_close(labels.probabilities(1, range(12)), expected, **close)
    size = (tmp_path / "c" / "labels.safetensors").stat().st_size
    assert size < 2 * 12 * 2 + 3 * 3 * 4 + 200


@pytest.mark.parametrize("codec", ["dense", "topk"])
def test_recognised_counts_the_rows_whose_answer_is_their_class(codec, tmp_path: Path) -> None:
    logits = torch.zeros(2, 12, 3)
    logits[1, torch.arange(12), torch.arange(12) // 4] = 1.0  # four rows of each class
    logits[1, [0, 5], [2, 2]] = 2.0
    labels = _stored(tmp_path / "c", LabelBlock(codec=codec, logits=logits, k=1))
    assert labels.recognised(1) == pytest.approx(100 * 10 / 12)
    assert labels.recognised(0) == pytest.approx(100 * 4 / 12)  # ties: the first class


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"codec": "topk", "logits": _logits(classes=4), "k": 2}, "2k < 4"),
        ({"codec": "pca", "logits": _logits(classes=4), "k": 4}, "got k=4: 3 keep everything"),
        ({"codec": "pickle", "logits": _logits()}, "expected dense, topk, pca or none"),
    ],
)
def test_labels_that_cannot_be_stored_are_refused(arguments: dict, told: str) -> None:
    with pytest.raises(CoresetError, match=told):
        LabelBlock(**arguments)


@pytest.mark.parametrize(
    ("codec", "bad"),
    [
        ("dense", float("nan")),
        ("dense", float("inf")),
        ("dense", 1e6),
        ("topk", float("nan")),
        ("topk", float("inf")),
        ("pca", float("nan")),
        ("pca", 1e6),
    ],
)
def test_logits_that_no_codec_can_hold_are_refused(tmp_path: Path, codec, bad: float) -> None:
    logits = _logits()
    logits[0, 0, 0] = bad
    with pytest.raises(CoresetError, match="NaN or infinity"):
        _write(tmp_path / "c", labels=LabelBlock(codec=codec, logits=logits, k=1))
    assert open_coreset(tmp_path / "c").soft_labels() is None


def test_engine_coreset_info_verify_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    written = _write(folder)

    assert main(["coreset", "info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["content_sha256"] == written.content_sha256
    assert told["classes"] == {"n01440764": "tench", "with space": "with space", "zebra": "zebra"}
    assert any("n01440764: tench" in line for line in lines[:-1])

    assert main(["coreset", "verify", str(folder), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["verified"] is True
    run = tmp_path / "run"  # is as good as RUN/coreset
    _write(run / "coreset")
    for command in ("info", "show --patches-per-class 1", "export --to imagefolder --out EXPORT"):
        words = command.replace("EXPORT", str(tmp_path / "export")).split()
        assert main(["coreset", words[0], str(run), *words[1:]]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["coreset"] in (str(run / "coreset"), written.content_sha256)
    assert (tmp_path / "run.png").is_file()

    assert main(["coreset", "show", str(folder), "--out", str(tmp_path / "sheet.png")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert list(sheet.size) == told["size_px"]
        pixels = np.array(sheet)
    first = np.kron(PATCHES[0].numpy(), np.ones((6, 6, 1), dtype=np.uint8))  # 8 px, shown at 48
    found = [
        (top, left)
        for top in range(pixels.shape[0] - 48)
        for left in range(pixels.shape[1] - 48)
        if (pixels[top, left] == first[0, 0]).all()
        and (pixels[top : top + 48, left : left + 48] == first).all()
    ]
    assert len(found) == 1
    with monkeypatch.context() as patch:
        patch.setattr("patchbloom.export.durable.write_durably", _full_disk)
        assert main(["coreset", "show", str(folder)]) == 2
    assert f"no space left for {folder}.png: it needs" in capsys.readouterr().err
    assert main(["coreset", "show", str(folder)]) == 0
    assert (tmp_path / "c.png").is_file()
    open_coreset(folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("coreset info FOLDER/nope", "is not a coreset: no such folder"),
        ("coreset verify FOLDER", "has no manifest.json"),
        ("coreset show FOLDER/c --out FOLDER/c/sheet.png", "holds its own files only"),
        ("coreset show FOLDER/c --out FOLDER/sheet.jpg", "ends in .png"),
        ("coreset show FOLDER/c --out FOLDER/nope/sheet.png", "No such file"),
        ("coreset show FOLDER/c --patches-per-class 0", "expected at least 1, got 0"),
        ("coreset show FOLDER/c --patches-per-class few", "few"),
        ("coreset info", "engine coreset info needs FOLDER"),
        ("coreset paint FOLDER/c", "paint"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    _write(tmp_path / "c")
    assert main(arguments.replace("FOLDER", str(tmp_path)).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("engine: error: ")
    assert told in line
    assert "tyro" not in line


def test_imagenet_names_are_right() -> None:
    names = imagenet_names()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    imagenette = {
        "n01440764": "tench",
        "n02102040": "English springer",
        "n02979186": "cassette player",
        "n03000684": "chain saw",
        "n03028079": "church",
        "n03394916": "French horn",
        "n03417042": "garbage truck",
        "n03425413": "gas pump",
        "n03445777": "golf ball",
        "n03888257": "parachute",
    }
    imagewoof = {
        "n02086240": "Shih-Tzu",
        "n02087394": "Rhodesian ridgeback",
        "n02088364": "beagle",
        "n02089973": "English foxhound",
        "n02093754": "Border terrier",
        "n02096294": "Australian terrier",
        "n02099601": "golden retriever",
        "n02105641": "Old English sheepdog",
        "n02111889": "Samoyed",
        "n02115641": "dingo",
    }
    for expected in (imagenette, imagewoof):
        assert dict(zip(expected, display_names(tuple(expected)), strict=True)) == expected


def test_class_names_come_from_the_file_the_map_or_the_folder(tmp_path: Path) -> None:
    ids = ("n01440764", "red_fox", "tree-frog")
    assert display_names(ids) == ("tench", "red fox", "tree frog")
    lines = tmp_path / "names.txt"
    lines.write_text("n01440764 a fish\nred_fox\tfox, red\ntree-frog frog\nother thing\n")
    assert display_names(ids, lines) == ("a fish", "fox, red", "frog")
    as_json = tmp_path / "names.json"
    as_json.write_text(json.dumps({"n01440764": "a fish", "red_fox": "fox", "tree-frog": "frog"}))
    assert display_names(ids, as_json) == ("a fish", "fox", "frog")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("red_fox fox\n", "1 missing, first 'tree-frog'"),
        ("red_fox fox\nred_fox wolf\ntree-frog frog\n", "named twice"),
        ("red_fox\n", "expected a line 'id name'"),
        ('{"red_fox": 3}', "expected a name, got 3"),
        ('{"red_fox": ', "expected a JSON object"),
        (None, "no such file"),
    ],
)
def test_a_bad_class_names_file_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "names.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=told):
        display_names(("red_fox", "tree-frog"), path)


def test_a_wordnet_id_never_becomes_a_prompt() -> None:
    with pytest.raises(ValueError, match=r"n99999999.*--class-names FILE"):
        display_names(("n99999999",))


@pytest.mark.parametrize("linked", ["manifest.json", "patches/zebra", "patches/zebra/000000.png"])
def test_a_coreset_with_a_link_in_it_is_refused(tmp_path: Path, linked: str) -> None:
    """Even where what it leads to has the right bytes."""
    folder = tmp_path / "c"
    _write(folder)
    (folder / linked).rename(tmp_path / "moved")
    (folder / linked).symlink_to(tmp_path / "moved")
    for verify in (True, False):
        with pytest.raises(CoresetError, match=f"{linked} is a symbolic link, and a coreset holds"):
            open_coreset(folder, verify=verify)


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    "damaged",
    [claiming(20_000, 20_000), claiming(10_000, 10_000), claiming(8, 8)[:40], b""],
    ids=["400 megapixels", "100 megapixels", "cut", "empty"],
)
def test_a_damaged_image_is_named_in_one_line(
    tmp_path: Path, damaged: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    _write(tmp_path / "c")
    path = tmp_path / "c" / "patches" / "zebra" / "000000.png"
    path.write_bytes(damaged)
    with pytest.raises(CoresetError, match=f"^{path}.* make the coreset again") as caught:
        open_coreset(tmp_path / "c", verify=False).patches()
    assert "\n" not in str(caught.value)
    assert not recwarn
