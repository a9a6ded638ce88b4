"""Method dsco: losses, pivots, sampling, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import runner, write_small_model
from patchbloom.engine.config import DscoConfig, ExpandConfig
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.data.images import open_image_set
from patchbloom.engine.dsco.losses import (
    ChannelStatistics,
    channel_statistics,
    data_free_loss,
    norm_loss,
    pivot_loss,
)
from patchbloom.engine.dsco.optimiser import NoiseOptimiser, latin_hypercube
from patchbloom.engine.dsco.pivots import FEATURES, LatentFeatures, Pivots
from patchbloom.engine.expand.backends import Backend
from patchbloom.engine.expand.expander import Expander
from patchbloom.export.models import find_model
from patchbloom.kernels.noise import normal
from patchbloom.train import cli
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.loader import ExpandedLoader
from patchbloom.train.methods.whole_images import read_whole
from safetensors.torch import load_file
from torch import Tensor

CLASSES, IPC = 3, 2
OPTIONS = (
    *("--backend", "eager", "--recipe", "rded", "--image-size", "32", "--factor", "2"),
    *("--teacher", "convnet-d3-w8", "--teacher-epochs", "1", "--student", "convnet-d3-w8"),
    *("--epochs", "2", "--seeds", "1", "--seed", "3", "--steps", "3", "--no-ceiling"),
    *("--dsco.iterations", "2", "--engine-batch", "4"),
)
GROUPS = 3  # 10 classes, 4 per batch


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_with_real_images_is_the_formula() -> None:
    features, noise = some(4, 3), some(4, 2, 5, 5, seed=1)
    pivots = some(4, 3, seed=2).sort(dim=0).values
    expected = 0.0
    for column in range(3):
        in_order = sorted(features[:, column].tolist())
        for value, pivot in zip(in_order, pivots[:, column].tolist(), strict=True):
            expected += 0.0005 * 4 * (abs(value - pivot) + (value - pivot) ** 2)
    assert float(pivot_loss(features, pivots, 0.0005)) == pytest.approx(expected, rel=1e-5)
    expected = 0.0
    for image in noise.flatten(1).tolist():
        off = math.sqrt(sum(value**2 for value in image)) - math.sqrt(50)
        expected += abs(off) + off**2
    assert float(norm_loss(noise)) == pytest.approx(expected, rel=1e-5)


def test_the_data_free_loss_is_the_formula() -> None:
    x, templates = some(3, 2, 4, 4), ChannelStatistics(some(2, seed=1), some(2, seed=2))
    gaps = 0.0
    for channel in range(2):
        values = x[:, channel].double().numpy()
        gaps += (values.mean() - float(templates.mean_C[channel])) ** 2
        gaps += (values.std() - float(templates.std_C[channel])) ** 2
    flat = x.double().flatten(1).numpy()
    cosines = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for i, a in enumerate(flat)
        for j, b in enumerate(flat)
        if i != j
    ]
    config = DscoConfig(match_weight=0.5, repulsion_weight=3.0)
    expected = 0.5 * gaps + 3.0 * sum(cosines) / len(cosines)
    assert float(data_free_loss(x, templates, config)) == pytest.approx(expected, rel=1e-4)
    alone = data_free_loss(x[:1], channel_statistics(x[:1]), config)
    assert float(alone) == 0.0, "one image has nothing to be repelled by"


@pytest.mark.parametrize("images", [1, 2, 7, 50])
def test_one_image_of_a_class_lies_in_each_interval_of_every_dimension(images: int) -> None:
    samples = torch.arange(10, 10 + images)
    z = latin_hypercube(5, samples, (4, 8, 8))
    intervals = (torch.special.ndtr(z.double()) * images).floor().flatten(1).long()
    every = torch.arange(images)[:, None].expand_as(intervals)
    assert torch.equal(intervals.sort(dim=0).values, every)
    assert torch.equal(latin_hypercube(5, samples, (4, 8, 8)), z)
    assert not torch.equal(latin_hypercube(6, samples, (4, 8, 8)), z)
    if images == 50:
        assert float(z.mean().abs()) < 1e-3, "far less than the 0.009 of independent numbers"
        assert float(z.std()) == pytest.approx(1, abs=0.01)


def streamed(values: np.ndarray, rows: int, batch: int) -> Pivots:
    pivots = Pivots(rows, columns=values.shape[1])
    for part in torch.from_numpy(values).split(batch):
        pivots.add(part)
    return pivots


def means_of_parts(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Means of sorted columns between borders in [0, 1]; repeats allow parts of a value."""
    fine = np.repeat(np.sort(values, axis=0), 120, axis=0)
    at = np.rint(borders * len(fine)).astype(int)
    return np.stack([fine[first:end].mean(0) for first, end in itertools.pairwise(at)])


@pytest.mark.parametrize(("bins", "batch"), [(1, 60), (4, 7), (10, 33), (80, 1)])
def test_pivots_of_a_stream_are_those_of_the_whole_set(bins: int, batch: int) -> None:
    """Exact up to twice the kept rows, even with more bins than images, which split values."""
    values = some(60, 5).numpy() ** 3
    expected = means_of_parts(values, np.arange(bins + 1) / bins)
    actual = streamed(values, 30, batch).means(bins).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_pivots_of_a_long_stream_keep_their_bound_in_constant_memory() -> None:
    rows, images, bins = 50, 1200, 6
    values = some(images, 4, seed=3).numpy() ** 3
    pivots = streamed(values, rows, 32)
    held = sum(
        entry.untyped_storage().nbytes()
        for entry in vars(pivots).values()
        if isinstance(entry, Tensor)
    )
    assert held == 2 * rows * 4 * 4
    actual = pivots.means(bins).numpy()
    np.testing.assert_allclose(actual.mean(0), values.mean(0), rtol=1e-4, atol=1e-5)
    off = (images + rows) / (2 * rows**2)
    assert off > 0.2, "a bound that all answers keep would prove nothing"
    borders, spread = np.arange(bins + 1) / bins, np.sort(values, axis=0)

    def at(shares: np.ndarray) -> np.ndarray:
        return spread[np.clip((shares * images).astype(int), 0, images - 1)]

    assert (actual >= at(borders[:-1] - off)).all()
    assert (actual <= at(borders[1:] + off)).all()
    exact = means_of_parts(values, borders)
    assert np.abs(actual - exact).max() < 0.05 * np.abs(exact).max(), "far inside the bound"


@pytest.mark.parametrize("side", [2, 4, 7, 8, 16, 28])
def test_features_fit_any_latent(side: int) -> None:
    def network(class_index: int) -> LatentFeatures:
        options: dict[str, Any] = {"seed": 1, "groups": 32, "device": torch.device("cpu")}
        return LatentFeatures((4, side, side), class_index=class_index, **options)

    x = some(3, 4, side, side).requires_grad_()
    features = network(0)(x)
    features.square().sum().backward()
    assert features.shape == (3, FEATURES)
    assert x.grad is not None
    assert (x.grad != 0).all()
    assert torch.equal(network(0)(x), features)
    assert not torch.allclose(network(1)(x), features)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 32 px."""
    folder = tmp_path_factory.mktemp("model")
    write_small_model(folder)
    return folder / "model"


class Watched:
    """A backend that counts its denoiser calls and refuses gradients."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.denoised = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def denoise(self, x_BCHW: Tensor, *arguments: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x_BCHW.requires_grad
        self.denoised += 1
        return self.backend.denoise(x_BCHW, *arguments)


def optimiser(model: Path, batch: int = 4, **options: Any) -> NoiseOptimiser:
    expand = ExpandConfig(
        size_px=32, steps=3, start="noise", batch=batch, backend="eager", device="cpu"
    )
    expander = Expander(
        find_model(str(model)),
        expand,
        patches_NHWC=None,
        labels_N=np.repeat(np.arange(CLASSES), IPC),
        prompts_K=[f"A photo of {index}" for index in range(CLASSES)],
    )
    expander.backend = Watched(expander.backend)
    config = DscoConfig(**{"iterations": 20, "templates": 6, **options})
    return NoiseOptimiser(expander, config, classes=CLASSES, ipc=IPC)


def real(class_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten images of a class in two batches."""
    numbers = torch.arange(10) + 10 * class_index
    pixels = normal(1, 0, numbers, 0, (32, 32, 3)).mul(60).add(100 + 20 * class_index)
    images = pixels.clamp(0, 255).to(torch.uint8)
    yield images[:7], numbers[:7]
    yield images[7:], numbers[7:]


@pytest.mark.parametrize("data_free", [False, True])
def test_the_noise_is_optimised_and_nothing_else(model: Path, data_free: bool) -> None:
    """Every loss falls, the denoiser runs once a step, and equal seeds give equal images."""
    making, done = optimiser(model, data_free=data_free), list[float]()
    groups = making.groups()
    assert [list(group) for group in groups] == [[0, 1], [2]]
    made = [making.make(group, None if data_free else real, done.append) for group in groups]
    quarters = [0.25 * part for part in range(1, 7)]  # per class: match, two steps, decoding
    assert done == [*quarters, *quarters[:3]]
    templates = 3 * 2 if data_free else 0  # classes × calls (6 templates, batches of 4)
    assert making._expander.backend.denoised == 2 * 3 + templates * 2
    images = torch.cat([each.images_MCHW for each in made])
    assert images.shape == (CLASSES * IPC, 3, 32, 32)
    for before, after in (step for each in made for of_class in each.losses for step in of_class):
        assert after < before
    again = optimiser(model, data_free=data_free)
    assert torch.equal(again.make(groups[1], None if data_free else real).images_MCHW, images[4:])
    plain = optimiser(model, data_free=data_free, iterations=0)
    not_optimised = plain.make(groups[1], None if data_free else real).images_MCHW
    assert not torch.equal(not_optimised, images[4:])
    whole = optimiser(model, batch=6, data_free=data_free)
    of_all = whole.make(range(CLASSES), None if data_free else real).images_MCHW
    torch.testing.assert_close(of_all, images, atol=2e-3, rtol=0)


def test_a_schedule_of_one_step_has_no_noise(model: Path) -> None:
    expander = optimiser(model)._expander.varied(steps=1)
    with pytest.raises(ValueError, match="expected --steps of 2 or more, got 1"):
        NoiseOptimiser(expander, DscoConfig(), classes=CLASSES, ipc=IPC)


Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    run = runner(capsys)
    return lambda *arguments: run(*arguments).result


@pytest.fixture(scope="module")
def given(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data = write_shapes(tmp_path_factory.mktemp("data") / "s", train_per_class=5, val_per_class=2)
    return ("--data", str(data), "--model", str(model), *OPTIONS)


@pytest.fixture(scope="module")
def finished(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of dsco and random with --dope 1."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert cli.main([*given, "--out", str(out), "--method", "dsco", "random", "--dope", "1"]) == 0
    return out


def test_hard_targets_are_doped_with_the_same_images(
    finished: Path, given: tuple[str, ...], tmp_path: Path
) -> None:
    teacher = ("--teacher", str(finished / "teacher" / "teacher.safetensors"))
    out = ("--out", str(tmp_path / "run"), "--method", "random", "--dope", "1", *teacher)
    assert cli.main([*given, *out, "--targets", "hard"]) == 0
    hard = open_coreset(tmp_path / "run" / "coreset-doped")
    soft = open_coreset(finished / "coreset-random-doped")
    assert torch.equal(hard.doped(), soft.doped())
    margins = [coreset.manifest["provenance"]["doped"] for coreset in (hard, soft)]
    assert margins[0] == margins[1]
    assert hard.soft_labels() is None


def test_a_run_makes_doped_coresets(finished: Path) -> None:
    own, doped = open_coreset(finished / "coreset"), open_coreset(finished / "coreset-doped")
    assert own.manifest["schema"] == "patchbloom.coreset/1"
    assert doped.manifest["schema"] == "patchbloom.coreset/2"
    assert own.patches().shape == (10, 32, 32, 3)
    assert torch.equal(doped.patches(), own.patches())
    assert doped.doped().shape == (10, 32, 32, 3)
    assert own.settings["dsco"]["iterations"] == 2
    assert own.settings["generator"]["start"] == "noise"
    added = sum(path.stat().st_size for path in (finished / "coreset-doped").rglob("doped/*/*"))
    assert doped.bytes()["patches"] == own.bytes()["patches"] + added
    assert doped.bytes()["generator"] == 0, "what is stored needs no model"
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["evals_per_image"] == {"dsco": 0, "random": 0}
    assert summary["settings"]["student_steps"] == 2 * 8  # (4 + 4) · 10 samples in batches of 10
    labels = doped.soft_labels()
    assert labels is not None
    assert labels.samples == 80
    assert not (finished / "dsco.partial").exists()


def test_the_doped_images_are_training_images(finished: Path, given: tuple[str, ...]) -> None:
    images = open_image_set(given[1], "train")
    for name in ("coreset-doped", "coreset-random-doped"):
        doped = open_coreset(finished / name)
        told = doped.manifest["provenance"]["doped"]
        chosen = np.array([images.paths.index(entry["image"]) for entry in told])
        assert images.labels[chosen].tolist() == list(range(10))
        assert torch.equal(doped.doped(), read_whole(images, chosen, 32, "cpu"))


@pytest.mark.parametrize("method", ["dsco", "random"])
def test_students_of_a_doped_coreset_elsewhere(
    train: Train, finished: Path, tmp_path: Path, method: str
) -> None:
    coreset = finished / ("coreset-doped" if method == "dsco" else "coreset-random-doped")
    train("student", "--coreset", coreset, "--out", tmp_path / "out", "--seeds", "1")
    name = f"students/{method}-seed3000.safetensors"
    then, now = load_file(finished / name), load_file(tmp_path / "out" / name)
    assert all(torch.equal(then[key], now[key]) for key in then)
    with ExpandedLoader(coreset, batch=16, class_indices=True) as loader:
        assert len(loader) == 5
        classes = torch.cat([classes for *_, classes in loader])
    assert torch.bincount(classes).tolist() == [8] * 10


class InterruptedByTest(Exception):  # noqa: N818 - no error of ours
    """Stands for a kill."""


def test_a_killed_run_goes_on_where_it_was(
    train: Train, given: tuple[str, ...], finished: Path, tmp_path: Path, monkeypatch
) -> None:
    made: list[range] = []
    make = NoiseOptimiser.make

    def make_some(self: NoiseOptimiser, group: range, *rest: Any) -> Any:
        if len(made) == 1:
            raise InterruptedByTest
        made.append(group)
        return make(self, group, *rest)

    options = (*given, "--out", tmp_path / "run", "--method", "dsco")
    monkeypatch.setattr(NoiseOptimiser, "make", make_some)
    with pytest.raises(InterruptedByTest):
        train("coreset", *options)
    assert made == [range(4)]
    monkeypatch.setattr(
        NoiseOptimiser, "make", lambda *taken: made.append(taken[1]) or make(*taken)
    )
    train("coreset", *options)
    assert made == [range(4), range(4, 8), range(8, 10)]
    resumed = open_coreset(tmp_path / "run" / "coreset")
    assert resumed.content_sha256 == open_coreset(finished / "coreset").content_sha256


def test_two_processes_make_the_same(
    finished: Path, given: tuple[str, ...], tmp_path: Path
) -> None:
    names = ("coreset", "coreset-doped", "coreset-random-doped")
    command = [
        *(str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"),
        *("-m", "patchbloom.train.cli", "labels", *given, "--out", str(tmp_path / "run")),
        *("--method", "dsco", "random", "--dope", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    for name in names:
        together, alone = open_coreset(tmp_path / "run" / name), open_coreset(finished / name)
        assert together.content_sha256 == alone.content_sha256
