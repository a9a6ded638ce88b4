"""Guards the students: what they see and are told; that neither time nor company matters."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patchbloom.engine.batches import fitting_batch, images_per_prompt, plan_batches
from patchbloom.engine.config import ExpandConfig, Start
from patchbloom.engine.images import CorruptImageError, ImageSet, open_image_set
from patchbloom.engine.manifest import CoresetError
from patchbloom.engine.soft_labels import LabelBlock, SoftLabels, SoftTargets, decode_topk
from patchbloom.train import pictures
from patchbloom.train.checkpoint import CheckpointError, read_tensors
from patchbloom.train.config import RECIPES, StudentConfig
from patchbloom.train.evaluation import accuracies
from patchbloom.train.labels import (
    OnlineLabels,
    RecordedLabels,
    StoredLabels,
    record_labels,
)
from patchbloom.train.loop import (
    StudentResult,
    train_students,
)
from patchbloom.train.methods import Mosaics, RealImages, UpsampledPatches, render_all, to_unit
from patchbloom.train.networks import build_network
from patchbloom.train.normalisation import IMAGENET, Normalisation
from patchbloom.train.plan import LARGE_ENGINE_BATCH, grouping
from patchbloom.train.pool_slots import pools_from
from patchbloom.train.shapes import write_shapes
from patchbloom.train.teacher import Teacher
from patchbloom.train.views import describe_views, learning_rate, make_views, pool_size, pools
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate

CONFIG = StudentConfig(
    network="convnet-d3-w8",
    size_px=32,
    epochs=4,
    batch=8,
    temperature=4.0,
    checkpoint_every=2,
    pool=20,
    device="cpu",
)
AS_IT_IS = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LABELS_N = torch.arange(10).repeat_interleave(4)
PATCHES = torch.randint(
    0, 256, (40, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Silent:
    """A Report that stops the training when `stop_after` epochs of a student are told."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.stop_after = stop_after

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None:
        if done == self.stop_after:
            raise KeyboardInterrupt

    def scalar(self, tag: str, step: int, value: float) -> None:
        self.losses.append(value)

    def say(self, line: str) -> None: ...


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    root = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(root, train_per_class=4, val_per_class=2)
    return open_image_set(root, "train"), open_image_set(root, "val")


@pytest.fixture(scope="module")
def source(sets) -> UpsampledPatches:
    return UpsampledPatches(
        method="upsample",
        patches_NHWC=PATCHES,
        labels_N=LABELS_N,
        class_ids=sets[0].class_ids,
        size_px=32,
    )


@pytest.fixture(scope="module")
def teacher(sets) -> Teacher:
    torch.manual_seed(5)
    network = build_network("convnet-d3-w8", 10, 32)
    return Teacher(network, architecture="convnet-d3-w8", class_ids=sets[0].class_ids, size_px=32)


def _mosaics(**changed) -> Mosaics:
    ids = tuple("abcdefghij")
    options = {"patches_NHWC": PATCHES, "labels_N": LABELS_N, "class_ids": ids}
    return Mosaics(**{**options, "factor": 2, "seed": 0, **changed})


def _train(source, labels, sets, folder: Path, config=CONFIG, **options) -> list[StudentResult]:
    options = {"seeds": [0, 1], "report": Silent(), **options}
    return train_students(source, labels, config, val_set=sets[1], folder=folder, **options)


def _weights(result: StudentResult) -> dict[str, torch.Tensor]:
    return read_tensors(result.path)[0]


def _same(one: StudentResult, other: StudentResult) -> bool:
    a, b = _weights(one), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("classes", "ipc", "batch"),
    [(10, 1, 10), (10, 10, 50), (10, 50, 100), (100, 1, 20), (1000, 10, 100), (200, 1, 100)],
)
def test_batches_are_those_of_the_published_recipe(classes: int, ipc: int, batch: int) -> None:
    for name in ("rded", "dace"):
        assert RECIPES[name].student_for(ipc=ipc, factor=2, classes=classes).batch == batch


def test_pools_hold_every_sample_once_in_whole_batches() -> None:
    config = replace(CONFIG, batch=8, pool=20)
    assert pool_size(config) == 16
    epoch_0, epoch_1 = pools(config, LABELS_N, 0), pools(config, LABELS_N, 1)
    assert [len(pool) for pool in epoch_0] == [16, 16, 8]
    assert sorted(torch.cat(epoch_0).tolist()) == list(range(40))
    assert not torch.equal(torch.cat(epoch_0), torch.cat(epoch_1))
    assert torch.equal(torch.cat(epoch_0), torch.cat(pools(config, LABELS_N, 0)))
    assert pool_size(replace(config, pool=3)) == 8


def test_groups_of_a_class_stay_together_and_are_new_at_every_epoch() -> None:
    config = replace(CONFIG, batch=8, pool=16, group=2)
    pairs = set()
    for epoch in range(20):
        order_N = torch.cat(pools(config, LABELS_N, epoch))
        assert sorted(order_N.tolist()) == list(range(40))
        pairs_G2 = order_N.view(-1, 2)
        assert torch.equal(LABELS_N[pairs_G2[:, 0]], LABELS_N[pairs_G2[:, 1]])
        pairs |= {tuple(sorted(pair)) for pair in pairs_G2.tolist()}
    assert len(pairs) == 10 * 6  # of 4 samples of a class, every two meet


def test_pools_go_on_from_any_of_them() -> None:
    config = replace(CONFIG, batch=8, pool=20, epochs=2)
    whole = list(pools_from(config, LABELS_N, 0))
    assert [pool.index for pool in whole] == list(range(6))
    assert [pool.ends_epoch for pool in whole] == [False, False, True] * 2
    rest = list(pools_from(config, LABELS_N, 4))
    assert [(p.index, p.epoch, p.samples_P.tolist()) for p in rest] == [
        (p.index, p.epoch, p.samples_P.tolist()) for p in whole[4:]
    ]


@pytest.mark.parametrize(("classes", "each"), [(10, 4), (10, 200), (1000, 200)])
def test_a_pool_is_rendered_without_waste(classes: int, each: int) -> None:
    """The last engine batch of a pool may be padded, and no other."""
    student = RECIPES["dace"].student_for(ipc=50, factor=2, classes=classes)
    labels_N = np.repeat(np.arange(classes), each)
    batch = fitting_batch(len(labels_N)) if classes * each == 40 else LARGE_ENGINE_BATCH
    group = grouping(classes, each, batch, student)
    assert group == (None if classes * each == 40 else 8)
    pool = pools(replace(student, group=group or 1), torch.from_numpy(labels_N), 0)[0].numpy()
    together = group or images_per_prompt(batch, np.bincount(labels_N))
    batches = plan_batches(pool, labels_N, prompts=batch // together, images_per_prompt=together)
    assert sum(1 for _ in batches) == math.ceil(len(pool) / batch)


def test_a_view_depends_on_seed_sample_and_epoch_alone() -> None:
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    samples = torch.tensor([3, 1, 4, 15, 9, 26])
    config = replace(CONFIG, cutmix=False)
    together = make_views(images, samples, 2, config)
    alone = make_views(images[2:3], samples[2:3], 2, config)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)
    for other in (
        make_views(images, samples, 3, config),
        make_views(images, samples, 2, replace(config, seed=1)),
        make_views(images, samples + 1, 2, config),
    ):
        assert not torch.allclose(together, other, atol=1e-2)
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_half_of_the_views_are_mirrored_and_nothing_else() -> None:
    images = torch.rand(64, 3, 32, 32) * 2 - 1
    config = replace(CONFIG, cutmix=False, crop_scale=(1.0, 1.0))
    views = make_views(images, torch.arange(64), 0, config, AS_IT_IS)
    unflipped = make_views(images, torch.arange(64), 0, replace(config, flip=False), AS_IT_IS)
    flips = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(views, unflipped, strict=True)]
    assert 16 < sum(flips) < 48
    restored = torch.where(torch.tensor(flips)[:, None, None, None], views.flip(3), views)
    torch.testing.assert_close(restored, unflipped, rtol=0, atol=1e-5)


def test_cutmix_pastes_one_box_of_a_partner_of_the_pool() -> None:
    count, size_px = 256, 32
    values = torch.linspace(-1, 1, count)  # every image is one colour: who shows where is visible
    images = values[:, None, None, None].expand(count, 3, size_px, size_px).contiguous()
    views = make_views(images, torch.arange(count), 0, CONFIG, AS_IT_IS)
    shares = []
    for sample, view in enumerate(views):
        pasted = (view[0] - values[sample]).abs() > 1e-4
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None, :])
        partner = view[0][pasted]
        assert not len(partner) or (values - partner[0]).abs().min() < 1e-4
        assert not len(partner) or torch.allclose(partner, partner[0])
        shares.append(pasted.float().mean())
    assert 0.2 < float(torch.stack(shares).mean()) < 0.45  # clipped boxes: less than E(1 - lambda)
    without = make_views(images, torch.arange(count), 0, replace(CONFIG, cutmix=False), AS_IT_IS)
    torch.testing.assert_close(without, images, rtol=0, atol=1e-5)


def test_views_are_described_by_what_decides_them() -> None:
    assert describe_views(CONFIG)["pool"] == 16
    assert "pool" not in describe_views(replace(CONFIG, cutmix=False))
    same = describe_views(replace(CONFIG, epochs=9, learning_rate=1.0, pool=23))
    assert same == describe_views(CONFIG)


def test_learning_rates_follow_the_recipes() -> None:
    rded = replace(CONFIG, epochs=300, final_lr_fraction=0.5, learning_rate=2e-3)
    for epoch in (0, 150, 299):
        expected = 2e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 600))
        assert learning_rate(rded, epoch) == pytest.approx(expected)
    full = replace(rded, final_lr_fraction=0.0)
    assert learning_rate(full, 150) == pytest.approx(1e-3)
    assert learning_rate(full, 300) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("start", ["image", "noise"])
def test_the_sheet_of_expansions_shows_what_its_rows_say(monkeypatch, start: Start) -> None:
    class Fake:
        config = ExpandConfig(size_px=32, steps=4, start=start)

        def varied(self, **changes):
            assert start == "image" or changes["start"] == "noise"
            return self

        def expand(self, samples, epoch):
            return torch.zeros(len(samples), 3, 32, 32)

    monkeypatch.setattr(pictures, "contact_sheet", lambda rows: [name for name, _ in rows])
    rows = pictures.expansion_sheet(Fake(), PATCHES, [0, 4])
    from_patches = ["rho 0.4", "rho 0.6", "rho 0.8", "rho 1", "rho 0.8, mixup"]
    assert rows == ["patch", *(from_patches if start == "image" else []), "text only"]


def test_upsampled_patches_are_torchs_bicubic(source) -> None:
    images = source.render(torch.tensor([7, 0]), 3)
    pixels = PATCHES[[7, 0]].permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = interpolate(pixels, (32, 32), mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_mosaic_shows_the_patches_of_its_class_each_once_in_a_fresh_order() -> None:
    mosaics = _mosaics()
    images = mosaics.render(torch.tensor([5, 6]), 0)
    group = {patch.numpy().tobytes() for patch in PATCHES[4:8]}
    for image in images:
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        tiles = [pixels[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
        assert {tile.contiguous().numpy().tobytes() for tile in tiles} == group
    orders = {mosaics.render(torch.tensor([5]), epoch).numpy().tobytes() for epoch in range(20)}
    assert len(orders) > 8
    assert {s.numpy().tobytes() for s in mosaics.render(torch.arange(4, 8), 0)} != {
        s.numpy().tobytes() for s in mosaics.render(torch.arange(8, 12), 0)
    }


def test_real_images_are_of_the_class_and_new_at_every_epoch(sets) -> None:
    train = sets[0]
    real = RealImages(images=train, labels_N=LABELS_N, size_px=64, seed=0)
    drawn = np.stack([real.drawn(np.arange(40), epoch) for epoch in range(30)])
    assert (train.labels[drawn] == LABELS_N.numpy()).all()
    assert len(np.unique(drawn)) == len(train)
    images = real.render(torch.tensor([39, 3]), 7)
    for image, index in zip(images, drawn[7, [39, 3]], strict=True):
        pixels = np.array(Image.open(train.root / train.paths[index]))
        expected = to_unit(torch.from_numpy(pixels)[None])[0]
        assert (image - expected).abs().mean() < 0.02  # two JPEG decoders


def test_real_images_refuse_damaged_files(tmp_path: Path) -> None:
    write_shapes(tmp_path / "set", train_per_class=1, val_per_class=1)
    train = open_image_set(tmp_path / "set", "train")
    (train.root / train.paths[0]).write_bytes(b"\xff\xd8 not a picture")
    real = RealImages(images=train, labels_N=LABELS_N, size_px=32, seed=0)
    with pytest.raises(CorruptImageError, match="cannot decode"):
        real.render(torch.arange(4), 0)


@pytest.mark.parametrize("method", ["upsample", "rded", "real"])
def test_an_image_does_not_depend_on_what_else_is_rendered(sets, source, method: str) -> None:
    real = RealImages(images=sets[0], labels_N=LABELS_N, size_px=32, seed=0)
    chosen = {"upsample": source, "rded": _mosaics(), "real": real}[method]
    assert chosen.samples == 40
    together = chosen.render(torch.tensor([8, 30, 2, 11]), 5)
    assert together.dtype == torch.float32
    assert together.shape == (4, 3, 32, 32)
    assert -1 <= float(together.min()) < float(together.max()) <= 1
    torch.testing.assert_close(chosen.render(torch.tensor([2]), 5)[0], together[2])
    torch.testing.assert_close(render_all(chosen, 5, [11, 8])[1], together[0])
    assert chosen.describe()["method"] == method
    json.dumps(chosen.describe())


def test_online_targets_are_the_teachers_answers(teacher) -> None:
    views = torch.randn(5, 3, 32, 32)
    targets = OnlineLabels(teacher, 4.0).targets(torch.arange(5), 0, views)
    assert targets.classes is None
    torch.testing.assert_close(targets.labels, teacher.network(views).half(), rtol=0, atol=0)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cutmix"])
def recorded(request, sets, source, teacher, tmp_path_factory):
    """Students that were trained while their labels were made, and what was stored."""
    folder = tmp_path_factory.mktemp("recorded")
    config = replace(CONFIG, cutmix=request.param)
    labels = RecordedLabels(teacher, source, config, folder / "labels.partial")
    results = _train(source, labels, sets, folder, config)
    block = labels.block()
    save_file(block.tensors(), folder / "labels.safetensors")
    stored = SoftLabels(folder / "labels.safetensors", block.describe())
    return config, results, stored, folder


def test_stored_labels_give_the_students_that_recording_gave(
    recorded, sets, source, tmp_path: Path
) -> None:
    config, results, stored, _ = recorded
    again = _train(source, StoredLabels(stored, source, config), sets, tmp_path, config)
    assert all(_same(one, other) for one, other in zip(results, again, strict=True))
    assert [r.accuracy for r in again] == [r.accuracy for r in results]
    assert not _same(*results)


def test_online_labels_agree_with_stored_ones_to_their_precision(
    recorded, sets, source, teacher, tmp_path: Path
) -> None:
    config, results, _, _ = recorded
    online = _train(source, OnlineLabels(teacher, config.temperature), sets, tmp_path, config)
    for one, other in zip(results, online, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=0.02)


def test_labels_can_be_made_without_students(recorded, source, teacher, tmp_path: Path) -> None:
    config, _, stored, _ = recorded
    labels = RecordedLabels(teacher, source, config, tmp_path / "labels.partial")
    record_labels(source, labels, config, Silent())
    samples = torch.arange(40)
    for epoch in range(config.epochs):
        made = labels.block().logits[epoch].float()
        assert torch.equal(made, stored.logits(epoch, samples))
    labels.discard()
    assert not list(tmp_path.iterdir())


def test_stopped_labels_go_on_and_those_of_other_views_begin_anew(
    recorded, source, teacher, tmp_path: Path
) -> None:
    config, _, stored, _ = recorded
    path = tmp_path / "labels.partial"
    with pytest.raises(KeyboardInterrupt):
        record_labels(
            source, RecordedLabels(teacher, source, config, path), config, Silent(stop_after=3)
        )
    labels = RecordedLabels(teacher, source, config, path)
    rendered: list[int] = []

    class Counted(UpsampledPatches):
        def render(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
            rendered.append(epoch)
            return super().render(samples_P, epoch)

    counted = Counted(**{f.name: getattr(source, f.name) for f in fields(source)})
    record_labels(counted, labels, config, Silent())
    assert set(rendered) == {3}
    made = labels.block().logits.float()
    assert all(torch.equal(made[e], stored.logits(e, torch.arange(40))) for e in range(4))
    other = RecordedLabels(teacher, source, replace(config, seed=8), path)
    assert not any(other.has(torch.arange(40)[s : s + 1], 0) for s in range(40))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"epochs": 9}, "at least 9 epochs, got 4"),
        ({"crop_scale": (0.3, 1.0)}, r"views with crop_scale = \[0.5, 1.0\], now it is \[0.3"),
        ({"seed": 8}, "seed = 0, now it is 8"),
        ({"flip": False}, "flip = True, now it is False"),
    ],
)
def test_labels_of_other_views_are_refused(recorded, source, changed, expected: str) -> None:
    config, _, stored, _ = recorded
    with pytest.raises(CoresetError, match=expected):
        StoredLabels(stored, source, replace(config, **changed))


def test_labels_of_other_images_are_refused(recorded, sets) -> None:
    config, _, stored, _ = recorded
    other = _mosaics(class_ids=sets[0].class_ids)
    with pytest.raises(CoresetError, match="source with factor = None, now it is 2"):
        StoredLabels(stored, other, config)
    fewer = replace(other, labels_N=LABELS_N[:20])
    with pytest.raises(CoresetError, match="expected 20 samples of 10 classes, got 40 of 10"):
        StoredLabels(stored, fewer, config)


def test_top_k_labels_hold_for_one_temperature(source, teacher, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, cutmix=False)
    labels = RecordedLabels(teacher, source, config, tmp_path / "labels.partial")
    record_labels(source, labels, config, Silent())
    block = labels.block("topk", 3)
    assert isinstance(block, LabelBlock)
    save_file(block.tensors(), tmp_path / "labels.safetensors")
    stored = SoftLabels(tmp_path / "labels.safetensors", block.describe())
    targets = StoredLabels(stored, source, config).targets(torch.arange(40), 0, torch.zeros(1))
    assert targets.classes is not None
    full_NK = decode_topk(targets.labels, targets.classes, 10)
    exact_NK = (labels.block().logits[0].float() / 4).softmax(1)
    kept_Nk = targets.classes.long()
    torch.testing.assert_close(
        full_NK.gather(1, kept_Nk), exact_NK.gather(1, kept_Nk), rtol=0, atol=1e-3
    )
    with pytest.raises(CoresetError, match=r"expected temperature 2.0, got top-k labels at 4\.0"):
        StoredLabels(stored, source, replace(config, temperature=2.0))


def test_labels_that_are_not_complete_are_not_stored(source, teacher, tmp_path: Path) -> None:
    labels = RecordedLabels(teacher, source, CONFIG, tmp_path / "labels.partial")
    labels.targets(torch.arange(40), 0, torch.randn(40, 3, 32, 32))
    with pytest.raises(CoresetError, match="some epochs are missing"):
        labels.block()


def test_a_full_disk_is_told_before_anything_is_trained(
    source, teacher, tmp_path: Path, monkeypatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left for"):
        RecordedLabels(teacher, source, CONFIG, tmp_path / "labels.partial")
    assert not list(tmp_path.iterdir())


def test_students_learn_and_are_scored_in_percent(recorded, sets) -> None:
    config, results, _, folder = recorded
    for result in results:
        assert len(result.losses) == config.epochs
        assert result.losses[-1] < result.losses[0]
        network = build_network(config.network, 10, config.size_px).eval()
        network.load_state_dict(_weights(result))
        scores = accuracies([network], sets[1], size_px=32, device=torch.device("cpu"))
        assert scores == [result.accuracy]
        assert result.accuracy * len(sets[1]) / 100 == pytest.approx(
            round(result.accuracy * len(sets[1]) / 100)
        )
    assert not list(folder.glob("student.checkpoint-*"))


def test_a_student_is_the_same_alone_and_in_company(recorded, sets, source, tmp_path: Path) -> None:
    config, results, stored, _ = recorded
    labels = StoredLabels(stored, source, config)
    (alone,) = _train(source, labels, sets, tmp_path, config, seeds=[1])
    assert _same(alone, results[1])


def test_a_student_is_the_same_at_any_number_of_threads(
    recorded, sets, source, tmp_path: Path
) -> None:
    config, results, stored, _ = recorded
    labels, before = StoredLabels(stored, source, config), torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        other = _train(source, labels, sets, tmp_path, config)
        assert torch.get_num_threads() == (2 if before == 1 else 1)
    finally:
        torch.set_num_threads(before)
    assert all(_same(one, two) for one, two in zip(results, other, strict=True))


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_training_resumes_to_the_same_students(
    recorded, sets, source, teacher, tmp_path: Path, stop_after: int
) -> None:
    config, results, stored, _ = recorded
    for report in (Silent(stop_after), Silent()):
        labels = RecordedLabels(teacher, source, config, tmp_path / "labels.partial")
        if report.stop_after is None:
            resumed = _train(source, labels, sets, tmp_path, config, report=report)
        else:
            with pytest.raises(KeyboardInterrupt):
                _train(source, labels, sets, tmp_path, config, report=report)
    assert all(_same(one, two) for one, two in zip(results, resumed, strict=True))
    assert [r.losses for r in resumed] == [r.losses for r in results]
    again = labels.block().logits.float()
    assert all(torch.equal(again[e], stored.logits(e, torch.arange(40))) for e in range(4))


def test_dropout_is_resumed_too(sets, source, teacher, tmp_path: Path) -> None:
    config = replace(CONFIG, network="torchvision:squeezenet1_1", epochs=2, checkpoint_every=1)
    labels = OnlineLabels(teacher, 4.0)
    whole = _train(source, labels, sets, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        _train(source, labels, sets, tmp_path / "killed", config, report=Silent(2))
    torch.rand(7)  # the default generator is somewhere else after a restart
    resumed = _train(source, labels, sets, tmp_path / "killed", config)
    assert all(_same(one, two) for one, two in zip(whole, resumed, strict=True))


def test_finished_students_are_taken_over_and_other_settings_refused(
    recorded, sets, source
) -> None:
    config, results, stored, folder = recorded
    labels, report = StoredLabels(stored, source, config), Silent()
    assert _train(source, labels, sets, folder, config, report=report) == results
    assert not report.losses
    with pytest.raises(CheckpointError, match=r"learning_rate = 0.001, now it is 0\.1"):
        _train(source, labels, sets, folder, replace(config, learning_rate=0.1))


def test_a_checkpoint_of_other_settings_is_refused(sets, source, teacher, tmp_path: Path) -> None:
    labels = OnlineLabels(teacher, 4.0)
    with pytest.raises(KeyboardInterrupt):
        _train(source, labels, sets, tmp_path, report=Silent(3))
    with pytest.raises(CheckpointError, match="batch = 8, now it is 4"):
        _train(source, labels, sets, tmp_path, replace(CONFIG, batch=4))
    with pytest.raises(CheckpointError, match=r"seeds = \[0, 1\], now it is \[3\]"):
        _train(source, labels, sets, tmp_path, seeds=[3])


def test_a_loss_that_is_not_finite_ends_the_training(sets, source, teacher, tmp_path) -> None:
    config = replace(CONFIG, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"loss is .* in epoch \d: lower the learning rate"):
        _train(source, OnlineLabels(teacher, 4.0), sets, tmp_path, config)


def test_an_error_in_a_students_thread_reaches_the_caller(sets, source, teacher, tmp_path) -> None:
    class Broken(OnlineLabels):
        def targets(self, samples_P, epoch, views_PCHW):
            targets = super().targets(samples_P, epoch, views_PCHW)
            return SoftTargets(targets.labels[:, :3])

    with pytest.raises(ValueError, match=r"labels: expected shape"):
        _train(source, Broken(teacher, 4.0), sets, tmp_path)


def test_seeds_and_classes_are_checked(sets, source, teacher, tmp_path: Path) -> None:
    labels = OnlineLabels(teacher, 4.0)
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="different seeds"):
            _train(source, labels, sets, tmp_path, seeds=seeds)
    other = replace(source, class_ids=tuple("abcdefghij"))
    with pytest.raises(ValueError, match=r"expected the coreset's 10 classes \(a, b, c"):
        _train(other, labels, sets, tmp_path)


def test_the_normalisation_of_views_is_the_students() -> None:
    images = torch.zeros(1, 3, 32, 32)
    config = replace(CONFIG, cutmix=False)
    view = make_views(images, torch.zeros(1, dtype=torch.int64), 0, config)
    expected = IMAGENET.of_uint8(torch.full((1, 32, 32, 3), 128, dtype=torch.uint8))
    torch.testing.assert_close(view, expected, rtol=0, atol=0.02)
