"""Pools of two ranks: the bits of one process, and how many bytes pass between the ranks.

The ranks are threads, each with its own gloo group.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import Coreset, write_coreset
from patchbloom.engine.expand.naming import describe_model
from patchbloom.export.models import find_model
from patchbloom.train.methods.open import open_coreset_source, open_source
from patchbloom.train.methods.pools import SharedImages
from patchbloom.train.methods.source import Expansions, Machine
from patchbloom.train.run.launch import Launch
from patchbloom.train.run.world import ALONE, World
from student_cases import new_sets

CLASSES, SIZE_PX, EPOCH = ("cross", "disc", "star"), 32, 3
VALUES = 3 * SIZE_PX**2  # of an image
PATCHES = torch.randint(
    256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
MODEL = find_model("sdxl-tiny")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every tensor that a rank gave to `dist.all_gather`."""
    found, gather = list[int](), dist.all_gather

    def counted(parts: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
        found.append(own.nbytes)
        gather(parts, own, group)

    monkeypatch.setattr(dist, "all_gather", counted)
    return found


def of_two_ranks(work: Callable[[World], torch.Tensor]) -> list[torch.Tensor]:
    """`work` on both ranks of a world, at the same time."""
    store, registered = dist.HashStore(), dist.distributed_c10d._world.pg_map

    def on(rank: int) -> torch.Tensor:
        group = dist.ProcessGroup(store, rank, 2)
        gloo = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        registered[group] = ("gloo", store)
        launch = Launch(rank=rank, size=2, local_rank=rank, local_size=2)
        try:
            return work(World(launch=launch, device=torch.device("cpu"), values=group))
        finally:
            del registered[group]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on, range(2)))


def require_same(open_images: Callable[[World], Any], samples: int) -> None:
    """Every rank renders what one process renders, in a shuffled order."""
    samples_P = torch.randperm(samples, generator=torch.Generator().manual_seed(1))

    def rendered(world: World) -> torch.Tensor:
        with open_images(world) as source:
            return source.render(samples_P, EPOCH)

    alone = rendered(ALONE)
    for images in of_two_ranks(rendered):
        assert images.dtype == torch.float32
        assert images.stride() == alone.stride()
        assert images.numpy().tobytes() == alone.numpy().tobytes()


def coreset(folder: Path, method: str, size_px: int, **changed: Any) -> Coreset:
    sizes = {"image_size_px": size_px, "factor": 2, "patch_px": 16, "ipc": 1}
    return write_coreset(
        folder / "coreset",
        patches_NHWC=PATCHES,
        class_ids=CLASSES,
        class_names=CLASSES,
        settings={"method": method, "seed": 5, **sizes, **changed.pop("settings", {})},
        provenance={},
        **changed,
    )


@pytest.mark.parametrize(("vae", "width"), [("bf16", 2), ("fp32", 4)])
def test_expansions_travel_in_the_decoders_type(
    tmp_path: Path, sent: list[int], vae: Any, width: int
) -> None:
    """12 images are three calls of the engine: two for rank 0, one for rank 1."""
    config = ExpandConfig(
        **{"size_px": SIZE_PX, "batch": 4, "steps": 2, "seed": 5, "vae_precision": vae},
        **{"backend": "eager", "device": "cpu"},
    )
    model = describe_model(MODEL, config, "a {name}", {})
    given = coreset(tmp_path, "dace", SIZE_PX, model=model)
    require_same(
        lambda world: open_coreset_source(
            given, Machine(device="cpu", world=world, model=MODEL, expand=config)
        ),
        12,
    )
    assert sent == [8 * VALUES * width] * 2


class Drawn:
    """An engine of one image per call, which makes what it is told to."""

    def __init__(self, images_NCHW: torch.Tensor) -> None:
        self.images_NCHW = images_NCHW

    def calls(self, samples_P: torch.Tensor) -> list[Any]:
        return [at.numpy() for at in torch.arange(len(samples_P)).split(1)]

    def expand(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
        return self.images_NCHW[samples_P]


FP16, BF16, BOTH = 1 - 2**-11, 2.0**-30, -0.0
"""Values that only the one type holds, and one that both hold; 0.1 and NaN count as in neither."""


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ((BOTH, FP16), 2),
        ((BF16, BOTH), 2),
        ((FP16,), 2),  # rank 1 makes nothing
        ((BF16, FP16), 4),
        ((FP16, 0.1), 4),
        ((float("nan"), BOTH), 4),
    ],
)
def test_a_type_must_hold_the_images_of_all_ranks(
    sent: list[int], values: tuple[float, ...], width: int
) -> None:
    images_NCHW = torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 3, SIZE_PX, SIZE_PX)
    made: Any = Expansions(
        expander=Drawn(images_NCHW),  # type: ignore[arg-type]
        labels_N=torch.zeros(len(values), dtype=torch.int64),
        class_ids=("disc",),
    )

    def source(world: World) -> Any:
        return nullcontext(made if world.size == 1 else SharedImages(made, world))

    require_same(source, len(values))
    assert sent == [VALUES * width] * 2


def test_real_images_travel_as_8_bit_pixels(tmp_path: Path, sent: list[int]) -> None:
    """30 images: 15 from each rank."""
    plan: Any = SimpleNamespace(
        **{
            "train": new_sets(tmp_path / "set")[0],
            "class_names": tuple("abcdefghij"),
            "samples": 30,
        },
        **{"image_size": SIZE_PX, "seed": 5, "device": "cpu"},
    )
    require_same(lambda world: open_source(plan, None, world), 30)
    assert sent == [15 * VALUES] * 2


@pytest.mark.parametrize(
    ("method", "size_px", "settings"),
    [
        ("random", 32, {}),
        ("rded", 32, {}),
        ("dsco", 16, {"factor": 1, "ipc": 4, "samples_per_class": 4}),
        (
            *("t2i", 16),
            {"factor": 1, "ipc": 8, "generated": 4, "variants": 1, "samples_per_class": 4},
        ),
    ],
)
def test_what_every_rank_has_is_not_sent(
    tmp_path: Path, sent: list[int], method: str, size_px: int, settings: dict[str, Any]
) -> None:
    """Patches, mosaics, whole images and their variants."""
    given = coreset(tmp_path, method, size_px, settings=settings)
    require_same(lambda world: open_coreset_source(given, Machine(device="cpu", world=world)), 12)
    assert sent == []
