"""Hard labels: cross-entropy on classes mixed by area; students that need no teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbloom.kernels.softlabel import softlabel
from patchbloom.train import cli
from patchbloom.train.config import StudentConfig
from patchbloom.train.labels.hard import HardLabels
from patchbloom.train.labels.views import make_views
from patchbloom.train.teacher import teacher
from student_cases import CONFIG, LABELS_N, mosaics
from torch.nn.functional import cross_entropy

HARD = replace(CONFIG, targets="hard", temperature=1.0)
SAMPLES = torch.tensor([3, 39, 17, 0, 21, 8, 30, 12])


def loss_of(config: StudentConfig, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a random student, its loss [P], and its targets."""
    views = torch.empty(len(SAMPLES), 3, 1, 1)
    labels = HardLabels(mosaics(), config).targets(SAMPLES, epoch, views).labels
    logits = torch.randn(len(SAMPLES), 10, generator=torch.manual_seed(2)).requires_grad_()
    return logits, softlabel(logits, labels, temperature=1.0), labels


def test_without_cutmix_the_loss_is_cross_entropy() -> None:
    logits, loss, _ = loss_of(replace(HARD, cutmix=False), 0)
    expected = cross_entropy(logits, LABELS_N[SAMPLES], reduction="none")
    assert torch.allclose(loss, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(gradient, other, atol=1e-6)


def test_with_cutmix_classes_are_mixed_by_the_area_that_is_seen() -> None:
    """Each sample is one flat colour, so shares are counted in pixels."""
    config = replace(HARD, flip=False, crop_scale=(1.0, 1.0))
    mixed = 0
    for epoch in range(6):
        values = torch.arange(len(SAMPLES)) / 16
        images = values[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
        views = make_views(images, SAMPLES, epoch, config)[:, 0]
        shades = make_views(images, SAMPLES, epoch, replace(config, cutmix=False))[:, 0, 0, 0]
        shown = (views[:, :, :, None] - shades).abs() < 1e-4  # [P, H, W, P]: whose pixel
        assert bool((shown.sum(3) == 1).all())
        shares = (
            shown.float().mean((1, 2)) @ torch.nn.functional.one_hot(LABELS_N[SAMPLES], 10).float()
        )
        logits, loss, targets = loss_of(config, epoch)
        assert torch.allclose(targets.float().softmax(1), shares, atol=1e-3)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        (expected,) = torch.autograd.grad(cross_entropy(logits, shares, reduction="sum"), logits)
        assert torch.allclose(gradient, expected, atol=2e-3)
        mixed += int((shares.amax(1) < 0.99).sum())
    assert mixed > 10


def test_hard_targets_have_no_temperature() -> None:
    with pytest.raises(ValueError, match=r"temperature 4\.0: expected 1 with hard targets"):
        replace(CONFIG, targets="hard")


Train = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Train:
    """Run `train ...` on generated images: exit code, result, stderr."""
    options = (
        *("--data", "shapes", "--shapes-per-class", "5", "--method", "rded", "random"),
        *("--recipe", "rded", "--factor", "1", "--image-size", "32", "--epochs", "2"),
        *("--teacher", "convnet-d3-w8", "--teacher-epochs", "1", "--student", "convnet-d3-w8"),
        *("--seeds", "2"),
    )

    def run(stage: str, out: Path, *more: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        words = [*([stage] if stage else []), *options, "--out", str(out), *more]
        code = cli.main(words)
        told = capsys.readouterr()
        return code, json.loads(told.out.splitlines()[-1]) if not code else None, told.err

    return run


def test_a_run_with_hard_targets(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, told = train("coreset", tmp_path / "hard", "--targets", "hard")
    assert code == 0, told

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked")

    with monkeypatch.context() as patch:
        patch.setattr(teacher.Teacher, "logits", asked)
        code, result, told = train("", tmp_path / "hard", "--targets", "hard", "--resume")
    assert code == 0, told
    summary = json.loads((tmp_path / "hard" / "summary.json").read_text())
    assert summary["settings"]["targets"] == "hard"
    assert summary["settings"]["labels"] is None
    assert summary["settings"]["temperature"] == 1
    assert all(sizes["labels"] == 0 for sizes in result["bytes"].values())
    assert not list((tmp_path / "hard" / "students").glob("*.labels*"))
    assert "hard targets" in (tmp_path / "hard" / "report.html").read_text()
    losses = summary["students"]["random"]["losses"]
    assert all(0 < loss < 5 for each in losses for loss in each)
    code, _, told = train("", tmp_path / "hard", "--resume")
    assert code == 2
    assert "run with --targets = hard, now asked for soft" in told


def test_the_same_coreset_serves_soft_and_hard_targets(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = {}
    for targets in ("soft", "hard"):
        code, result, told = train("coreset", tmp_path / targets, "--targets", targets)
        assert code == 0, told
        names[targets] = {m: c["content_sha256"] for m, c in result["coresets"].items()}
    assert names["soft"] == names["hard"]


@pytest.mark.parametrize(
    ("stage", "options", "told"),
    [
        ("", ["--labels", "stored"], "--targets hard makes no soft labels: leave out --labels"),
        ("", ["--codec", "topk"], "--targets hard makes no soft labels: leave out --labels"),
        ("labels", [], "--targets hard makes no soft labels: leave it out to train labels"),
    ],
)
def test_hard_targets_and_soft_labels_exclude_each_other(
    train: Train, tmp_path: Path, stage: str, options: list[str], told: str
) -> None:
    code, _, error = train(stage, tmp_path / "run", "--targets", "hard", *options)
    assert code == 2
    assert told in error
