"""`train verify`: how far a coreset's stored labels are from the teacher's output here and now.

For some (sample, epoch): render the image and its view again, run the teacher, and compare

    drift     KL(stored || now) = sum stored · (log stored - log now)      in nats, at the labels' T
    control   the same, with `stored` from another sample of the same class: a drift this large
              makes labels no better than their class

The teacher's logits pass through the labels' codec first, as they did then, so the drift is 0 on
the machine that made the labels, whatever the codec loses. Another teacher's logits skip codec pca,
whose basis fits the first teacher: its drift includes that codec's loss.

With CutMix a view needs its partner's image too. Only the compared images and their partners are
rendered; the rest of a pool stays black and unused.

Legend: P samples per pool, S of them compared, N samples and M compared in all, K
classes, H W image size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.console import print_table
from ...engine.coreset.coreset import Coreset, open_coreset
from ...engine.expand.backends import resolve_device
from ...engine.labels.stored import SoftLabels
from ...export.config import BackendName
from ..config import StudentConfig
from ..coreset_options import TrainVerify
from ..labels.views import pools, render_some_views
from ..methods.open import own_part
from ..methods.source import Expansions
from ..report.summary import rounded
from ..run.progress import Report
from ..students.from_manifest import (
    fitting_labels,
    load_recorded_teacher,
    open_recorded_source,
    require_soft_labels,
    view_config,
)
from ..teacher.teacher import Teacher

EPOCHS_LOOKED_AT = 8
"""Number of epochs to spread pairs over, if there are as many: an engine renders whole batches of
one epoch, and pairs from 256 epochs would cost 256 batches."""


def verify_labels(options: TrainVerify) -> dict[str, Any]:
    """Measure the drift with each backend; returns the printed result, plain JSON.

    Raises ValueError or OSError, one clear line, for a coreset without labels or without a
    description of their views, another teacher, a model with other weights, or a machine that lacks
    what was requested.
    """
    with Report() as report:
        coreset = open_coreset(options.coreset.expanduser())
        config = view_config(coreset, device=resolve_device(options.device))
        stored = require_soft_labels(coreset)
        teacher = load_recorded_teacher(coreset, options.teacher, config.device)
        then = stored.settings.get("teacher")
        if teacher.sha256 != then and not options.other_teacher:
            raise ValueError(
                f"--teacher {options.teacher}: expected the teacher that made the labels, sha256 "
                f"{str(then)[:16]}…, got {teacher.sha256[:16]}…: give that one, or --other-teacher "
                "to compare with this one"
            )
        by_model = coreset.manifest["model"] is not None
        backends = options.backend if by_model else options.backend[:1]
        drifts = [
            _drift(coreset, backend, options, config, teacher, report) for backend in backends
        ]
    _print(drifts)
    return {
        "coreset": coreset.content_sha256,
        "method": coreset.settings["method"],
        "teacher": teacher.sha256,
        "same_teacher": teacher.sha256 == then,
        "codec": stored.codec.name,
        "temperature": stored.temperature,
        "drift": rounded(drifts),
    }


def _drift(
    coreset: Coreset,
    backend: BackendName,
    options: TrainVerify,
    config: StudentConfig,
    teacher: Teacher,
    report: Report,
) -> dict[str, Any]:
    """The drift of one backend; `rendered` counts the images made, partners included."""
    began = time.monotonic()
    parts: list[Tensor] = []
    rendered = done = 0
    with open_recorded_source(coreset, options, backend, config) as source:
        stored = fitting_labels(coreset, source, config, options).stored
        pairs = list(chosen_pairs(config, source.labels_N, options.samples, options.seed))
        total = sum(len(rows_S) for *_, rows_S in pairs)
        for samples_P, epoch, rows_S in pairs:
            views_SCHW, images = render_some_views(source, samples_P, epoch, config, rows_S)
            now_SK = _coded(teacher.logits(views_SCHW), stored, teacher)
            parts.append(_compare(stored, source.labels_N, samples_P[rows_S], epoch, now_SK))
            rendered, done = rendered + images, done + len(rows_S)
            report.progress(f"verify, {backend}", done, total, "samples")
        own = own_part(source)
        made_by = own.expander.describe() if isinstance(own, Expansions) else {}
    kl_M, agrees_M, control_M = torch.cat(parts, 1)
    return {
        **{key: made_by.get(key) for key in ("backend", "precision", "vae_precision")},
        "samples": total,
        "epochs": len(pairs),
        "rendered": rendered,
        "kl": _spread(kl_M),
        "top1_agreement": float(agrees_M.mean()),
        "control_kl": None if bool(control_M.isnan().any()) else _spread(control_M),
        "seconds": time.monotonic() - began,
    }


def _compare(
    stored: SoftLabels, labels_N: Tensor, samples_S: Tensor, epoch: int, now_SK: Tensor
) -> Tensor:
    """Drift, whether the top-1 class agrees (0 or 1), and control: fp64 [3, S].

    The control is NaN for a sample that is alone in its class.
    """
    then_SK = stored.probabilities(epoch, samples_S)
    agrees_S = then_SK.argmax(1) == now_SK.argmax(1)
    others_S = _others_of_the_class(labels_N)[samples_S]
    control_S = kl(stored.probabilities(epoch, others_S), now_SK)
    control_S = control_S.masked_fill(others_S == samples_S, math.nan)
    return torch.stack([kl(then_SK, now_SK), agrees_S.double(), control_S])


def chosen_pairs(
    config: StudentConfig, labels_N: Tensor, count: int, seed: int
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """The pairs to compare: a pool's samples [P], its epoch, and rows [S] of the pool.

    One pool from each of EPOCHS_LOOKED_AT epochs, or from more when these hold fewer than `count`
    samples. Yields fewer pairs than `count` only when the coreset's epochs hold no more.
    """
    draw = np.random.default_rng(seed)
    each = math.ceil(count / min(EPOCHS_LOOKED_AT, config.epochs))
    for epoch in draw.permutation(config.epochs).tolist():
        epoch_pools = pools(config, labels_N, epoch)
        samples_P = epoch_pools[draw.integers(len(epoch_pools))]
        wanted = min(each, count, len(samples_P))
        rows_S = np.sort(draw.choice(len(samples_P), wanted, replace=False))
        count -= wanted
        yield samples_P, epoch, torch.from_numpy(rows_S)
        if not count:
            return


def _coded(logits_SK: Tensor, stored: SoftLabels, teacher: Teacher) -> Tensor:
    """The teacher's logits as the codec would return them: fp32 probabilities on the CPU."""
    encoding = stored.encoding
    if encoding.basis is not None and teacher.sha256 != stored.settings.get("teacher"):
        return (logits_SK.cpu().float() / stored.temperature).softmax(1)
    return stored.as_probabilities(encoding.decode(encoding.encode(logits_SK)))


def kl(p_SK: Tensor, q_SK: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats, fp64 [S]; probabilities are at least 1e-12.

    Rows are normalised to sum to 1 again: fp32 rows miss it by 1e-7, and a drift can be smaller.
    """
    p, q = (each.double().clamp_min(1e-12) for each in (p_SK, q_SK))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p.log() - q.log())).sum(1).clamp_min(0.0)


def _spread(values_M: Tensor) -> dict[str, float]:
    p50, p95, most = values_M.quantile(values_M.new_tensor([0.5, 0.95, 1.0])).tolist()
    return {"mean": float(values_M.mean()), "p50": p50, "p95": p95, "max": most}


def _others_of_the_class(labels_N: Tensor) -> Tensor:
    """For every sample the next one of its class, cyclically; itself when alone."""
    samples_N = torch.arange(len(labels_N))
    first_N = torch.searchsorted(labels_N, labels_N)
    count_N = torch.bincount(labels_N)[labels_N]
    return first_N + (samples_N - first_N + 1) % count_N


def _print(drifts: list[dict[str, Any]]) -> None:
    heads = ["backend", "precision", "samples", "KL mean", "p95", "max", "top-1", "control"]
    rows = [
        [
            *(str(drift[key] or "-") for key in ("backend", "precision", "samples")),
            *(f"{drift['kl'][key]:.2g}" for key in ("mean", "p95", "max")),
            f"{100 * drift['top1_agreement']:.1f} %",
            "-" if drift["control_kl"] is None else f"{drift['control_kl']['mean']:.2g}",
        ]
        for drift in drifts
    ]
    print_table([heads, *rows])
