"""Students: their views and rates; neither threads, other students nor a kill changes them."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patchbloom.engine.config import ExpandConfig, Start
from patchbloom.engine.data.crops import CorruptImageError, to_unit
from patchbloom.engine.data.images import open_image_set
from patchbloom.engine.expand.batches import images_per_prompt, plan_batches
from patchbloom.engine.labels.codecs import SoftTargets
from patchbloom.export.config import EngineSpec
from patchbloom.train.batching import CPU_ENGINE_BATCH, fitting_batch, grouping
from patchbloom.train.config import RECIPES, pool_size
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.labels.hard import HardLabels
from patchbloom.train.labels.targets import OnlineLabels
from patchbloom.train.labels.views import describe_views, make_views, pools
from patchbloom.train.methods.source import RealImages, UpsampledPatches, render_all
from patchbloom.train.networks import adamw, build_network
from patchbloom.train.report import pictures
from patchbloom.train.run.checkpoint import CheckpointError
from patchbloom.train.students.lockstep import learning_rate
from patchbloom.train.students.slots import pools_from
from patchbloom.train.teacher.evaluation import evaluate
from patchbloom.train.teacher.normalisation import IMAGENET, Normalisation
from patchbloom.train.teacher.teacher import Teacher
from PIL import Image
from student_cases import (
    CONFIG,
    LABELS_N,
    PATCHES,
    Sets,
    Silent,
    mosaics,
    new_sets,
    same,
    train,
    untrained_teacher,
    upsampled,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.module import register_module_forward_hook

AS_IT_IS = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return new_sets(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture(scope="module")
def source(sets: Sets) -> UpsampledPatches:
    return upsampled(sets)


@pytest.fixture(scope="module")
def teacher(sets: Sets) -> Teacher:
    return untrained_teacher(sets)


@pytest.mark.parametrize(
    ("classes", "ipc", "batch"),
    [(10, 1, 10), (10, 10, 50), (10, 50, 100), (100, 1, 20), (1000, 10, 100), (200, 1, 100)],
)
def test_batches_are_those_of_the_published_recipe(classes: int, ipc: int, batch: int) -> None:
    for name in ("rded", "dace"):
        assert RECIPES[name].student_for(ipc=ipc, factor=2, classes=classes).batch == batch


@pytest.mark.parametrize(("classes", "ipc"), [(10, 1), (200, 50), (1000, 10)])
def test_rd3_has_one_batch_and_a_schedule_by_network(classes: int, ipc: int) -> None:
    """zeta 1 ends at 0, zeta 2 at a half: 0.5·(1 + cos(pi·e/(zeta·E))) at e = E/2."""
    for network, zeta in (("resnet18", 1), ("torchvision:resnet18", 1), ("convnet-d3", 2)):
        student = RECIPES["rd3"].student_for(ipc=ipc, factor=2, classes=classes, network=network)
        assert (student.batch, student.epochs, student.weight_decay) == (50, 400, 0.0)
        halfway = 1e-3 * 0.5 * (1 + math.cos(math.pi / 2 / zeta))
        assert learning_rate(student, 200) == pytest.approx(halfway)


def test_adamw_without_decay_is_adam() -> None:
    network = nn.Linear(4, 3)
    twin = deepcopy(network)
    optimizers = adamw(network, 1e-3, 0.0), torch.optim.Adam(twin.parameters(), 1e-3)
    for step in range(5):
        for net, optimizer in zip((network, twin), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((2, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(network.weight, twin.weight, rtol=1e-6, atol=1e-7)


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
    assert len(pairs) == 10 * 6  # every two of a class's 4 samples meet


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
    """Only the last engine batch of a pool may be padded."""
    student = RECIPES["dace"].student_for(ipc=50, factor=2, classes=classes)
    labels_N = np.repeat(np.arange(classes), each)
    batch = fitting_batch(len(labels_N)) if classes * each == 40 else CPU_ENGINE_BATCH
    group = grouping(classes, each, student)
    assert group == (None if classes * each == 40 else 8)
    pool = pools(replace(student, group=group or 1), torch.from_numpy(labels_N), 0)[0].numpy()
    together = group or images_per_prompt(batch, np.bincount(labels_N))
    spec = EngineSpec(size_px=32, batch=batch, images_per_prompt=together)
    batches = plan_batches(pool, labels_N, spec)
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
    values = torch.linspace(-1, 1, count)  # one colour per image shows what is pasted where
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


@pytest.mark.parametrize(
    ("start", "weight", "mixup"),
    [("image", "uniform", "mixup"), ("image", "0.5", "mixup 0.5"), ("noise", "uniform", "")],
)
def test_the_sheet_of_expansions_shows_what_its_rows_say(
    monkeypatch, start: Start, weight: str, mixup: str
) -> None:
    class Fake:
        config = ExpandConfig(size_px=32, steps=4, start=start, mixup_weight=weight)

        def varied(self, **changes):
            assert start == "image" or changes["start"] == "noise"
            return self

        def expand(self, samples, epoch):
            return torch.zeros(len(samples), 3, 32, 32)

    monkeypatch.setattr(pictures, "contact_sheet", lambda rows, _: [name for name, _ in rows])
    rows = pictures.expansion_sheet(Fake(), PATCHES, [0, 4])
    from_patches = ["rho 0.4", "rho 0.6", "rho 0.8", "rho 1", f"rho 0.8, {mixup}"]
    assert rows == ["patch", *(from_patches if start == "image" else []), "text only"]


def test_upsampled_patches_are_torchs_bicubic(source) -> None:
    images = source.render(torch.tensor([7, 0]), 3)
    pixels = PATCHES[[7, 0]].permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = interpolate(pixels, (32, 32), mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_mosaic_shows_the_patches_of_its_class_each_once_in_a_fresh_order() -> None:
    rded = mosaics()
    images = rded.render(torch.tensor([5, 6]), 0)
    group = {patch.numpy().tobytes() for patch in PATCHES[4:8]}
    for image in images:
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        tiles = [pixels[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
        assert {tile.contiguous().numpy().tobytes() for tile in tiles} == group
    orders = {rded.render(torch.tensor([5]), epoch).numpy().tobytes() for epoch in range(20)}
    assert len(orders) > 8
    assert {s.numpy().tobytes() for s in rded.render(torch.arange(4, 8), 0)} != {
        s.numpy().tobytes() for s in rded.render(torch.arange(8, 12), 0)
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
    chosen = {"upsample": source, "rded": mosaics(), "real": real}[method]
    assert chosen.samples == 40
    together = chosen.render(torch.tensor([8, 30, 2, 11]), 5)
    assert together.dtype == torch.float32
    assert together.shape == (4, 3, 32, 32)
    assert -1 <= float(together.min()) < float(together.max()) <= 1
    torch.testing.assert_close(chosen.render(torch.tensor([2]), 5)[0], together[2])
    torch.testing.assert_close(render_all(chosen, 5, [11, 8])[1], together[0])
    assert chosen.describe()["method"] == method
    json.dumps(chosen.describe())


@pytest.fixture(scope="module")
def online(sets, source, teacher, tmp_path_factory):
    """Uninterrupted students, trained side by side with the default number of threads."""
    folder, labels = tmp_path_factory.mktemp("online"), OnlineLabels(teacher, CONFIG.temperature)
    return labels, train(source, labels, sets, folder), folder


def test_students_learn_and_are_scored_in_percent(online, sets) -> None:
    _, results, folder = online
    for result in results:
        assert len(result.losses) == CONFIG.epochs
        assert result.losses[-1] < result.losses[0]
        network = build_network(CONFIG.network, 10, CONFIG.size_px).eval()
        network.load_state_dict(weights(result))
        scores = evaluate([network], sets[1], size_px=32, device=torch.device("cpu"))
        assert [score.accuracy for score in scores] == [result.accuracy]
        assert scores[0].by_class == result.by_class
        assert result.accuracy * len(sets[1]) / 100 == pytest.approx(
            round(result.accuracy * len(sets[1]) / 100)
        )
    assert not list(folder.glob("student.checkpoint-*"))


def test_a_curve_changes_no_bit_and_goes_on_after_an_interrupt(
    online, source, sets, tmp_path: Path
) -> None:
    labels, whole, _ = online
    config = replace(CONFIG, evaluate_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(source, labels, sets, tmp_path, config, report=Silent(stop_after=3))
    made = train(source, labels, sets, tmp_path, config)
    for before, after in zip(whole, made, strict=True):
        assert same(before, after)
        assert [epoch for epoch, _ in after.curve] == [1, 2, 3, 4]
        assert after.curve[-1] == before.curve[0] == [4, before.accuracy]


def test_a_student_is_measured_in_the_precision_that_it_learned_in(
    source, sets, tmp_path: Path
) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    def see(module: nn.Module, given: object, answer: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            seen.add((module.training, answer.dtype))

    config = replace(CONFIG, epochs=1, targets="hard", temperature=1.0, precision="bf16")
    hook = register_module_forward_hook(see)
    try:
        train(source, HardLabels(source, config), sets, tmp_path, config=config, seeds=[0])
    finally:
        hook.remove()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_a_student_is_the_same_alone_and_in_company(online, sets, source, tmp_path: Path) -> None:
    labels, results, _ = online
    (alone,) = train(source, labels, sets, tmp_path, seeds=[1])
    assert same(alone, results[1])
    assert not same(*results)


def test_a_student_is_the_same_at_any_number_of_threads(
    online, sets, source, tmp_path: Path
) -> None:
    labels, results, _ = online
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        other = train(source, labels, sets, tmp_path)
        assert torch.get_num_threads() == (2 if before == 1 else 1)
    finally:
        torch.set_num_threads(before)
    assert all(same(one, two) for one, two in zip(results, other, strict=True))


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_training_resumes_to_the_same_students(
    online, sets, source, tmp_path: Path, stop_after: int
) -> None:
    labels, results, _ = online
    report = Silent()
    with pytest.raises(KeyboardInterrupt):
        train(source, labels, sets, tmp_path, report=Silent(stop_after))
    resumed = train(source, labels, sets, tmp_path, report=report)
    assert all(same(one, two) for one, two in zip(results, resumed, strict=True))
    assert [r.losses for r in resumed] == [r.losses for r in results]


def test_dropout_is_resumed_too(sets, source, teacher, tmp_path: Path) -> None:
    config = replace(CONFIG, network="torchvision:squeezenet1_1", epochs=2, checkpoint_every=1)
    labels = OnlineLabels(teacher, 4.0)
    whole = train(source, labels, sets, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(source, labels, sets, tmp_path / "killed", config, report=Silent(2))
    torch.rand(7)  # after a restart the default generator has another state
    resumed = train(source, labels, sets, tmp_path / "killed", config)
    assert all(same(one, two) for one, two in zip(whole, resumed, strict=True))


def test_finished_students_are_taken_over_and_other_settings_refused(online, sets, source) -> None:
    labels, results, folder = online
    report = Silent()
    again = train(source, labels, sets, folder, report=report)
    assert again == [replace(result, images_per_s=None) for result in results]
    assert not report.losses
    with pytest.raises(CheckpointError, match=r"learning_rate = 0.001, now it is 0\.1"):
        train(source, labels, sets, folder, replace(CONFIG, learning_rate=0.1))


def test_a_checkpoint_of_other_settings_is_refused(sets, source, teacher, tmp_path: Path) -> None:
    labels = OnlineLabels(teacher, 4.0)
    with pytest.raises(KeyboardInterrupt):
        train(source, labels, sets, tmp_path, report=Silent(3))
    with pytest.raises(CheckpointError, match="batch = 8, now it is 4"):
        train(source, labels, sets, tmp_path, replace(CONFIG, batch=4))
    with pytest.raises(CheckpointError, match=r"seeds = \[0, 1\], now it is \[3\]"):
        train(source, labels, sets, tmp_path, seeds=[3])


def test_a_loss_that_is_not_finite_ends_the_training(sets, source, teacher, tmp_path) -> None:
    config = replace(CONFIG, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"loss is .* in epoch \d: give a lower --learning-rate"):
        train(source, OnlineLabels(teacher, 4.0), sets, tmp_path, config)


def test_an_error_in_a_students_thread_reaches_the_caller(sets, source, teacher, tmp_path) -> None:
    class Broken(OnlineLabels):
        def targets(self, samples_P, epoch, views_PCHW):
            targets = super().targets(samples_P, epoch, views_PCHW)
            return SoftTargets(targets.labels[:, :3])

    with pytest.raises(ValueError, match=r"labels: expected shape"):
        train(source, Broken(teacher, 4.0), sets, tmp_path)


def test_classes_are_checked(sets, source, teacher, tmp_path: Path) -> None:
    labels = OnlineLabels(teacher, 4.0)
    other = replace(source, class_ids=tuple("abcdefghij"))
    with pytest.raises(ValueError, match=r"expected the coreset's 10 classes \(a, b, c"):
        train(other, labels, sets, tmp_path)


def test_the_normalisation_of_views_is_the_students() -> None:
    images = torch.zeros(1, 3, 32, 32)
    config = replace(CONFIG, cutmix=False)
    view = make_views(images, torch.zeros(1, dtype=torch.int64), 0, config)
    expected = IMAGENET.of_uint8(torch.full((1, 32, 32, 3), 128, dtype=torch.uint8))
    torch.testing.assert_close(view, expected, rtol=0, atol=0.02)
