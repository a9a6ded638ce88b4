"""Networks by name, and teachers: trained, resumed, loaded or refused."""

from __future__ import annotations

import json
import pickle
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.engine.data.names import imagenet_names
from patchbloom.train.config import (
    MOST_STUDENTS,
    TeacherConfig,
    doping_seed,
    student_seeds,
    teacher_start,
)
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.networks import adamw, build_network, draws_in_training
from patchbloom.train.run.checkpoint import (
    CheckpointError,
    read_tensors,
    weights_sha256,
    write_tensors,
)
from patchbloom.train.teacher.evaluation import evaluate
from patchbloom.train.teacher.given import load_teacher
from patchbloom.train.teacher.normalisation import IMAGENET, Normalisation
from patchbloom.train.teacher.teacher import Teacher
from patchbloom.train.teacher.training import (
    CHECKPOINT,
    TEACHER,
    train_teacher,
    training_losses,
)
from PIL import Image
from torch import nn

CONFIG = TeacherConfig(network="convnet-d3-w8", size_px=32, epochs=3, batch=16, device="cpu")
IDS = ("a", "b", "c")


class Silent:
    """A Report that keeps the curves and stops the training at step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.curves: dict[str, list[float]] = {}
        self.stop_at = stop_at

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None:
        if self.stop_at is not None and done == self.stop_at * CONFIG.batch:
            raise KeyboardInterrupt

    def scalar(self, tag: str, step: int, value: float) -> None:
        self.curves.setdefault(tag, []).append(value)

    def say(self, line: str) -> None: ...


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    root = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(root, train_per_class=8, val_per_class=4)
    return open_image_set(root, "train"), open_image_set(root, "val")


def _teacher(size_px: int = 32, classes: int = 3, **options) -> Teacher:
    torch.manual_seed(0)
    network = build_network("convnet-d3-w8", classes, size_px)
    ids = [chr(ord("a") + index) for index in range(classes)]
    return Teacher(network, architecture="convnet-d3-w8", class_ids=ids, size_px=size_px, **options)


@pytest.mark.parametrize(
    ("name", "size_px"),
    [
        ("convnet-d3", 32),
        ("convnet-d4-w24to96-bn", 64),
        ("convnet-d4-w8-in", 32),
        ("convnet-d5-w8-none", 32),
        ("resnet18", 32),
        ("vgg11", 32),
        ("alexnet", 32),
        ("vit-s", 32),
        ("torchvision:squeezenet1_1", 64),
    ],
)
def test_networks_answer_and_learn_at_their_size(name: str, size_px: int) -> None:
    network = build_network(name, 7, size_px).train()
    logits = network(torch.randn(2, 3, size_px, size_px))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_a_convnet_has_the_widths_and_the_norm_of_its_name() -> None:
    network = build_network("convnet-d4-w24to96-bn", 10, 64)
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [24, 48, 72, 96]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 4
    default = build_network("convnet-d3", 10, 32)
    assert {m.out_channels for m in default.modules() if isinstance(m, nn.Conv2d)} == {128}


def test_a_small_image_resnet_keeps_the_resolution_in_its_stem() -> None:
    small, large = build_network("resnet18", 10, 64), build_network("resnet18", 10, 224)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "size_px", "expected"),
    [
        ("resnet19", 64, "resnet18"),
        ("convnet-d9", 64, "convnet-d{3,4,5}"),
        ("torchvision:nothing", 64, "resnet50"),
        ("convnet-d5", 16, "at least 32 px"),
        ("vit-s", 50, "multiple of 4 px"),
        ("torchvision:vit_b_16", 50, "50 px"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(name: str, size_px: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("{", r"\{")) as caught:
        build_network(name, 10, size_px)
    assert "\n" not in str(caught.value)


def test_dropout_is_found_wherever_it_is() -> None:
    assert draws_in_training(build_network("torchvision:squeezenet1_1", 3, 64))
    assert draws_in_training(nn.MultiheadAttention(8, 2, dropout=0.1))
    assert not draws_in_training(build_network("vit-s", 3, 32))
    assert not draws_in_training(build_network("alexnet", 3, 32))


def test_weight_decay_spares_one_dimensional_parameters() -> None:
    decayed, spared = adamw(build_network("convnet-d3-w8", 3, 32), 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}


def test_training_learns_and_tells(sets, tmp_path: Path) -> None:
    report = Silent()
    teacher = train_teacher(*sets, CONFIG, tmp_path, report)
    losses = report.curves["teacher/loss"]
    assert len(losses) == CONFIG.epochs
    assert losses[-1] < losses[0]
    assert report.curves["teacher/accuracy"] == [teacher.accuracy]
    assert (tmp_path / TEACHER).is_file()
    assert not (tmp_path / CHECKPOINT).exists()
    json.dumps(teacher.describe(), allow_nan=False)


def test_a_killed_training_resumes_to_the_same_weights(sets, tmp_path: Path) -> None:
    report = Silent()
    whole = train_teacher(*sets, CONFIG, tmp_path / "whole", report)
    steps = len(sets[0]) // CONFIG.batch
    for stop_at in (2, steps + 2, 3 * steps):
        with pytest.raises(KeyboardInterrupt):
            train_teacher(*sets, CONFIG, tmp_path / "killed", Silent(stop_at))
    resumed = train_teacher(*sets, CONFIG, tmp_path / "killed", Silent())
    assert resumed.sha256 == whole.sha256
    assert resumed.accuracy == whole.accuracy
    assert training_losses(tmp_path / "killed") == report.curves["teacher/loss"]
    other = train_teacher(*sets, replace(CONFIG, seed=1), tmp_path / "other", Silent())
    assert other.sha256 != whole.sha256


def test_no_student_starts_where_its_teacher_did(sets, tmp_path: Path) -> None:
    still = replace(CONFIG, epochs=1, learning_rate=1e-9, weight_decay=0.0)
    for seed in (0, 7):
        train_teacher(*sets, replace(still, seed=seed), tmp_path / str(seed), Silent())
        tensors, _ = read_tensors(tmp_path / str(seed) / TEACHER)
        name = next(name for name, value in tensors.items() if value.ndim == 4)

        def distance(start: int, name=name, trained=tensors) -> float:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(start)
                first = build_network(CONFIG.network, 10, 32).state_dict()[name]
            return float((first - trained[name]).abs().max())

        assert distance(teacher_start(seed)) < 1e-6
        others = (*student_seeds(seed, MOST_STUDENTS), doping_seed(seed), seed)
        assert len(set(others)) >= MOST_STUDENTS + 1
        assert min(distance(start) for start in others[::50] + others[-2:]) > 1e-2


def test_a_finished_teacher_is_loaded_and_another_config_refused(sets, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    made = train_teacher(*sets, config, tmp_path, Silent())
    report = Silent()
    assert train_teacher(*sets, config, tmp_path, report).sha256 == made.sha256
    assert not report.curves
    with pytest.raises(CheckpointError, match=r"epochs = 1, now it is 2"):
        train_teacher(*sets, replace(config, epochs=2), tmp_path, Silent())
    assert "precision" not in read_tensors(tmp_path / TEACHER)[1]["config"]  # as older teachers
    half = replace(config, precision="bf16")
    with pytest.raises(CheckpointError, match="precision = None, now it is bf16"):
        train_teacher(*sets, half, tmp_path, Silent())
    other = train_teacher(*sets, half, tmp_path / "bf16", Silent())
    assert other.sha256 != made.sha256
    assert {value.dtype for value in other.network.parameters()} == {torch.float32}


def test_a_teacher_comes_back_from_its_file(sets, tmp_path: Path) -> None:
    made = train_teacher(*sets, replace(CONFIG, epochs=1), tmp_path, Silent())
    loaded = load_teacher(str(tmp_path / TEACHER), sets[0].class_ids, device="cpu")
    assert loaded.describe() == json.loads(json.dumps(made.describe())) | {
        "normalisation": made.describe()["normalisation"]
    }
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(made.logits_from_uint8(images), loaded.logits_from_uint8(images))


def test_accuracy_is_that_of_the_files_in_percent(sets) -> None:
    _, val = sets
    teacher = _teacher(size_px=64, classes=10)
    (score,) = evaluate(
        [teacher.network], val, size_px=64, device=torch.device("cpu"), normalisation=IMAGENET
    )
    pixels = np.stack([np.array(Image.open(val.root / path)) for path in val.paths])
    answers = teacher.logits_from_uint8(torch.from_numpy(pixels)).argmax(1).numpy()
    right = answers == val.labels
    assert score.accuracy == pytest.approx(100 * right.mean(), abs=2.5)  # one image
    counts = np.bincount(val.labels)
    assert score.accuracy == pytest.approx(np.average(score.by_class, weights=counts), abs=0.01)


def test_a_teacher_renormalises_what_was_normalised_for_another(sets) -> None:
    own = Normalisation((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    teacher = _teacher(normalisation=own)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    expected = teacher.logits_from_uint8(images)
    actual = teacher.logits(IMAGENET.of_uint8(images), IMAGENET)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    unaware = teacher.logits(IMAGENET.of_uint8(images), own)
    assert not torch.allclose(unaware, expected, rtol=0, atol=1e-3)
    assert own.rgb() == (128, 102, 76)


def test_a_teacher_answers_at_its_own_size() -> None:
    teacher = _teacher(size_px=32)
    assert teacher.logits(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_normalised_pixels_are_as_torchvision_makes_them() -> None:
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    unit = images.permute(0, 3, 1, 2).float() / 255
    expected = torchvision.transforms.functional.normalize(unit, IMAGENET.mean, IMAGENET.std)
    torch.testing.assert_close(IMAGENET.of_uint8(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("class_ids", "expected"),
    [
        (("a", "b"), "expected 2 classes, as the data has, got 3"),
        (("a", "c", "b"), "class 1 is 'b', but 'c' in the data"),
    ],
)
def test_a_file_for_other_classes_is_refused(tmp_path: Path, class_ids, expected: str) -> None:
    _teacher().save(tmp_path / TEACHER)
    with pytest.raises(CheckpointError, match=expected):
        load_teacher(str(tmp_path / TEACHER), class_ids, device="cpu")


def test_a_state_dict_of_torch_is_a_teacher_too(tmp_path: Path) -> None:
    teacher = _teacher()
    state = {f"module.{name}": value for name, value in teacher.network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "teacher.pth")
    options = {"network": "convnet-d3-w8", "size_px": 32, "device": "cpu"}
    loaded = load_teacher(str(tmp_path / "teacher.pth"), IDS, **options)
    assert loaded.sha256 == teacher.sha256
    with pytest.raises(CheckpointError, match="do not fit"):
        load_teacher(str(tmp_path / "teacher.pth"), ("a", "b"), **options)


def test_a_state_dict_says_the_order_of_its_classes_or_is_warned_of(tmp_path: Path, capsys) -> None:
    """Folders 1, 2, 10: a teacher may have been trained on them in the order of the numbers."""
    path, learnt, sorted_ids = tmp_path / "teacher.pth", ("1", "2", "10"), ("1", "10", "2")
    options = {"network": "convnet-d3-w8", "size_px": 32, "device": "cpu"}
    network = build_network("convnet-d3-w8", 3, 32).eval()
    torch.save({"state_dict": network.state_dict(), "class_ids": [1, 2, 10]}, path)
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits_BK = network(images_BCHW)
    teacher = load_teacher(str(path), sorted_ids, **options)
    assert torch.equal(teacher.logits(images_BCHW), logits_BK[:, [0, 2, 1]])
    assert torch.equal(load_teacher(str(path), learnt, **options).logits(images_BCHW), logits_BK)
    assert capsys.readouterr().err == ""
    with pytest.raises(CheckpointError, match="expected class_ids to be the 3 class folders of"):
        load_teacher(str(path), ("1", "2", "3"), **options)
    torch.save(network.state_dict(), path)
    teacher = load_teacher(str(path), sorted_ids, **options)
    assert torch.equal(teacher.logits(images_BCHW), logits_BK)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: teacher {path} does not say the order of its classes, which")
    assert "taken to be 1, 10, 2, … as text is sorted" in told
    load_teacher(str(path), ("01", "02", "10"), **options)
    assert capsys.readouterr().err == ""


class _Code:
    def __reduce__(self):
        return (print, ("a teacher ran code",))


@pytest.mark.parametrize("kind", ["code", "text", "empty", "cut"])
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, kind, capsys) -> None:
    path = tmp_path / ("teacher.safetensors" if kind == "cut" else "teacher.pt")
    if kind == "code":
        path.write_bytes(pickle.dumps(_Code()))
    elif kind == "text":
        path.write_text("weights")
    elif kind == "empty":
        path.touch()
    else:
        _teacher().save(path)
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        load_teacher(str(path), IDS, network="convnet-d3-w8", size_px=32, device="cpu")
    assert "\n" not in str(caught.value)
    assert "ran code" not in capsys.readouterr().out


def test_weights_that_are_no_teacher_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "student.safetensors", {"w": torch.ones(2)}, {"schema": "other/1"})
    with pytest.raises(CheckpointError, match=r"expected schema patchbloom\.teacher/1, got other"):
        load_teacher(str(tmp_path / "student.safetensors"), IDS, device="cpu")


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="torchvision:NAME"):
        load_teacher("nowhere.safetensors", IDS)


def test_a_torchvision_teacher_answers_for_the_classes_of_the_data(monkeypatch) -> None:
    def without_weights(name: str, weights=None, **options) -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.squeezenet1_1(**options)

    monkeypatch.setattr(torchvision.models, "get_model", without_weights)
    ids = sorted(imagenet_names())
    teacher = load_teacher("torchvision:squeezenet1_1", [ids[0], ids[217]], device="cpu")
    assert teacher.size_px == 224
    images = torch.randn(2, 3, 224, 224)
    both = teacher.logits(images)
    assert torch.equal(both, teacher.network(images)[:, [0, 217]])
    with pytest.raises(CheckpointError, match="'heart' is none"):
        load_teacher("torchvision:squeezenet1_1", ["heart"], device="cpu")


def test_an_interrupted_download_is_one_line(monkeypatch) -> None:
    def interrupted(name: str, weights=None, **options) -> nn.Module:
        raise urllib.error.URLError("connection reset")

    monkeypatch.setattr(torchvision.models, "get_model", interrupted)
    with pytest.raises(CheckpointError, match=r"download of https.*connection reset.*try again"):
        load_teacher("torchvision:resnet18", sorted(imagenet_names())[:2], device="cpu")


@pytest.mark.parametrize("damage", [b"", b"null", b"hello", bytes(4000)])
def test_a_damaged_file_in_torchs_cache_is_named(tmp_path: Path, monkeypatch, damage) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match=rf"{path} cannot be read.*: remove it") as caught:
        load_teacher("torchvision:squeezenet1_1", sorted(imagenet_names())[:2], device="cpu")
    assert "\n" not in str(caught.value)


def test_the_hash_of_weights_sees_values_names_and_shapes() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    assert weights_sha256(state) == weights_sha256(dict(reversed(state.items())))
    for other in (
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "b": torch.ones(2) + 1e-6},
        {"a": state["b"], "b": state["a"]},
    ):
        assert weights_sha256(other) != weights_sha256(state)


def test_a_checkpoint_survives_a_failed_write(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"epoch": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"no space left for .*MiB"):
        write_tensors(path, {"a": torch.zeros(3)}, {"epoch": 2})
    tensors, metadata = read_tensors(path)
    assert metadata == {"epoch": 1}
    assert torch.equal(tensors["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
