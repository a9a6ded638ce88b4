"""ExpandedLoader: the coreset's views and labels, in any loop, resumable, leaving no threads.

A pool holds 16 of the 42 samples, so batches of 12 span pools.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from label_cases import codec_of
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import Coreset, attach_labels, write_coreset
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.expand.expander import Expander
from patchbloom.export.config import BackendName
from patchbloom.export.models import find_model
from patchbloom.train.config import StudentConfig
from patchbloom.train.labels.recording import RecordedLabels, record_labels
from patchbloom.train.labels.views import make_views, pools
from patchbloom.train.loader import ExpandedLoader
from patchbloom.train.methods.source import UpsampledPatches
from patchbloom.train.networks import build_network
from patchbloom.train.run.progress import Report
from patchbloom.train.teacher.teacher import Teacher
from torch.nn.functional import cross_entropy

README = Path(__file__).resolve().parent.parent / "README.md"
IDS = tuple("abcdefghijklmnopqrstu")  # 21: the fewest classes that allow top-10 labels
SAMPLES, EPOCHS, BATCH = 42, 3, 12
CONFIG = StudentConfig(
    network="convnet-d3-w8",
    size_px=32,
    epochs=EPOCHS,
    batch=8,
    pool=20,
    temperature=4.0,
    device="cpu",
)


@pytest.fixture(scope="module")
def source() -> UpsampledPatches:
    shape = (SAMPLES, 16, 16, 3)
    draw = torch.Generator().manual_seed(0)
    return UpsampledPatches(
        method="upsample",
        patches_NHWC=torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw),
        labels_N=torch.arange(len(IDS)).repeat_interleave(2),
        class_ids=IDS,
        size_px=32,
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(5)
    network = build_network("convnet-d3-w8", len(IDS), 32)
    return Teacher(network, architecture="convnet-d3-w8", class_ids=IDS, size_px=32)


def _write(source: UpsampledPatches, teacher: Teacher, folder: Path, codec) -> Coreset:
    write_coreset(
        folder,
        patches_NHWC=source.patches_NHWC,
        class_ids=IDS,
        class_names=IDS,
        settings={
            **{"method": "upsample", "seed": 0, "image_size_px": 32, "patch_px": 16},
            **{"factor": 1, "ipc": 2},
        },
        provenance={},
    )
    path = folder.parent / f"{codec}.partial"
    with Report() as record:
        labels = RecordedLabels(teacher, source, CONFIG, path, record, codec=codec_of(codec, 10))
        record_labels(source, labels, CONFIG, record)
    return attach_labels(folder, labels.block())


@pytest.fixture(scope="module")
def coreset(source, teacher, tmp_path_factory: pytest.TempPathFactory) -> Coreset:
    return _write(source, teacher, tmp_path_factory.mktemp("dense") / "coreset", "dense")


@pytest.fixture
def loader(coreset: Coreset) -> Iterator[ExpandedLoader]:
    with ExpandedLoader(coreset, batch=BATCH, device="cpu", class_indices=True) as loader:
        yield loader


def _epoch(loader: ExpandedLoader) -> list[tuple[torch.Tensor, ...]]:
    return list(loader)


def _same(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for these, those in zip(one, other, strict=True)
        for a, b in zip(these, those, strict=True)
    )


def _producers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "producer"]


def test_an_epoch_is_every_sample_once_as_it_was_labelled(loader, source, teacher) -> None:
    for epoch in range(EPOCHS):
        expected = {}
        for samples_P in pools(CONFIG, source.labels_N, epoch):
            views_PCHW = make_views(source.render(samples_P, epoch), samples_P, epoch, CONFIG)
            labels_PK = (teacher.logits(views_PCHW).half().float() / 4).softmax(1)
            for view, label, sample in zip(views_PCHW, labels_PK, samples_P, strict=True):
                expected[view.numpy().tobytes()] = label, source.labels_N[sample]
        batches = _epoch(loader)
        assert [len(images) for images, _, _ in batches] == [12, 12, 12, 6]
        assert len(loader) == len(batches)
        for images_BCHW, labels_BK, classes_B in batches:
            assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
            for image, label, index in zip(images_BCHW, labels_BK, classes_B, strict=True):
                then, class_index = expected.pop(image.numpy().tobytes())
                assert torch.equal(label, then)
                assert index == class_index
        assert not expected


def test_the_order_is_of_the_seed_and_the_epoch_and_of_no_timing(coreset, loader) -> None:
    first, second = _epoch(loader), _epoch(loader)
    with ExpandedLoader(coreset, batch=BATCH, device="cpu", class_indices=True, ahead=5) as other:
        assert _same(_epoch(other), first)
        assert _same(_epoch(other), second)
        other.set_epoch(0)
        assert _same(_epoch(other), first)
    with ExpandedLoader(coreset, batch=BATCH, device="cpu", seed=1, drop_last=True) as other:
        assert len(other) == len(shuffled := _epoch(other)) == 3
    assert all(len(batch) == 2 for batch in shuffled)
    assert not _same([batch[:2] for batch in first[:3]], shuffled)
    assert not torch.equal(first[0][2], second[0][2])


@pytest.mark.parametrize("done", range(5))
def test_a_state_taken_in_the_middle_of_an_epoch_gives_the_same_rest(
    coreset, loader, done: int
) -> None:
    whole = _epoch(loader), _epoch(loader), _epoch(loader)
    loader.set_epoch(1)
    begun = iter(loader)
    for _ in range(min(done, 4)):
        next(begun)
    state = json.loads(json.dumps(loader.state_dict()))
    with ExpandedLoader(coreset, batch=BATCH, device="cpu", class_indices=True) as resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        if done < 4:
            resumed.set_epoch(1)  # as a loop over epochs does
            assert _same(_epoch(resumed), whole[1][done:])
        assert _same(_epoch(resumed), whole[2])
    told = "state of a loader with batch = 12, this one has 6"
    with (
        ExpandedLoader(coreset, batch=6, device="cpu") as other,
        pytest.raises(ValueError, match=told),
    ):
        other.load_state_dict(state)


def test_epochs_end_where_the_labels_do(coreset, loader) -> None:
    for _ in range(EPOCHS):
        _epoch(loader)
    assert not _producers()
    for beyond in (lambda: next(iter(loader)), lambda: loader.set_epoch(3)):
        with pytest.raises(ValueError, match="epoch 3: expected 0 to 2"):
            beyond()
    with pytest.raises(ValueError, match="epochs 4: expected 3 at most, which have labels"):
        ExpandedLoader(coreset, batch=BATCH, epochs=4)


def test_leaving_early_and_closing_leave_no_thread(loader) -> None:
    for _ in loader:
        assert _producers()
        break
    assert not _producers()
    _epoch(loader)  # the next epoch is already being rendered
    assert _producers()
    begun = iter(loader)
    next(begun)
    loader.close()
    assert not _producers()
    with pytest.raises(ValueError, match="the loader was closed"):
        list(begun)
    with pytest.raises(ValueError, match="the loader is closed"):
        next(iter(loader))
    loader.close()


def test_a_loader_that_nobody_closes_lets_the_program_end(coreset) -> None:
    """At exit the next epoch is being rendered, or waits in its slots."""
    code = (
        "import sys\n"
        "from patchbloom.train.loader import ExpandedLoader\n"
        "loader = ExpandedLoader(sys.argv[1], batch=12, device='cpu')\n"
        "print(sum(len(images) for images, _ in loader))\n"
    )
    command = [sys.executable, "-c", code, str(coreset.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SAMPLES}\n", "")


def test_an_error_of_the_producer_comes_with_its_traceback(loader, monkeypatch) -> None:
    render = UpsampledPatches.render

    def damaged(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
        if len(samples_P) == 10:  # the last pool
            raise OSError("the disk is gone")
        return render(self, samples_P, epoch)

    monkeypatch.setattr(UpsampledPatches, "render", damaged)
    got: list[tuple[torch.Tensor, ...]] = []
    with pytest.raises(OSError, match="the disk is gone") as error:
        got.extend(loader)
    assert len(got) == 2  # 24 of the 32 samples before it; 8 wait for a full batch
    assert "damaged" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert not _producers()
    monkeypatch.undo()
    assert len(_epoch(loader)) == 4


@pytest.mark.parametrize("ahead", [1, 3])
def test_rendering_is_ahead_by_so_many_pools_and_no_more(coreset, monkeypatch, ahead: int) -> None:
    rendered = []
    render = UpsampledPatches.render

    def counted(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
        rendered.append(epoch)
        return render(self, samples_P, epoch)

    monkeypatch.setattr(UpsampledPatches, "render", counted)
    with ExpandedLoader(coreset, batch=8, device="cpu", ahead=ahead) as loader:
        begun = iter(loader)
        next(begun)
        until = time.monotonic() + 20
        while len(rendered) < 1 + ahead and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(rendered) == 1 + ahead
        for _ in range(3):  # the rest of the first pool, and the second: two batches each
            next(begun)
        time.sleep(0.1)
        assert len(rendered) <= 2 + ahead
    assert rendered == [0, 0, 0, 1, 1, 1][: len(rendered)]  # on into the next epoch


def test_a_second_iteration_ends_the_first(loader) -> None:
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(ValueError, match="began another iteration before this one ended"):
        next(first)
    assert len(list(second)) == 3


def test_labels_of_a_teacher_and_of_other_kinds(coreset, teacher) -> None:
    stored = coreset.soft_labels()
    options = {"batch": SAMPLES, "device": "cpu"}
    with ExpandedLoader(coreset, **options) as loader:
        ((images, probabilities),) = _epoch(loader)
    with ExpandedLoader(coreset, **options, teacher=teacher) as loader:
        ((again, asked),) = _epoch(loader)
        assert torch.equal(images, again)
        assert torch.equal(probabilities, asked)
        loader.set_epoch(1000)  # a teacher answers in any epoch
        next(iter(loader))
    with ExpandedLoader(coreset, **options, labels="logits") as loader:
        ((_, logits),) = _epoch(loader)
    torch.testing.assert_close((logits / 4).softmax(1), probabilities)
    assert sorted(logits.sum(1).tolist()) == pytest.approx(
        sorted(stored.targets(0, torch.arange(SAMPLES)).labels.float().sum(1).tolist())
    )
    with ExpandedLoader(coreset, **options, temperature=1.5) as loader:
        ((_, sharper),) = _epoch(loader)
        assert loader.temperature == 1.5
    torch.testing.assert_close((logits / 1.5).softmax(1), sharper)


def test_top_k_labels_are_probabilities_at_their_temperature(
    source, teacher, coreset, tmp_path: Path
) -> None:
    folder = tmp_path / "coreset"
    topk = _write(source, teacher, folder, "topk")
    with ExpandedLoader(folder, batch=SAMPLES, device="cpu") as loader:
        ((_, labels),) = _epoch(loader)
    torch.testing.assert_close(labels.sum(1), torch.ones(SAMPLES))
    with ExpandedLoader(coreset, batch=SAMPLES, device="cpu") as loader:
        ((_, dense),) = _epoch(loader)
    best = labels.topk(10).values
    torch.testing.assert_close(best, dense.topk(10).values, rtol=0, atol=1e-3)
    with pytest.raises(CoresetError, match="top-k labels keep no logits"):
        ExpandedLoader(topk, batch=4, device="cpu", labels="logits")
    with pytest.raises(CoresetError, match=r"expected temperature 2.0, got top-k labels at 4\.0"):
        ExpandedLoader(topk, batch=4, device="cpu", temperature=2.0)


def test_labels_in_principal_components_are_logits(
    source, teacher, coreset, tmp_path: Path
) -> None:
    folder = tmp_path / "coreset"
    _write(source, teacher, folder, "pca")
    options = {"batch": SAMPLES, "device": "cpu", "temperature": 2.0}
    with ExpandedLoader(folder, **options, labels="logits") as loader:
        ((_, logits),) = _epoch(loader)
    with ExpandedLoader(coreset, **options, labels="logits") as loader:
        ((_, dense),) = _epoch(loader)
    centred = dense - dense.mean(1, keepdim=True)
    error, spread = (logits - centred).square().mean(), (centred - centred.mean(0)).square().mean()
    assert 0 < float(error / spread) < 0.3  # 10 of 20 components of an untrained teacher's answers
    with ExpandedLoader(folder, **options) as loader:
        ((_, probabilities),) = _epoch(loader)
    torch.testing.assert_close((logits / 2.0).softmax(1), probabilities)


def test_a_coreset_without_labels_needs_a_teacher_and_views(
    source, teacher, coreset, tmp_path: Path
) -> None:
    bare = write_coreset(
        tmp_path / "coreset",
        patches_NHWC=source.patches_NHWC,
        class_ids=IDS,
        class_names=IDS,
        settings=coreset.settings,
        provenance={},
    )
    with pytest.raises(CoresetError, match="holds no soft labels"):
        ExpandedLoader(bare, batch=4, device="cpu")
    views = replace(CONFIG, cutmix=False)
    with ExpandedLoader(bare, batch=4, device="cpu", teacher=teacher, views=views) as loader:
        assert len(_epoch(loader)) == 11
    with ExpandedLoader(bare, batch=4, device="cpu", teacher=teacher.network) as loader:
        (_, labels), *others = _epoch(loader)
    assert len(others) == 10
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


@pytest.mark.parametrize("cutmix", [False, True])
def test_hard_targets_are_the_classes(coreset, source, cutmix: bool) -> None:
    views = replace(CONFIG, cutmix=cutmix)
    options = {"batch": SAMPLES, "class_indices": True, "targets": "hard", "device": "cpu"}
    with ExpandedLoader(coreset, views=views, **options) as loader:
        assert (loader.epochs, loader.temperature) == (None, 1.0)
        ((_, labels_NK, classes_N),) = _epoch(loader)
    assert classes_N.sort().values.equal(source.labels_N)
    own_N = labels_NK[torch.arange(SAMPLES), classes_N]
    torch.testing.assert_close(labels_NK.sum(1), torch.ones(SAMPLES))
    assert bool((own_N == 1).all()) != cutmix
    assert (labels_NK > 0).sum(1).max() <= 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 0}, "batch 0: expected 1 or more"),
        ({"batch": 4, "ahead": 0}, "ahead 0: expected 1 or more"),
        ({"batch": 4, "labels": "hard"}, "labels 'hard': expected one of probabilities, logits"),
        ({"batch": 4, "temperature": 0.0}, "temperature 0.0: expected more than 0"),
        ({"batch": 4, "targets": "herd"}, "targets 'herd' is unknown: perhaps hard"),
        ({"batch": 4, "targets": "hard", "temperature": 2.0}, "expected 1 with hard targets"),
        ({"batch": 4, "targets": "hard", "teacher": "x"}, "targets 'hard' need no teacher: give"),
        ({"batch": 43, "drop_last": True}, "batch 43 with drop_last: expected at most 42, the im"),
        ({"batch_size": 4}, "ExpandedLoader: option 'batch_size' is unknown: perhaps batch"),
        ({"num_workers": 4, "batch": 4}, "option 'num_workers' is unknown: expected one of ahead"),
        ({}, "ExpandedLoader needs batch, the images per step"),
        ({"batch": 4, "views": replace(CONFIG, size_px=224)}, "views of 224 px: expected 32, the"),
    ],
)
def test_options_that_cannot_be_used(coreset, options, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExpandedLoader(coreset, **options)


def test_the_readmes_example_trains(coreset, tmp_path: Path, monkeypatch) -> None:
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
        if ".loader(" in block
    ]
    shutil.copytree(coreset.folder, tmp_path / "runs" / "demo" / "coreset")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(example, str(README), "exec"), namespace)
    assert namespace["loader"].epochs == EPOCHS
    steps = [state["step"] for state in namespace["optimizer"].state.values()]
    assert steps
    assert set(map(float, steps)) == {EPOCHS * len(namespace["loader"])}
    assert torch.isfinite(namespace["loss"])
    assert not _producers()


def test_a_lightning_trainer_fits_from_it(loader, tmp_path: Path) -> None:
    import pytorch_lightning as lightning  # takes seconds

    class Student(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = build_network("convnet-d3-w8", len(IDS), 32)
            self.seen: list[int] = []

        def training_step(self, batch, index: int) -> torch.Tensor:
            images_BCHW, labels_BK, _ = batch
            self.seen.append(loader.state_dict()["epoch"])
            return cross_entropy(self.network(images_BCHW) / loader.temperature, labels_BK)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    student = Student()
    before = [parameter.clone() for parameter in student.parameters()]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(student, train_dataloaders=loader)
    assert trainer.global_step == EPOCHS * len(loader)
    assert sorted(set(student.seen)) == list(range(EPOCHS + 1))
    assert not any(map(torch.equal, before, student.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_users_default_dtype_changes_nothing(coreset: Coreset, dtype: torch.dtype) -> None:
    with ExpandedLoader(coreset, batch=BATCH, device="cpu") as plain:
        expected = _epoch(plain)
    torch.set_default_dtype(dtype)
    try:
        with ExpandedLoader(coreset, batch=BATCH, device="cpu") as loader:
            assert _same(_epoch(loader), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["eager", pytest.param("ort", marks=pytest.mark.slow)])
def test_the_users_default_dtype_changes_no_image(backend: BackendName, tmp_path: Path) -> None:
    """It changes no image of a model, and no engine that is built under it for others."""
    patches_NHWC = torch.randint(
        256, (2, 32, 32, 3), generator=torch.manual_seed(0), dtype=torch.uint8
    )

    def images(dtype: torch.dtype) -> torch.Tensor:
        config = ExpandConfig(
            **{"size_px": 64, "batch": 2, "steps": 2, "rho": 0.5, "device": "cpu"},
            backend=backend,
            bundles=tmp_path / str(dtype),
        )
        torch.set_default_dtype(dtype)
        try:
            expander = Expander(
                find_model("sdxl-tiny"),
                config,
                patches_NHWC=patches_NHWC,
                labels_N=torch.arange(2),
                prompts_K=("A photo of a disc", "A photo of a ring"),
            )
            return expander.expand([0, 1], epoch=0)
        finally:
            torch.set_default_dtype(torch.float32)

    expected = images(torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(images(dtype), expected)
