"""Diverse selection, features of every network, native scoring, and ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patchbloom.engine.data.boxes import RandomResizedCrops
from patchbloom.engine.data.crops import stream_crops
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.engine.select.diversity import DiverseChoice, Diversity, diverse_choice
from patchbloom.engine.select.patches import PatchSelection, select_patches
from patchbloom.kernels.noise import Draw
from patchbloom.train.networks import build_network
from patchbloom.train.teacher.teacher import Teacher, patch_teacher
from PIL import Image
from test_patches import select_together, tensors
from torch import nn

CHOICES: tuple[DiverseChoice, ...] = ("facility-location", "k-center")
COPIES, KINDS = 8, 7  # images per class: near-duplicates, distinct ones
OPTIONS: dict[str, Any] = {
    **{"per_class": 4, "patch_px": 8, "image_size_px": 16, "crops": 2, "seed": 5, "batch": 4},
    "scoring": "native",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Class c0 has eight nearly equal reds and seven duller hues, c1 the same in blue."""
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(3)
    for label, channel in enumerate((0, 2)):
        (folder / f"c{label}").mkdir()
        for n in range(COPIES + KINDS):
            colour = np.zeros(3) if n < COPIES else rng.integers(0, 200, 3)
            colour[channel] = 250 - n if n < COPIES else 90
            pixels = np.broadcast_to(colour.astype(np.uint8), (24, 24, 3))
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"c{label}" / f"{n:02}.png")
    return open_image_set(folder, "train")


def teacher(patches_NHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Most confident on pure red and blue; its features are the mean colour."""
    colours = patches_NHWC.float().mean((1, 2))
    margin = (colours[:, 0] - colours[:, 2]) / 32
    return torch.stack([margin, -margin], 1), colours


def select(images: ImageSet, **options: Any) -> PatchSelection:
    return select_patches(images, teacher, **{**OPTIONS, **options})


def copies_in(images: ImageSet, chosen: PatchSelection) -> list[int]:
    """Near-duplicates chosen, per class."""
    numbers = [int(Path(images.paths[n]).stem) for n in chosen.source_index_N.tolist()]
    return [sum(number < COPIES for number in numbers[first : first + 4]) for first in (0, 4)]


@pytest.mark.parametrize("choice", CHOICES)
def test_near_duplicates_of_lowest_loss_are_avoided(
    images: ImageSet, choice: DiverseChoice
) -> None:
    assert copies_in(images, select(images)) == [4, 4]
    chosen = select(images, diversity=Diversity(choice=choice, features=3))
    assert copies_in(images, chosen) == [1, 1]
    assert len(set(chosen.source_index_N.tolist())) == 8
    assert copies_in(
        images, select(images, diversity=Diversity(choice=choice, features=3, candidates=2))
    ) == [4, 4]


def test_margin_takes_half_from_the_centres_and_half_where_the_loss_is_highest() -> None:
    """Candidates come in ascending order of loss; an odd one out is a centre's."""
    features_CD = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    centres = diverse_choice(features_CD, 3, "facility-location")
    rest = [each for each in range(9) if each not in centres]
    assert diverse_choice(features_CD, 5, "margin") == [*centres, rest[-1], rest[-2]]
    assert diverse_choice(features_CD, 1, "margin") == centres[:1]
    assert sorted(diverse_choice(features_CD, 9, "margin")) == list(range(9))


@pytest.mark.parametrize("choice", [*CHOICES, "margin"])
def test_what_is_chosen_is_cut_again_as_it_was_scored(
    images: ImageSet, choice: DiverseChoice
) -> None:
    chosen = select(images, diversity=Diversity(choice=choice, features=3))
    boxes = RandomResizedCrops(crops=2, seed=5, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    for n, index in enumerate(chosen.source_index_N.tolist()):
        (one,) = stream_crops(images, np.array([index]), boxes, crops=2, size_px=8)
        crop = one.boxes_BP4[0].tolist().index(chosen.boxes_N4[n].tolist())
        assert torch.equal(chosen.patches_NHWC[n], one.pixels_BPHWC[0, crop])
        logits = teacher(one.pixels_BPHWC[0])[0].double()
        losses = nn.functional.cross_entropy(logits, one.labels_B.expand(2), reduction="none")
        assert chosen.losses_N[n] == pytest.approx(float(losses.min()), rel=1e-4)
        assert chosen.labels_N[n] == one.labels_B


@pytest.mark.parametrize("choice", CHOICES)
def test_peers_choose_what_one_process_chooses(images: ImageSet, choice: DiverseChoice) -> None:
    options = {**OPTIONS, "diversity": Diversity(choice=choice, features=3)}
    reference = tensors(select(images, diversity=options["diversity"]))
    for size in (2, 3, 10):  # 8 batches: some of ten peers get none
        for chosen in select_together(size, images, teacher, **options):
            for name, tensor in tensors(chosen).items():
                assert torch.equal(tensor, reference[name]), name


def slow_choice(features: np.ndarray, count: int, choice: DiverseChoice) -> list[int]:
    """Greedy choice by definition, one candidate at a time."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(count):
        best, worth = -1, -np.inf
        for j in set(range(len(unit))) - set(chosen):
            tried = [*chosen, j]
            if choice == "facility-location":
                value = sum(max(float(unit[i] @ unit[c]) for c in tried) for i in range(len(unit)))
            elif chosen:
                value = min(1 - float(unit[j] @ unit[c]) for c in chosen)
            else:
                value = -float(j)  # the first has the lowest loss
            if value > worth + 1e-9:
                best, worth = j, value
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("choice", CHOICES)
def test_the_greedy_choice_is_that_of_its_definition(choice: DiverseChoice) -> None:
    features = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    assert diverse_choice(features, 12, choice) == slow_choice(features, 12, choice)
    assert diverse_choice(1000 * features, 12, choice) == diverse_choice(features, 12, choice)
    everything = diverse_choice(features, 40, choice)
    assert sorted(everything) == list(range(40))


@pytest.mark.parametrize("choice", CHOICES)
def test_equal_candidates_are_taken_in_order(choice: DiverseChoice) -> None:
    assert diverse_choice(np.ones((6, 3), np.float32), 4, choice) == [0, 1, 2, 3]
    assert diverse_choice(np.zeros((6, 3), np.float32), 4, choice) == [0, 1, 2, 3]


def test_ties_of_losses_go_to_the_first_crop_and_the_lowest_index(images: ImageSet) -> None:
    def indifferent(patches_NHWC: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(patches_NHWC), 2)

    reference = select_patches(images, indifferent, **OPTIONS)
    assert reference.source_index_N.tolist() == [0, 1, 2, 3, 15, 16, 17, 18]
    boxes = RandomResizedCrops(crops=2, seed=5, draw=Draw.SCORING_CROP, ratio=(1.0, 1.0))
    (crops,) = stream_crops(images, reference.source_index_N.numpy(), boxes, crops=2, size_px=8)
    assert torch.equal(reference.boxes_N4, crops.boxes_BP4[:, 0])
    for chosen in select_together(3, images, indifferent, **OPTIONS):
        assert torch.equal(chosen.source_index_N, reference.source_index_N)


def new_teacher(name: str, size_px: int) -> Teacher:
    torch.manual_seed(0)
    network = build_network(name, 5, size_px)
    return Teacher(network, architecture=name, class_ids=tuple("abcde"), size_px=size_px)


@pytest.mark.parametrize(
    ("name", "size_px", "width"),
    [
        ("convnet-d3-w8", 32, 8 * 16),
        ("resnet18", 32, 512),
        ("vgg11", 32, 512),
        ("alexnet", 32, 192 * 16),
        ("vit-s", 32, 384),
        ("torchvision:mobilenet_v2", 32, 1280),
        ("torchvision:efficientnet_b0", 32, 1280),
        ("torchvision:densenet121", 32, 1024),
        ("torchvision:swin_t", 64, 768),
        ("torchvision:convnext_tiny", 32, 768),
    ],
)
def test_features_are_what_the_classifier_is_given(name: str, size_px: int, width: int) -> None:
    teacher = new_teacher(name, size_px)
    images = torch.randint(0, 256, (3, size_px, size_px, 3), dtype=torch.uint8)
    logits, features = teacher.logits_and_features(images)
    assert teacher.classifier.in_features == width
    assert features.shape == (3, width)
    assert torch.equal(logits, teacher.logits_from_uint8(images))
    classifier = [m for m in teacher.network.modules() if isinstance(m, nn.Linear)][-1]
    assert torch.allclose(classifier(features), logits, atol=1e-5)
    assert not classifier._forward_pre_hooks


def test_a_network_without_features_is_told() -> None:
    with pytest.raises(ValueError, match="torchvision:squeezenet1_1 has no linear layer"):
        patch_teacher(new_teacher("torchvision:squeezenet1_1", 32), "k-center", "pad", 16, 4)


def test_a_native_patch_is_seen_in_its_own_size(images: ImageSet) -> None:
    sizes = set()

    def watching(patches_NHWC: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(patches_NHWC.shape))
        return teacher(patches_NHWC)[0]

    select_patches(images, watching, **OPTIONS)
    assert sizes == {(8, 8, 8, 3)}
    resnet = new_teacher("resnet18", 32)
    asked, _ = patch_teacher(resnet, "lowest-loss", "native", 16, 4)
    patches = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    own, enlarged = asked(patches), resnet.logits_from_uint8(patches)
    with torch.inference_mode():
        expected = resnet.network(resnet.normalisation.of_uint8(patches))
    assert torch.equal(own, expected)
    assert not torch.allclose(own, enlarged)


@pytest.mark.parametrize("name", ["convnet-d3-w8", "vit-s"])
def test_a_network_of_one_size_cannot_score_natively(name: str) -> None:
    told = rf"--scoring native: {name} cannot take patches of 16 px .* give --scoring pad or resize"
    with pytest.raises(ValueError, match=told):
        patch_teacher(new_teacher(name, 32), "lowest-loss", "native", 16, 4)
