"""Settings of the Expander and of noise optimisation. Torch-free, so that `--help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..export.config import BackendName, DeviceName, Precision, TrtLibrary, VaePrecision

Start = Literal["image", "noise"]
Posterior = Literal["mean", "sample"]
TEMPLATE = "A photo of a {name}"
"""Template of prompts, from DACE's text-only ablation."""
SMALL_PX, RECIPE_PX = 128, 224


def usual_px(trained_px: int) -> int:
    """Side of the images that a model makes for students unless one is given.

    A model trained at SMALL_PX or below makes good images only at its own size; for others it is
    RECIPE_PX, at which the recipes train.
    """
    return trained_px if trained_px <= SMALL_PX else RECIPE_PX


LEAST_BETA, MOST_BETA = 0.001, 1000.0
"""Range of a in Beta(a, a): beyond it, mixup is little more than one of the two patches, or a fixed
0.5."""


def parse_mixup_weight(text: str) -> tuple[Literal["fixed", "beta"], float]:
    """Parse --mixup-weight: ("fixed", gamma) or ("beta", a), a = 1 for `uniform`.

    Raises ValueError for anything but `uniform`, a number in [0, 1], and beta:A, A from LEAST_BETA
    to MOST_BETA.
    """
    beta = text.startswith("beta:")
    least, most = (LEAST_BETA, MOST_BETA) if beta else (0.0, 1.0)
    try:
        # + 0.0 turns -0 into 0: both name the same images.
        value = 1.0 if text == "uniform" else float(text.removeprefix("beta:")) + 0.0
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ValueError(
            f"--mixup-weight {text}: expected uniform, a number from 0 to 1, or beta:A, of "
            f"Beta(A, A), with A from {LEAST_BETA:g} to {MOST_BETA:g}"
        )
    return ("beta" if beta or text == "uniform" else "fixed"), value


@dataclass(frozen=True, kw_only=True)
class ExpandConfig:
    """How patches become images; fields about where it runs are no part of an image's name."""

    size_px: int
    """Height and width of the images made."""
    steps: int = 5
    """Scheduler steps S; an image takes int(S · rho) UNet evaluations."""
    rho: float = 0.8
    """Share of the noise schedule to run, in (0, 1]; 1.0 still starts from the patch."""
    mixup: bool = True
    """Mix the latents of two patches of one class before the noise is added."""
    mixup_weight: str = "uniform"
    """Weight of the patch itself in that mixture: `uniform`, a number in [0, 1], or beta:A for
    Beta(A, A)."""
    start: Start = "image"
    """`noise` starts from pure noise, text to image: patches, rho and mixup play no part."""
    seed: int = 0
    """Key of all noise, in [0, 2^64)."""
    posterior: Posterior = "mean"
    """Latent of a patch: the mean of the VAE's posterior, or a fresh sample per epoch."""
    conditioning_px: int | None = None
    """Image size in SDXL's micro-conditioning; None: `size_px`."""
    precision: Precision = "fp32"
    """Precision of weights and activations; the sampler's state is always fp32."""
    vae_precision: VaePrecision = "auto"
    """Precision of encoder and decoder; `auto` is `precision`, or fp32 for a VAE that overflows in
    fp16."""
    nan_gate: bool = True
    """Check every call's images for NaN, which waits for the GPU once."""
    batch: int = 32
    """Images per engine call."""
    images_per_prompt: int | None = None
    """n of a batch of G prompts × n images; None: the largest n that pads no whole epoch."""
    backend: BackendName = "auto"
    """Backend that runs the networks; `auto` chooses one for this machine and reports it."""
    trt_library: TrtLibrary = "auto"
    """Library of backend trt; `auto` is tensorrt where it is installed, otherwise rtx."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    bundles: Path | None = None
    """Folder of built engines; None: patchbloom/bundles in the user's cache."""
    cuda_graph: bool = True
    """On a GPU, record the evaluations of a batch and its decoding once, and replay them."""
    prompt_cache_bytes: int | None = None
    """Device memory for keys and values of prompts, at least those of one call; None: 40 % of the
    free memory. No bit of an image depends on it."""

    def __post_init__(self) -> None:
        for field, choices in (
            ("start", get_args(Start)),
            ("posterior", get_args(Posterior)),
            ("precision", get_args(Precision)),
            ("vae_precision", get_args(VaePrecision)),
            ("backend", get_args(BackendName)),
            ("trt_library", get_args(TrtLibrary)),
            ("device", get_args(DeviceName)),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )
        for field in ("size_px", "steps", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must lie in (0, 1], got {self.rho}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {self.seed}")
        parse_mixup_weight(self.mixup_weight)


@dataclass(frozen=True, kw_only=True)
class DscoConfig:
    """Noise optimisation (DsCo's NOpt, arXiv 2603.27987), with a note where the paper is silent."""

    iterations: int = 200
    """SGD steps on the noise of a denoising step; 0: plain sampling from a Latin hypercube."""
    learning_rate: float = 0.1
    """Learning rate of these steps."""
    momentum: float = 0.9
    """Momentum of these steps, in [0, 1)."""
    feature_weight: float = 0.0005
    """Weight of the gaps between features and pivots, per image of the class."""
    groups: int = 32
    """Groups of the feature network's convolutions, a power of 2 up to 256; not stated in the
    paper. One CPU core, 16 px latents, ms per image and iteration: 11.7 at 4, 1.7 at 32."""
    pivot_rows: int = 1024
    """Rows of features kept per class and step: pivots are exact up to twice as many images of a
    class, and memory does not grow beyond that. Not in the paper."""
    data_free: bool = False
    """Use no real image: match the statistics of generated templates instead of pivots."""
    templates: int = 200
    """Generated images per class whose statistics --dsco.data-free matches."""
    match_weight: float = 0.001
    """Weight of that match, per channel."""
    repulsion_weight: float = 10.0
    """Weight of the mean cosine similarity of two images of a class, with --dsco.data-free."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("pivot_rows", 1), ("templates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{_option(name)} {getattr(self, name)}: expected {least} or more")
        for name in ("feature_weight", "match_weight", "repulsion_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{_option(name)} {getattr(self, name)}: expected a finite number, 0 or more"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"--dsco.learning-rate {self.learning_rate}: expected a finite number above 0"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--dsco.momentum {self.momentum}: expected 0 or more, less than 1")
        if self.groups not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"--dsco.groups {self.groups}: expected a power of 2 up to 256")


def _option(name: str) -> str:
    return f"--dsco.{name.replace('_', '-')}"
