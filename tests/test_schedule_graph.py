"""A batch's evaluations as one CUDA graph, and work that waits for no GPU; all on a CPU.

The stand-in for torch.cuda.graph records every operator with the tensors that it read and wrote.
A replay runs them on the same tensors again, as a CUDA graph does: host numbers stay as they
were, and a value outside the inputs' buffers is never seen. It proves that a replay computes what
the host would; it proves nothing of streams, memory pools or kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand import batches, prompt_bank
from patchbloom.engine.expand import expander as expanding
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.schedule_graph import ScheduleGraph
from patchbloom.engine.labels.codecs import SoftTargets
from patchbloom.export.models import find_model
from patchbloom.train.labels import views
from patchbloom.train.prior.model import new_parts, save_parts
from patchbloom.train.students import student as learning
from patchbloom.train.students.slots import Pool, PoolSlot
from pictures import CONTROLS, Coreset, expander_cases
from student_cases import CONFIG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LABELS_N = np.repeat(np.arange(3), 4)


@pytest.fixture(scope="module")
def expander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Expander]:
    """Twelve random patches of three classes, expanded four at a time."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_parts(
        new_parts(32, folder / "words", unet_channels=(16, 32, 64), vae_channels=(8, 16, 16)),
        folder / "model",
    )
    made = Expander(
        find_model(folder / "model"),
        ExpandConfig(size_px=32, batch=4, steps=3, rho=0.7, backend="eager", device="cpu"),
        patches_NHWC=torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8),
        labels_N=LABELS_N,
        prompts_K=("disc", "star", "cross"),
    )
    yield made
    made.close()


class Recording(TorchDispatchMode):
    """Runs and records operators; refuses those that read a number on the host."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


class StandInGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """The graphs that are recorded in a test."""
    graphs: list[StandInGraph] = []

    @contextlib.contextmanager
    def record(graph: StandInGraph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        with Recording(graph.calls):
            yield
        graphs.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    return graphs


SAMPLES = np.array([3, 0, 11, 7, 5, 6, 1, 2, 10, 4])
"""Three calls, the last one padded."""


def test_a_graph_makes_the_same_images(
    expander: Expander, recorded: list[StandInGraph], monkeypatch: pytest.MonkeyPatch
):
    right = [expander.expand(SAMPLES, epoch) for epoch in (0, 1, 5)]
    assert not torch.equal(right[0], right[1])
    monkeypatch.setattr(expander, "_graph", ScheduleGraph(expander._evaluate, "2 evaluations"))
    for epoch, images in zip((0, 1, 5), right, strict=True):
        assert torch.equal(expander.expand(SAMPLES, epoch), images)
    (graph,) = recorded
    assert graph.replays == 3 * 3 - 1  # the first call runs as it is


def test_wrong_prompts_and_timesteps_of_the_bench_reach_a_replay(
    expander: Expander, recorded: list[StandInGraph], monkeypatch: pytest.MonkeyPatch
):
    coreset = Coreset(torch.empty(0), LABELS_N, ("disc", "star", "cross"))
    launched = expander_cases(expander, coreset, torch.from_numpy(SAMPLES))
    monkeypatch.setattr(expander, "_graph", ScheduleGraph(expander._evaluate, "2 evaluations"))
    replayed = expander_cases(expander, coreset, torch.from_numpy(SAMPLES))
    assert recorded[0].replays == 3 * 3 - 1
    for name in ("same", *CONTROLS):
        assert torch.equal(replayed[name], launched[name])
        assert torch.equal(replayed[name], replayed["same"]) is (name == "same")
    assert torch.equal(expander.expand(SAMPLES, 0), launched["same"])  # and nothing stays wrong


def test_what_cannot_be_recorded_runs_as_it_is(
    expander: Expander,
    recorded: list[StandInGraph],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    right, denoise = expander.expand(SAMPLES, 2), expander.backend.denoise

    def reading(x_BCHW: Tensor, *others: Tensor) -> Tensor:
        assert float(x_BCHW.abs().max()) > 0  # a number read on the host
        return denoise(x_BCHW, *others)

    monkeypatch.setattr(expander.backend, "denoise", reading)
    monkeypatch.setattr(expander, "_graph", ScheduleGraph(expander._evaluate, "2 evaluations"))
    assert torch.equal(expander.expand(SAMPLES, 2), right)
    assert recorded == []
    told = capsys.readouterr().err
    assert told.count("2 evaluations cannot be recorded as a CUDA graph (operation not") == 1


class NoWaiting(TorchDispatchMode):
    """The meta device stands in for a GPU: refuses copies to it that `upload` did not make.

    It has no numbers, so that reading one, or indexing by a mask, fails by itself.
    """

    uploading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = [each.device.type for each in tree_leaves(args) if isinstance(each, Tensor)]
        if isinstance(made, Tensor) and made.is_meta and "cpu" in devices and not self.uploading:
            raise AssertionError(f"{func} copies from pageable memory, and waits")
        return made


META = torch.device("meta")


def uploading(mode: NoWaiting, uploads: list[tuple[int, ...]]) -> Callable[..., Tensor]:
    """A stand-in for `upload`, which alone may copy."""

    def upload(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
        assert device == META
        mode.uploading = True
        placed = torch.as_tensor(numbers).to(device)
        mode.uploading = False
        uploads.append(tuple(numbers.shape))
        return placed

    return upload


def test_an_expansion_waits_for_no_gpu(expander: Expander, monkeypatch: pytest.MonkeyPatch):
    mode, uploads = NoWaiting(), []
    for module in (batches, prompt_bank, expanding):
        monkeypatch.setattr(module, "upload", uploading(mode, uploads))
    bank = expander.prompt_bank
    for owner in (expander, bank):
        for name, value in list(vars(owner).items()):
            if isinstance(value, Tensor):
                monkeypatch.setattr(owner, name, value.to(META))
        monkeypatch.setattr(owner, "_device", META)
    timesteps = [each.to(META) for each in expander._timesteps_1]
    monkeypatch.setattr(expander, "_timesteps_1", timesteps)
    monkeypatch.setattr(expander, "require_numbers", lambda images: None)  # waits once a call

    def denoise(x_BCHW: Tensor, *_: Tensor) -> Tensor:
        return x_BCHW.float()

    def decode(latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW.new_empty(len(latents_BCHW), 3, 32, 32)

    monkeypatch.setattr(expander.backend, "denoise", denoise)
    monkeypatch.setattr(expander.backend, "decode", decode)
    with mode:
        images = expander.expand(SAMPLES, 3)
    assert (images.shape, images.is_meta) == ((len(SAMPLES), 3, 32, 32), True)
    assert uploads == [(3, 3, 4)]


def test_a_pools_views_wait_for_no_gpu(monkeypatch: pytest.MonkeyPatch):
    mode, uploads = NoWaiting(), []
    monkeypatch.setattr(views, "upload", uploading(mode, uploads))
    images = torch.empty(6, 3, 32, 32, device=META)
    with mode:
        made = views.make_views(images, torch.arange(6), 2, CONFIG)
    assert (made.shape, made.is_meta) == ((6, 3, 32, 32), True)
    assert sorted(uploads) == [(6,), (6,), (6, 4), (6, 4)]


def test_a_student_waits_for_no_gpu_within_a_pool(monkeypatch: pytest.MonkeyPatch):
    """Without fused AdamW, autocast and our loss, which take no meta tensors."""
    mode, uploads = NoWaiting(), []
    monkeypatch.setattr(learning, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(learning, "softlabel", lambda scores_BK, *_, **__: scores_BK.sum(1))
    monkeypatch.setattr(learning, "upload", uploading(mode, uploads))
    learner = learning.Student(0, CONFIG, 3, torch.device("cpu"))
    learner.network.to(META)
    learner.optimizer = torch.optim.SGD(learner.network.parameters(), foreach=True)
    learner.device, learner._epoch_loss = META, learner._epoch_loss.to(META)
    slot = PoolSlot()
    slot.views_PCHW = torch.empty(20, 3, 32, 32, device=META)
    slot.targets_P = SoftTargets(torch.empty(20, 3, device=META, dtype=torch.float16))
    with mode:
        learner.train_pool(Pool(0, 0, False, torch.arange(20)), slot, 0.1, 40, lambda: False)
    assert (learner.pool, uploads) == (1, [(20,)])
