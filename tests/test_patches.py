"""Crop boxes, scores and patch selection, each against a slow and obvious version."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patchbloom.engine.data.boxes import TRIES, RandomResizedCrops, resized_crop_boxes
from patchbloom.engine.data.crops import CorruptImageError, stream_crops
from patchbloom.engine.data.images import ImageSet, InputError, open_image_set
from patchbloom.engine.select.best import BestPatches
from patchbloom.engine.select.patches import PatchSelection, select_patches, selection_order
from patchbloom.engine.select.scores import cross_entropy
from patchbloom.kernels.noise import Draw
from PIL import Image
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import interpolate
from torchvision.transforms import RandomResizedCrop

CLASSES, PER_CLASS, SIZE_PX = 3, 12, 16
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """36 distinct images of random colour blocks, 24 to 57 px wide, in three classes."""
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(3)
    for label in range(CLASSES):
        (folder / f"c{label}").mkdir()
        for n in range(PER_CLASS):
            blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(blocks).resize((24 + 3 * n, 40), Image.Resampling.BICUBIC)
            image.save(folder / f"c{label}" / f"{n:02}.png")
    return open_image_set(folder, "train")


@pytest.fixture(scope="module")
def teacher() -> Callable[[torch.Tensor], torch.Tensor]:
    """Fixed random linear network on the canvas."""
    weights = torch.randn(SIZE_PX * SIZE_PX * 3, CLASSES, generator=torch.manual_seed(1)) / 500
    return lambda canvas_NHWC: canvas_NHWC.flatten(1).float() @ weights


def select(images: ImageSet, teacher, **options) -> PatchSelection:
    sizes = {"per_class": 4, "patch_px": SIZE_PX // 2, "image_size_px": SIZE_PX}
    defaults = {**sizes, "crops": 3, "seed": 5, "batch": 8}
    return select_patches(images, teacher, **(defaults | options))


def select_together(ranks: int, images: ImageSet, teacher, **options) -> list[PatchSelection]:
    """Selections of `ranks` peers, which are threads of this process."""
    values: list[Any] = [None] * ranks
    meeting = Barrier(ranks, timeout=60)

    @dataclass
    class Peer:
        rank: int
        size: int = ranks

        def all_gather(self, value: Any) -> list[Any]:
            values[self.rank] = value
            meeting.wait()
            gathered = list(values)
            meeting.wait()
            return gathered

        def all_gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.all_gather(rows))

    with ThreadPoolExecutor(ranks) as pool:
        chosen = [
            pool.submit(select, images, teacher, peers=Peer(rank), **options)
            for rank in range(ranks)
        ]
        return [each.result() for each in chosen]


def tensors(selection: PatchSelection) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vars(selection).items() if isinstance(v, torch.Tensor)}


# Boxes


def slow_box(u_T4: np.ndarray, height: int, width: int, scale, ratio) -> tuple[int, ...]:
    """torchvision's RandomResizedCrop.get_params with our random numbers."""
    for area_u, ratio_u, top_u, left_u in u_T4.astype(float).tolist():
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * ratio_u)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
    in_ratio = width / height
    if in_ratio < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif in_ratio > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.0)])
def test_boxes_are_those_of_torchvision(ratio: tuple[float, float]):
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (2, 900), (900, 2), (64, 64), (224, 224), (375, 500), (500, 333), (3, 4)]
    heights, widths = np.array(sizes * 25).T
    u_BPT4 = rng.random((len(heights), 5, TRIES, 4), dtype=np.float32)
    boxes = resized_crop_boxes(u_BPT4, heights, widths, scale=SCALE, ratio=ratio)
    for b, p in np.ndindex(len(heights), 5):
        expected = slow_box(u_BPT4[b, p], heights[b], widths[b], SCALE, ratio)
        assert tuple(boxes[b, p]) == expected, (heights[b], widths[b])


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    seed=st.integers(0, 2**32 - 1),
    low=st.floats(0.2, 1.0),
    high=st.floats(1.0, 5.0),
)
def test_boxes_are_inside_any_image(height: int, width: int, seed: int, low: float, high: float):
    u = np.random.default_rng(seed).random((1, 3, TRIES, 4), dtype=np.float32)
    u = np.clip(u, 2.0**-33, 1 - 2.0**-24)
    boxes = resized_crop_boxes(
        u, np.array([height]), np.array([width]), scale=SCALE, ratio=(low, high)
    )
    assert (boxes[..., :2] >= 0).all()
    assert (boxes[..., 2:] > 0).all()
    assert (boxes[..., 0] + boxes[..., 2] <= height).all()
    assert (boxes[..., 1] + boxes[..., 3] <= width).all()


def test_boxes_have_the_distribution_of_torchvision():
    torch.manual_seed(0)
    height, width, n = 300, 400, 4000
    image = torch.empty(3, height, width)
    expected = np.array(
        [RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(n)]
    )
    crops = RandomResizedCrops(crops=1, seed=0, draw=Draw.STUDENT_CROP)
    boxes = crops(np.arange(n), np.full(n, height), np.full(n, width), 0)[:, 0]
    # Four standard errors of the difference of two means of n.
    bound = 4 * expected.std(axis=0) * math.sqrt(2 / n)
    assert (np.abs(boxes.mean(axis=0) - expected.mean(axis=0)) < bound).all()
    assert boxes.std(axis=0) == pytest.approx(expected.std(axis=0), rel=0.1)


def test_a_box_is_named_by_seed_draw_sample_epoch_and_crop():
    sizes = np.full(4, 90), np.full(4, 70)
    five = RandomResizedCrops(crops=5, seed=1, draw=Draw.SCORING_CROP)
    two = RandomResizedCrops(crops=2, seed=1, draw=Draw.SCORING_CROP)
    boxes = five(np.array([4, 9, 0, 7]), *sizes, 2)
    assert np.array_equal(two(np.array([7, 9, 4, 0]), *sizes, 2), boxes[[3, 1, 0, 2], :2])
    for other in (
        five(np.array([4, 9, 0, 7]), *sizes, 3),
        RandomResizedCrops(crops=5, seed=2, draw=Draw.SCORING_CROP)(
            np.array([4, 9, 0, 7]), *sizes, 2
        ),
        RandomResizedCrops(crops=5, seed=1, draw=Draw.TEACHER_CROP)(
            np.array([4, 9, 0, 7]), *sizes, 2
        ),
    ):
        assert not np.array_equal(other, boxes)


# Scores


def test_cross_entropy_is_torchs_and_keeps_small_losses_apart():
    logits = torch.randn(50, 7, generator=torch.manual_seed(0)) * 5
    labels = torch.arange(50) % 7
    expected = torch_cross_entropy(logits.double(), labels, reduction="none").numpy()
    assert cross_entropy(logits, labels) == pytest.approx(expected, abs=1e-12)
    sure = torch.tensor([[40.0, 0.0], [41.0, 0.0], [-1000.0, 0.0]])
    losses = cross_entropy(sure, torch.zeros(3, dtype=torch.int64))
    assert losses == pytest.approx([math.exp(-40), math.exp(-41), 1000.0], rel=1e-9, abs=0)


def test_the_teacher_sees_patches_on_the_mean_colour(images: ImageSet):
    seen = []

    def teacher(canvas_NHWC: torch.Tensor) -> torch.Tensor:
        assert canvas_NHWC.dtype == torch.uint8
        assert torch.is_inference_mode_enabled()
        seen.append(canvas_NHWC.clone())
        return torch.zeros(len(canvas_NHWC), CLASSES)

    select(images, teacher, canvas_rgb=(9, 8, 7), batch=10)
    assert {tuple(canvas.shape) for canvas in seen} == {(30, SIZE_PX, SIZE_PX, 3)}
    boxes = RandomResizedCrops(crops=3, seed=5, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    order = np.concatenate(selection_order(images.labels, 5))
    stream = stream_crops(images, order[:10], boxes, crops=3, size_px=SIZE_PX // 2)
    (expected,) = (batch.pixels_BPHWC.flatten(0, 1) for batch in stream)
    assert torch.equal(seen[0][:, 4:12, 4:12], expected)
    frame = torch.ones(SIZE_PX, SIZE_PX, dtype=torch.bool)
    frame[4:12, 4:12] = False
    assert seen[0][:, frame].unique(dim=0).unique(dim=1).tolist() == [[[9, 8, 7]]]


def test_the_teacher_sees_patches_enlarged(images: ImageSet):
    seen = []

    def teacher(canvas_NHWC: torch.Tensor) -> torch.Tensor:
        seen.append(canvas_NHWC.clone())
        return torch.zeros(len(canvas_NHWC), CLASSES)

    select(images, teacher, scoring="resize", batch=10)
    boxes = RandomResizedCrops(crops=3, seed=5, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    order = np.concatenate(selection_order(images.labels, 5))
    (crops,) = stream_crops(images, order[:10], boxes, crops=3, size_px=SIZE_PX // 2)
    unit_NCHW = crops.pixels_BPHWC.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
    enlarged = interpolate(unit_NCHW, SIZE_PX, mode="bicubic").clamp(-1, 1)
    expected = ((enlarged + 1) * 127.5).permute(0, 2, 3, 1)
    assert (seen[0].float() - expected).abs().max() <= 0.51  # rounded


# Selection


def test_best_patches_are_the_lowest_of_a_stream():
    rng = np.random.default_rng(2)
    keys = rng.integers(0, 8, 200) / 4.0  # many ties
    labels = rng.integers(0, 2, 200)
    for order in (np.arange(200), rng.permutation(200)):
        best = BestPatches(classes=2, per_class=9, row=(1, 1, 3))
        for n in order.tolist():
            patch = torch.full((1, 1, 3), n, dtype=torch.uint8)
            box = torch.tensor([n, 0, 1, 1])
            best.offer(int(labels[n]), float(keys[n]), n, patch, float(keys[n]) + 1, box)
        assert best.counts() == [9, 9]
        best.sort()
        for label in range(2):
            mine = np.flatnonzero(labels == label)
            expected = mine[np.lexsort((mine, keys[mine]))][:9]
            assert best.source_index_KN[label].tolist() == expected.tolist()
            assert best.rows_KN[label, :, 0, 0, 0].tolist() == expected.tolist()
            assert best.boxes_KN4[label, :, 0].tolist() == expected.tolist()
            assert best.losses_KN[label].tolist() == (keys[expected] + 1).tolist()


def test_the_choice_is_the_best_crop_of_the_best_images(images: ImageSet, teacher):
    chosen = select(images, teacher, pool_per_class=9)
    boxes = RandomResizedCrops(crops=3, seed=5, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    for label, order in enumerate(selection_order(images.labels, 5)):
        rows = []
        for index in order[:9].tolist():
            (one,) = stream_crops(images, np.array([index]), boxes, crops=3, size_px=8)
            canvas = torch.empty(3, SIZE_PX, SIZE_PX, 3, dtype=torch.uint8)
            canvas[:] = torch.tensor((124, 116, 104), dtype=torch.uint8)
            canvas[:, 4:12, 4:12] = one.pixels_BPHWC[0]
            losses = torch_cross_entropy(
                teacher(canvas).double(), one.labels_B.expand(3), reduction="none"
            )
            crop = int(losses.argmin())
            rows.append(
                (float(losses[crop]), index, one.pixels_BPHWC[0, crop], one.boxes_BP4[0, crop])
            )
        rows.sort(key=lambda row: row[:2])
        for n, (loss, index, patch, box) in enumerate(rows[:4]):
            place = 4 * label + n
            assert chosen.labels_N[place] == label
            assert chosen.source_index_N[place] == index
            assert torch.equal(chosen.patches_NHWC[place], patch)
            assert torch.equal(chosen.boxes_N4[place], box)
            assert chosen.losses_N[place] == pytest.approx(loss, rel=1e-4)
    assert len(chosen.labels_N) == 4 * CLASSES
    assert chosen.patches_NHWC.shape == (4 * CLASSES, 8, 8, 3)


@pytest.mark.parametrize("scored", [True, False])
def test_the_choice_does_not_depend_on_batch_or_threads(images: ImageSet, teacher, scored: bool):
    asked = teacher if scored else None
    reference = tensors(select(images, asked))
    for options in ({"batch": 1}, {"batch": 64, "threads": 3}, {"batch": 5, "threads": 1}):
        for name, tensor in tensors(select(images, asked, **options)).items():
            if name == "losses_N":  # a matrix product of another shape may round differently
                assert tensor == pytest.approx(reference[name], rel=1e-4, nan_ok=True)
            else:
                assert torch.equal(tensor, reference[name]), name
    other = select(images, asked, seed=6)
    assert not torch.equal(other.patches_NHWC, reference["patches_NHWC"])


@pytest.mark.parametrize("scored", [True, False])
def test_peers_choose_what_one_process_chooses(images: ImageSet, teacher, scored: bool):
    asked, options = teacher if scored else None, {"batch": 4, "per_class": 8}
    reference = tensors(select(images, asked, **options))
    for size in (2, 3, 10):  # 9 batches, or 6: some of ten peers get none
        for chosen in select_together(size, images, asked, **options):
            for name, tensor in tensors(chosen).items():
                assert tensor.equal(reference[name]) or (not scored and tensor.isnan().all()), name


def test_random_patches_need_no_teacher(images: ImageSet):
    told = []
    chosen = select(images, None, progress=lambda *done: told.append(done))
    assert told[-1] == (12, 12)
    assert chosen.losses_N.isnan().all()
    expected = [sorted(order[:4]) for order in selection_order(images.labels, 5)]
    assert chosen.source_index_N.tolist() == np.concatenate(expected).tolist()
    assert chosen.labels_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_damaged_file_is_refused(images: ImageSet, teacher, tmp_path: Path):
    for path in images.paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((images.root / path).read_bytes())
    (tmp_path / images.paths[selection_order(images.labels, 5)[1][2]]).write_bytes(b"")
    with pytest.raises(CorruptImageError, match=r"--skip-corrupt"):
        select(open_image_set(tmp_path, "train"), teacher)


def test_what_does_not_fit_is_refused(images: ImageSet, teacher):
    with pytest.raises(InputError, match=r"at least 16 images in every class .*, got 12"):
        select(images, teacher, per_class=16)
    with pytest.raises(InputError, match=r"expected logits of 3 classes, got shape \(24, 5\)"):
        select(images, lambda canvas: torch.zeros(len(canvas), 5))
    with pytest.raises(InputError, match="expected finite losses"):
        select(images, lambda canvas: torch.full((len(canvas), 3), math.nan))
