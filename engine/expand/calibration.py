"""Calibration inputs for engines in eight bits: the model's own, on a coreset's patches.

A seeded sample of the coreset is expanded once by torch, in the precision of the layers that are
not in eight bits and with the run's own schedule. What denoiser and decoder are given there is what
the scales are computed from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...export.eight_bits import Calibration, read_recipe
from ...export.models import ModelSource, rest_precision
from ...export.terminal import say
from ..config import ExpandConfig
from .backends import Backend
from .naming import describe_mixup

SAMPLES = 32  # of the coreset
SEED = 0
BATCH = 8  # samples per call


class _Expands(Protocol):
    backend: Backend

    def expand(self, samples: Any, epoch: int) -> Tensor: ...

    def close(self) -> None: ...


def plan_calibration(
    open_expander: Callable[..., _Expands],
    model: ModelSource,
    config: ExpandConfig,
    *,
    patches_NHWC: Tensor | None,
    labels_N: np.ndarray,
    prompts_K: Sequence[str],
) -> Calibration:
    """The calibration of a coreset's engine, on SAMPLES of its patches.

    Its `inputs` opens the model with `open_expander`.
    """
    rows = np.sort(np.random.default_rng(SEED).permutation(len(labels_N))[:SAMPLES])
    classes, own_labels = np.unique(labels_N[rows], return_inverse=True)
    prompts = [prompts_K[each] for each in classes]
    patches = None
    if patches_NHWC is not None and config.start == "image":
        patches = patches_NHWC[torch.from_numpy(rows)]
    settings = ("size_px", "steps", "start", "seed", "posterior")
    described = {
        "samples": rows.tolist(),
        "patches": None if patches is None else hashlib.sha256(patches.numpy().data).hexdigest(),
        "labels": own_labels.tolist(),
        "prompts": prompts,
        **{name: getattr(config, name) for name in settings},
        "rho": config.rho if config.start == "image" else None,
        "conditioning_px": config.conditioning_px or config.size_px,
        **describe_mixup(config),
    }

    @cache
    def inputs() -> dict[str, list[tuple[Tensor, ...]]]:
        say(f"calibrating on {len(rows)} samples of the coreset")
        own = replace(
            config,
            precision=rest_precision(config.precision, config.device),
            vae_precision="auto",
            backend="eager",
            batch=BATCH,
            images_per_prompt=None,
            cuda_graph=False,
        )
        expander = open_expander(
            model, own, patches_NHWC=patches, labels_N=own_labels, prompts_K=prompts
        )
        found: dict[str, list[tuple[Tensor, ...]]] = {"denoiser": [], "decoder": []}
        expander.backend = _Recorder(expander.backend, found)
        expander.expand(range(len(rows)), epoch=0)
        expander.close()
        return found

    return Calibration(described, inputs, read_recipe(model))


class _Recorder:
    """A backend that keeps what denoiser and decoder are given, on the CPU."""

    def __init__(self, backend: Backend, found: dict[str, list[tuple[Tensor, ...]]]) -> None:
        self.name, self.spec = backend.name, backend.spec
        self._backend, self._found = backend, found

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        return self._backend.encode_moments(images_BCHW)

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        inputs = x_BCHW, timestep_1, added_GD, kv_GP
        self._found["denoiser"].append(tuple(value.cpu() for value in inputs))
        return self._backend.denoise(*inputs)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        self._found["decoder"].append((latents_BCHW.cpu(),))
        return self._backend.decode(latents_BCHW)

    def describe(self) -> dict[str, Any]:
        return self._backend.describe()

    def close(self) -> None:
        self._backend.close()
