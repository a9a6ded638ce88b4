"""Soft labels: recorded, resumed or stored, they train the same student, and none is lost."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from label_cases import LabelBlock, codec_of
from patchbloom.engine.coreset.coreset import Coreset, attach_labels, open_coreset, write_coreset
from patchbloom.engine.coreset.manifest import LABELS
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.labels.codecs import (
    CodecName,
    Dense,
    Encoding,
    Pca,
    SoftTargets,
    TopK,
    decode_topk,
)
from patchbloom.engine.labels.file import (
    LabelLayout,
    MappedParts,
    fill_with_missing,
    write_label_file,
)
from patchbloom.engine.labels.stored import SoftLabels
from patchbloom.export.machine import return_free_memory
from patchbloom.kernels.softlabel import softlabel
from patchbloom.train.config import StudentConfig
from patchbloom.train.labels.recording import RecordedLabels, discard_recorded, record_labels
from patchbloom.train.labels.targets import OnlineLabels, StoredLabels
from patchbloom.train.labels.views import pools
from patchbloom.train.methods.source import UpsampledPatches
from patchbloom.train.students.loop import StudentResult
from patchbloom.train.teacher.teacher import Teacher
from safetensors.torch import save_file
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
)

EVERY = torch.arange(40)
KEPT = 3
"""Probabilities or components kept per answer, of ten classes."""
BYTES = {"dense": 4 * 40 * 10 * 2, "topk": 4 * 40 * KEPT * 4, "pca": 4 * 40 * KEPT + 4 * 10 * 4}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return new_sets(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture(scope="module")
def source(sets: Sets) -> UpsampledPatches:
    return upsampled(sets)


@pytest.fixture(scope="module")
def teacher(sets: Sets) -> Teacher:
    """Peaked like a trained one: three of ten classes miss 4 % of an answer on average."""
    return untrained_teacher(sets, sharpness=2000.0)


@dataclass(frozen=True)
class Recorded:
    """Students trained while their labels were recorded, and the coreset that stores these."""

    config: StudentConfig
    codec: CodecName
    results: list[StudentResult]
    coreset: Coreset

    @property
    def stored(self) -> SoftLabels:
        stored = self.coreset.soft_labels()
        assert stored is not None
        return stored


@pytest.fixture(
    scope="module", params=["dense", "dense-cutmix", "topk", "topk-cutmix", "pca", "pca-cutmix"]
)
def recorded(request, sets, source, teacher, tmp_path_factory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    codec, _, cutmix = request.param.partition("-")
    config = replace(CONFIG, cutmix=bool(cutmix))
    path = folder / "labels.partial"
    labels = RecordedLabels(teacher, source, config, path, Silent(), codec=codec_of(codec, KEPT))
    results = train(source, labels, sets, folder / "students", config)
    kept = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert kept.pop("labels.partial.json") < 2000
    assert kept.pop("labels.partial.sums") < 1000
    assert kept == {"labels.partial": BYTES[codec]}
    return Recorded(config, codec, results, attach_labels(new_coreset(folder), labels.block()))


def new_coreset(folder: Path) -> Path:
    ids = [f"{number:02}" for number in range(10)]
    write_coreset(
        folder / "coreset",
        patches_NHWC=PATCHES,
        class_ids=ids,
        class_names=ids,
        settings={
            **{"method": "upsample", "seed": 0, "image_size_px": 32},
            **{"factor": 2, "patch_px": 16, "ipc": 1},
        },
        provenance={},
    )
    return folder / "coreset"


def rows(labels: SoftLabels, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    targets = labels.targets(epoch, EVERY)
    return targets.labels, targets.classes


def equal(one: SoftLabels, other: SoftLabels) -> bool:
    pairs = [
        pair
        for epoch in range(CONFIG.epochs)
        for pair in zip(rows(one, epoch), rows(other, epoch), strict=True)
    ]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def record(
    recorded: Recorded, source: UpsampledPatches, teacher: Teacher, path: Path, report=None
) -> RecordedLabels:
    """Record labels of the same views, without students."""
    report, config = report or Silent(), recorded.config
    labels = RecordedLabels(
        teacher, source, config, path, report, codec=codec_of(recorded.codec, KEPT)
    )
    record_labels(source, labels, config, report)
    return labels


def stored_of(labels: RecordedLabels, folder: Path) -> SoftLabels:
    folder.mkdir(exist_ok=True)
    stored = attach_labels(new_coreset(folder), labels.block()).soft_labels()
    assert stored is not None
    return stored


def test_stored_labels_give_the_students_that_recording_gave(
    recorded: Recorded, sets, source, tmp_path: Path
) -> None:
    labels = StoredLabels(recorded.stored, source, recorded.config)
    again = train(source, labels, sets, tmp_path, recorded.config)
    assert all(same(one, other) for one, other in zip(recorded.results, again, strict=True))
    assert [r.accuracy for r in again] == [r.accuracy for r in recorded.results]
    assert not same(*again)


def test_online_labels_give_the_students_of_dense_ones_and_nearly_those_of_other_codecs(
    recorded: Recorded, sets, source, teacher, tmp_path: Path
) -> None:
    config = recorded.config
    online = train(source, OnlineLabels(teacher, config.temperature), sets, tmp_path, config)
    pairs = list(zip(recorded.results, online, strict=True))
    assert all(same(one, other) for one, other in pairs) == (recorded.codec == "dense")
    for one, other in pairs:
        # Top-3 drops 4 % of the mass; 3 of 9 components drop the least variance.
        rel = 0.1 if recorded.codec == "pca" else 0.05
        assert one.losses == pytest.approx(other.losses, rel=rel)


@pytest.mark.parametrize("scale", [0.01, 5.0, 80.0])
@pytest.mark.parametrize("k", [1, 4, 49])
def test_topk_answers_and_gradients_are_within_the_stated_bound(scale: float, k: int) -> None:
    generator, temperature = torch.Generator().manual_seed(0), 4.0
    logits_NK = (scale * torch.randn(64, 100, generator=generator)).half()
    encoding = Encoding(TopK(k), temperature)
    kept = encoding.decode(encoding.encode(logits_NK))
    assert kept.classes is not None
    exact_NK = (logits_NK.double() / temperature).softmax(1)
    full_NK = decode_topk(kept.labels, kept.classes, 100).double()
    left_out_N = 1 - exact_NK.gather(1, kept.classes.long()).sum(1)
    bound_N = 2 * left_out_N + 2**-10 + k * 2**-24
    assert bool(((full_NK - exact_NK).abs().sum(1) <= bound_N).all())
    student_NK, gradients = torch.randn(64, 100, generator=generator), []
    for targets in (kept, SoftTargets(logits_NK)):
        leaf_NK = student_NK.clone().requires_grad_()
        softlabel(
            leaf_NK, targets.labels, targets.classes, temperature=temperature
        ).sum().backward()
        assert leaf_NK.grad is not None
        gradients.append(leaf_NK.grad.double())
    moved_N = (gradients[0] - gradients[1]).abs().sum(1)
    assert bool((moved_N <= bound_N / temperature + 1e-6).all())
    assert scale < 1 or float((moved_N * temperature / bound_N).max()) > 0.1  # bound is not loose


def test_online_targets_are_the_teachers_answers(teacher) -> None:
    views = torch.randn(5, 3, 32, 32)
    targets = OnlineLabels(teacher, 4.0).targets(torch.arange(5), 0, views)
    assert targets.classes is None
    torch.testing.assert_close(targets.labels, teacher.network(views).half(), rtol=0, atol=0)


def test_labels_can_be_made_without_students(
    recorded: Recorded, source, teacher, tmp_path: Path
) -> None:
    labels = record(recorded, source, teacher, tmp_path / "labels.partial")
    assert equal(stored_of(labels, tmp_path / "of"), recorded.stored)
    discard_recorded(labels.path)
    assert [path.name for path in tmp_path.iterdir()] == ["of"]


class Counted(UpsampledPatches):
    """Logs the rendered epochs in `rendered`."""

    rendered: list[int] = []  # noqa: RUF012

    def render(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
        self.rendered.append(epoch)
        return super().render(samples_P, epoch)


def counted(source: UpsampledPatches) -> Counted:
    Counted.rendered.clear()
    return Counted(**{f.name: getattr(source, f.name) for f in fields(source)})


def test_stopped_labels_go_on(recorded: Recorded, source, teacher, tmp_path: Path) -> None:
    path = tmp_path / "labels.partial"
    with pytest.raises(KeyboardInterrupt):
        record(recorded, source, teacher, path, Silent(stop_after=3))
    labels = record(recorded, counted(source), teacher, path)
    assert set(Counted.rendered) == {3}
    assert equal(stored_of(labels, tmp_path), recorded.stored)


def test_one_flipped_bit_in_a_recording_is_found_and_made_again(
    recorded: Recorded, source, teacher, tmp_path: Path
) -> None:
    path = tmp_path / "labels.partial"
    with pytest.raises(KeyboardInterrupt):
        record(recorded, source, teacher, path, Silent(stop_after=3))
    good = path.read_bytes()
    places = [0, BYTES[recorded.codec] // 8 - 1] + [4 * 10 * 4 + 9] * (recorded.codec == "pca")
    for place in places:  # in the first epoch; of pca in the basis and in codes
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        report = Silent()
        labels = RecordedLabels(
            teacher, source, recorded.config, path, report, codec=codec_of(recorded.codec, KEPT)
        )
        assert not labels.is_complete()
        record_labels(source, labels, recorded.config, report)
        assert [line for line in report.said if f"labels: {path} is damaged (" in line]
        assert equal(stored_of(labels, tmp_path / str(place)), recorded.stored)


def test_a_recording_of_an_earlier_version_goes_on(
    recorded: Recorded, source, teacher, tmp_path: Path
) -> None:
    """It has no checksums: its answers are taken, and noted from then on."""
    path = tmp_path / "labels.partial"
    with pytest.raises(KeyboardInterrupt):
        record(recorded, source, teacher, path, Silent(stop_after=3))
    noted = (tmp_path / "labels.partial.sums").read_text()
    (tmp_path / "labels.partial.sums").unlink()
    labels = record(recorded, counted(source), teacher, path)
    assert set(Counted.rendered) == {3}
    assert (tmp_path / "labels.partial.sums").read_text().startswith(noted)
    assert equal(stored_of(labels, tmp_path), recorded.stored)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_training_resumes_with_the_labels_it_had(
    recorded: Recorded, sets, source, teacher, tmp_path: Path, stop_after: int
) -> None:
    config, path = recorded.config, tmp_path / "labels.partial"

    def session(report: Silent) -> tuple[RecordedLabels, list[StudentResult]]:
        labels = RecordedLabels(
            teacher, source, config, path, report, codec=codec_of(recorded.codec, KEPT)
        )
        return labels, train(source, labels, sets, tmp_path, config, report=report)

    with pytest.raises(KeyboardInterrupt):
        session(Silent(stop_after))
    labels, resumed = session(report := Silent())
    assert not report.said
    assert labels.is_complete()
    assert all(same(one, two) for one, two in zip(recorded.results, resumed, strict=True))
    assert equal(stored_of(labels, tmp_path), recorded.stored)


@pytest.mark.parametrize("codec", ["topk", "pca"])
def test_answers_survive_a_kill_9(source, teacher, tmp_path: Path, codec: CodecName) -> None:
    """One pool is stored and one answer half written when the process dies."""

    class Ready:
        sha256, class_ids = teacher.sha256, teacher.class_ids

        def logits(self, views: torch.Tensor) -> torch.Tensor:
            return torch.arange(400.0).view(40, 10)[: len(views)]

    def recording() -> RecordedLabels:
        path = tmp_path / "labels.partial"
        return RecordedLabels(Ready(), source, CONFIG, path, Silent(), codec=codec_of(codec, KEPT))  # pyright: ignore[reportArgumentType]

    recording()
    child = os.fork()
    if child == 0:
        labels = recording()
        labels.targets(EVERY[:16], 1, torch.zeros(16))
        first, *_ = MappedParts(labels.path, labels.layout, recording=True).answers
        first[1, 20, : KEPT - (codec == "pca")] = 0.5
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    labels = recording()
    assert labels.have([EVERY[:16]], 1)[0]
    assert not labels.have([EVERY[20:21]], 1)[0]  # classes (topk) or some codes (pca) are missing
    assert not any(labels.have([EVERY[n : n + 1]], e)[0] for n in range(16) for e in (0, 2, 3))


def test_a_basis_is_fitted_once_and_survives_a_kill_9(source, teacher, tmp_path: Path) -> None:
    """A resumed recording keeps the basis of the codes that it holds."""
    path = tmp_path / "labels.partial"
    child = os.fork()
    if child == 0:
        RecordedLabels(teacher, source, CONFIG, path, Silent(), codec=Pca(KEPT))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    begun = path.read_bytes()
    RecordedLabels(teacher, counted(source), CONFIG, path, Silent(), codec=Pca(KEPT))
    assert not Counted.rendered
    assert path.read_bytes() == begun
    path.write_bytes(begun[:100] + np.float32(np.nan).tobytes() + begun[104:])
    RecordedLabels(teacher, counted(source), CONFIG, path, Silent(), codec=Pca(KEPT))
    assert Counted.rendered == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # 96 answers: 3 epochs, 3 pools each
    assert path.read_bytes() == begun


def test_what_a_basis_keeps_is_told(source, teacher, tmp_path: Path) -> None:
    told = []
    for k in (KEPT, 9):
        report = Silent()
        path = tmp_path / f"{k}.partial"
        RecordedLabels(teacher, source, CONFIG, path, report, codec=Pca(k))
        (said,) = report.said
        assert said.startswith(f"labels: {k} components keep ")
        assert said.endswith("% of the variance of 12 answers that they were not fitted to") == (
            k == KEPT
        )
        told.append(float(said.split("keep ")[1].split(" %")[0]))
    assert 50 < told[0] < told[1]
    assert told[1] > 99.9


@pytest.mark.parametrize("damage", ["cut", "other views", "other codec"])
def test_a_recording_that_does_not_fit_is_begun_anew_and_told(
    source, teacher, tmp_path: Path, damage: str
) -> None:
    path, report = tmp_path / "labels.partial", Silent()
    config = replace(CONFIG, epochs=1)
    record_labels(
        source, RecordedLabels(teacher, source, config, path, report, codec=Dense()), config, report
    )
    assert RecordedLabels(teacher, source, config, path, report, codec=Dense()).is_complete()
    assert not report.said
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 2)
    config = replace(config, seed=8) if damage == "other views" else config
    codec: CodecName = "topk" if damage == "other codec" else "dense"
    labels = RecordedLabels(teacher, source, config, path, report, codec=codec_of(codec, KEPT))
    assert report.said == [f"labels: {path} is truncated or holds other labels: starting over"]
    assert not any(labels.have([EVERY[n : n + 1]], 0)[0] for n in range(40))


@pytest.mark.parametrize("lost", [1, 400, 2**9])
def test_a_label_file_that_was_cut_short_is_told_when_it_is_opened(
    recorded: Recorded, tmp_path: Path, lost: int
) -> None:
    path = (
        attach_labels(
            new_coreset(tmp_path), LabelBlock(codec="dense", logits=torch.zeros(2, 40, 10))
        ).folder
        / LABELS
    )
    size = path.stat().st_size
    os.truncate(path, size - lost)
    told = rf"labels.safetensors: expected {size} bytes, found {size - lost}"
    with pytest.raises(CoresetError, match=told):
        open_coreset(path.parent)
    with pytest.raises(CoresetError, match=f"{told}, it was cut short: restore the file, or label"):
        open_coreset(path.parent, verify=False).soft_labels()
    path.write_bytes(bytes(size))
    with pytest.raises(CoresetError, match="found another header"):
        open_coreset(path.parent, verify=False).soft_labels()


@pytest.mark.parametrize("codec", ["dense", "topk", "pca"])
def test_a_label_file_is_what_safetensors_writes(codec: CodecName, tmp_path: Path) -> None:
    logits = 3 * torch.randn(3, 7, 9)
    block = LabelBlock(codec=codec, logits=logits, k=4, temperature=2.0)
    layout = block.layout
    assert layout is not None
    epochs = [block.epoch(epoch) for epoch in range(3)]
    of_answers = [part.name for part in layout.parts if part.of_answers]
    stacked = map(np.stack, zip(*epochs, strict=True))
    whole = dict(zip(of_answers, map(torch.from_numpy, stacked), strict=True))
    whole |= {} if block.basis is None else {"basis": torch.from_numpy(block.basis)}
    save_file(whole, tmp_path / "theirs")
    write_label_file(tmp_path / "ours", layout, epochs.__getitem__, block.basis)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_size == len(layout.header()) + layout.bytes


def test_recorded_labels_are_stored_without_a_copy_in_memory(tmp_path: Path) -> None:
    """64 MB of labels, in a process that may allocate only 16 MiB."""
    layout = LabelLayout(codec=Dense(), epochs=32, samples=100_000, classes=10)
    fill_with_missing(tmp_path / "recording", layout)
    recording = MappedParts(tmp_path / "recording", layout, recording=True)
    for epoch in range(layout.epochs):
        recording.answers[0][epoch] = epoch
    before = resource.getrlimit(resource.RLIMIT_DATA)
    gc.collect()
    return_free_memory()  # what earlier tests left could be freed after the measurement
    status = Path("/proc/self/status").read_text()
    in_use = next(int(line.split()[1]) for line in status.splitlines() if line[:6] == "VmData")
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * in_use + 2**24, before[1]))
        with pytest.raises(MemoryError):
            recording.answers[0].copy()
        write_label_file(tmp_path / "labels", layout, lambda epoch: [recording.answers[0][epoch]])
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    written = MappedParts(tmp_path / "labels", layout).answers[0]
    assert all((written[epoch] == epoch).all() for epoch in range(layout.epochs))
    with pytest.raises(ValueError, match="read-only"):
        written[0, 0, 0] = 1


def test_the_next_pool_is_read_ahead(recorded: Recorded, source, monkeypatch) -> None:
    asked: list[tuple[int, list[int]]] = []
    stored = recorded.stored
    monkeypatch.setattr(stored, "read_ahead", lambda e, rows: asked.append((e, rows.tolist())))
    labels = StoredLabels(stored, source, recorded.config)
    order = [(e, pool_P) for e in range(4) for pool_P in pools(recorded.config, LABELS_N, e)]
    for epoch, pool_P in order:
        labels.targets(pool_P[:3], epoch, torch.zeros(1))
    assert asked == [(epoch, pool_P.tolist()) for epoch, pool_P in order[1:]]
    monkeypatch.undo()
    stored.read_ahead(3, EVERY)


@pytest.mark.parametrize("classes", [3, 700, 5000])  # many rows a page; 1-2 pages a row; several
def test_reading_ahead_covers_the_rows_and_little_else(tmp_path: Path, classes: int) -> None:
    layout = LabelLayout(codec=Dense(), epochs=2, samples=500, classes=classes)
    write_label_file(tmp_path / "l", layout, lambda _: [np.zeros((500, classes), np.float16)])
    labels = MappedParts(tmp_path / "l", layout)
    asked: list[range] = []

    class Spy:
        def madvise(self, option: int, start: int, length: int) -> None:
            assert option == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0
            asked.append(range(start, start + length))

    labels._mapped = Spy()  # pyright: ignore[reportAttributeAccessIssue]
    rows_B = np.random.default_rng(0).permutation(500)[:100]
    labels.read_ahead(1, rows_B)
    begins = (len(layout.header()) + (500 + rows_B) * 2 * classes).tolist()
    wanted = {byte // mmap.PAGESIZE for b in begins for byte in (b, b + 2 * classes - 1)}
    pages = [set(range(s.start // mmap.PAGESIZE, s.stop // mmap.PAGESIZE)) for s in asked]
    assert wanted <= set().union(*pages)
    assert all(len(span) <= 2**17 for span in asked)
    assert all({min(span), max(span)} <= wanted for span in pages)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"epochs": 9}, "at least 9 epochs, got 4"),
        ({"crop_scale": (0.3, 1.0)}, r"views with crop_scale = \[0.5, 1.0\], now it is \[0.3"),
        ({"seed": 8}, "seed = 0, now it is 8"),
        ({"flip": False}, "flip = True, now it is False"),
    ],
)
def test_labels_of_other_views_are_refused(
    recorded: Recorded, source, changed, expected: str
) -> None:
    with pytest.raises(CoresetError, match=expected):
        StoredLabels(recorded.stored, source, replace(recorded.config, **changed))


def test_labels_of_other_images_are_refused(recorded: Recorded, sets) -> None:
    other = mosaics(class_ids=sets[0].class_ids)
    with pytest.raises(CoresetError, match="source with factor = None, now it is 2"):
        StoredLabels(recorded.stored, other, recorded.config)
    fewer = replace(other, labels_N=LABELS_N[:20])
    with pytest.raises(CoresetError, match="expected 20 samples of 10 classes, got 40 of 10"):
        StoredLabels(recorded.stored, fewer, recorded.config)


def test_topk_labels_hold_for_one_temperature(recorded: Recorded, source) -> None:
    warmer = replace(recorded.config, temperature=2.0)
    if recorded.codec != "topk":
        StoredLabels(recorded.stored, source, warmer)
        return
    with pytest.raises(CoresetError, match=r"expected temperature 2.0, got top-k labels at 4\.0"):
        StoredLabels(recorded.stored, source, warmer)


def test_labels_that_are_not_complete_are_not_stored(source, teacher, tmp_path: Path) -> None:
    labels = RecordedLabels(
        teacher, source, CONFIG, tmp_path / "labels.partial", Silent(), codec=Dense()
    )
    labels.targets(EVERY, 0, torch.randn(40, 3, 32, 32))
    assert not labels.is_complete()
    folder = new_coreset(tmp_path)
    with pytest.raises(CoresetError, match="labels of epoch 1 are missing: train to the end"):
        attach_labels(folder, labels.block())
    assert open_coreset(folder).soft_labels() is None


def test_an_answer_that_no_codec_holds_is_refused_at_once(source, teacher, tmp_path: Path) -> None:
    labels = RecordedLabels(
        teacher, source, CONFIG, tmp_path / "labels.partial", Silent(), codec=Dense()
    )
    with pytest.raises(CoresetError, match="teacher logits: expected finite values"):
        labels.targets(EVERY[:2], 0, torch.full((2, 3, 32, 32), torch.nan))


def test_a_full_disk_is_told_before_anything_is_trained(
    source, teacher, tmp_path: Path, monkeypatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left for"):
        RecordedLabels(
            teacher, source, CONFIG, tmp_path / "labels.partial", Silent(), codec=Dense()
        )
    assert not list(tmp_path.iterdir())


def test_labels_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "labels.partial").symlink_to(tmp_path / "secret")
    layout = LabelLayout(codec=Dense(), epochs=1, samples=2, classes=3)
    with pytest.raises(FileExistsError):
        fill_with_missing(tmp_path / "labels.partial", layout)
    with pytest.raises(FileExistsError):
        write_label_file(tmp_path / "labels.partial", layout, lambda _: [])
    assert (tmp_path / "secret").read_text() == "mine"
