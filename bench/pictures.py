"""Gate of every expansion figure: pictures are compared with those of diffusers' img2img pipeline.

All peers start from the same pixels and draw the same noise; diffusers takes the mean of the
encoder's posterior here, as we do. A peer passes when its pictures match those of diffusers' usual
pipeline, and its pictures of wrong prompts and of a wrong timestep do not. The relative L2 error
must be at most RELATIVE_L2 of the coarser precision of both sides, and wrong pictures must have
more than WRONG_TIMES that error. In fp32 no value may be off by more than TOLERANCE of [-1, 1].
Pictures of a tiny decoder are compared with those of diffusers' pipeline with that decoder.

Wrong pictures in half precision need not exceed the bound of right ones: random weights hardly
respond to prompts and timesteps. SDXL-Turbo's architecture with such weights, 64 px, bf16 on a CPU:
52.3 dB, and 43.4 and 40.4 dB for the wrong ones, which are 2.8 and 3.9 times as far away.

Names are those of peer_names.py: "ort" is fp32 on the CPU and fp16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from diffusers_peer import noise_of_ours, run_pipeline
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.prompts import class_prompts
from patchbloom.export.config import BackendName, DeviceName, Precision
from patchbloom.export.models import ModelSource
from patchbloom.kernels.noise import Draw, uniform
from patchbloom.kernels.pixels import upsample_patches
from peer_names import LAUNCHED, PRECISIONS, TINY, default_precision, split_name
from torch import Tensor

TOLERANCE = 1e-4
RELATIVE_L2: dict[Precision, float] = {
    **{"fp32": 1e-4, "fp16": 0.02, "bf16": 0.07},
    **{"fp8": 0.15, "int8": 0.15},
}
WRONG_TIMES: dict[Precision, float] = {
    **{"fp32": 100.0, "fp16": 2.0, "bf16": 2.0},
    **{"fp8": 1.2, "int8": 1.2},
}
CONTROLS = ("wrong_timestep", "wrong_prompt")
WRONG_BY = 50
"""Timesteps by which the wrong one is early."""
EPOCH = 0
Errors = dict[str, dict[str, float]]
"""max_abs, relative_l2 and psnr_db of the same pictures and of both controls."""


@dataclass(frozen=True)
class Coreset:
    """Noise patches: their content does not change the work."""

    patches_NHWC: Tensor
    labels_N: np.ndarray
    prompts_K: tuple[str, ...]

    def prompts_of(self, samples: Tensor, *, shift: int = 0) -> list[str]:
        """Prompts of the samples' classes, shifted by `shift` classes."""
        classes = (self.labels_N[samples.numpy()] + shift) % len(self.prompts_K)
        return [self.prompts_K[index] for index in classes]

    def spread(self, count: int) -> Tensor:
        """`count` samples from first to last, ascending; some repeat if there are fewer."""
        return torch.linspace(0, len(self.labels_N) - 1, count).long()


def make_coreset(*, classes: int, patches_per_class: int, side_px: int, seed: int) -> Coreset:
    """Random patches, `patches_per_class` for each of `classes`."""
    count = classes * patches_per_class
    draws = uniform(seed, Draw.ORDER, torch.arange(count), EPOCH, side_px * side_px * 3)
    return Coreset(
        patches_NHWC=(draws * 255).round().to(torch.uint8).view(count, side_px, side_px, 3),
        labels_N=np.repeat(np.arange(classes), patches_per_class),
        prompts_K=class_prompts([f"class {number}" for number in range(classes)]),
    )


def open_expander(
    name: str, model: ModelSource, coreset: Coreset, *, device: str, **settings: Any
) -> Expander:
    """Our Expander on one backend, without mixup, which diffusers does not have.

    Raises ValueError for an unknown backend or precision.
    """
    backend, precision = split_name(name)
    config = ExpandConfig(
        mixup=False,
        backend=cast(BackendName, backend.removesuffix(TINY).removesuffix(LAUNCHED)),
        cuda_graph=not backend.endswith(LAUNCHED),
        precision=precision or default_precision(device),
        device=cast(DeviceName, device),
        **settings,
    )
    return Expander(
        model,
        config,
        patches_NHWC=coreset.patches_NHWC,
        labels_N=coreset.labels_N,
        prompts_K=coreset.prompts_K,
    )


def pipeline_pictures(
    pipeline: Any, coreset: Coreset, samples: Tensor, config: ExpandConfig, *, shift: int = 0
) -> Tensor:
    """Pictures of a diffusers pipeline with our noise, fp32 [len(samples), 3, H, W].

    Uses size, steps, rho and seed of `config`; `shift` as in `prompts_of`.
    """
    patches = coreset.patches_NHWC[samples]
    images = upsample_patches(patches, config.size_px, dtype=torch.float32)
    with (
        noise_of_ours(pipeline, samples, seed=config.seed, epoch=EPOCH),
        mock.patch("diffusers.models.autoencoders.vae.randn_tensor", _no_noise),
    ):
        return run_pipeline(
            pipeline,
            coreset.prompts_of(samples, shift=shift),
            image=(images * 0.5 + 0.5).to(pipeline.device, pipeline.unet.dtype),
            strength=config.rho,
            num_inference_steps=config.steps,
        )


def pipeline_cases(
    pipeline: Any, coreset: Coreset, samples: Tensor, config: ExpandConfig
) -> dict[str, Tensor]:
    """A pipeline's pictures, and those of both controls."""

    def pictures(shift: int = 0) -> Tensor:
        return pipeline_pictures(pipeline, coreset, samples, config, shift=shift)

    cases = {"same": pictures(), "wrong_prompt": pictures(shift=1)}
    with mock.patch.object(pipeline.unet, "forward", _early(pipeline.unet.forward)):
        return cases | {"wrong_timestep": pictures()}


def expander_cases(expander: Expander, coreset: Coreset, samples: Tensor) -> dict[str, Tensor]:
    """Our pictures, and those of both controls."""
    bank, classes = expander.prompt_bank, len(coreset.prompts_K)
    right = bank.of
    cases = {"same": expander.expand(samples, EPOCH)}
    with mock.patch.object(bank, "of", lambda asked, _=None: right((asked + 1) % classes)):
        cases["wrong_prompt"] = expander.expand(samples, EPOCH)
    # In place: the replay of a CUDA graph calls no function, but reads these tensors.
    for timestep_1 in expander._timesteps_1:
        timestep_1 -= WRONG_BY
    cases["wrong_timestep"] = expander.expand(samples, EPOCH)
    for timestep_1 in expander._timesteps_1:
        timestep_1 += WRONG_BY
    return cases


def _early(denoise: Callable[..., Any]) -> Callable[..., Any]:
    def denoise_early(x: Tensor, timestep: Tensor, *more: Any, **named: Any) -> Any:
        return denoise(x, timestep - WRONG_BY, *more, **named)

    return denoise_early


def compare(name: str, cases: dict[str, Tensor], expected: Tensor, precision: Precision) -> Errors:
    """Errors of every case. Raises RuntimeError when the gate fails.

    `precision`: the coarser of both sides.
    """
    errors = {case: picture_errors(images, expected) for case, images in cases.items()}
    check_errors(name, errors, precision)
    return errors


def coarser(one: Precision, other: Precision) -> Precision:
    """The precision with fewer distinct values."""
    return one if PRECISIONS.index(one) > PRECISIONS.index(other) else other


def check_errors(name: str, errors: Errors, precision: Precision) -> None:
    """Raises RuntimeError when pictures are not diffusers', or wrong ones pass too."""
    same, bound, times = errors["same"], RELATIVE_L2[precision], WRONG_TIMES[precision]
    right = same["relative_l2"] <= bound
    expected = f"a relative L2 error of at most {bound:g}, of wrong ones {times:g} times it"
    if precision == "fp32":
        right = right and same["max_abs"] <= TOLERANCE
        expected += f", and a max abs error of at most {TOLERANCE:g}"
    told = all(errors[case]["relative_l2"] > times * same["relative_l2"] for case in CONTROLS)
    if not (right and told):
        failed = "wrong prompts or timesteps pass too" if right else "pictures are not diffusers'"
        raise RuntimeError(
            f"{name}: {failed}: expected {expected}, got {errors}; nothing is reported"
        )


def _no_noise(shape: tuple[int, ...], **wanted: Any) -> Tensor:
    return torch.zeros(shape, device=wanted["device"], dtype=wanted["dtype"])


def picture_errors(images: Tensor, expected: Tensor) -> dict[str, float]:
    """Errors of pictures; the PSNR is capped at 200 dB, for equal pictures."""
    difference = (images - expected.to(images.device)).double()
    mean_square = difference.square().mean().clamp(min=4e-20)
    return {
        "max_abs": float(difference.abs().max()),
        "relative_l2": float(difference.norm() / expected.double().norm()),
        "psnr_db": round(float(10 * (4 / mean_square).log10()), 1),
    }
