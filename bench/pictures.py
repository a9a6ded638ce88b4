"""The gate of every figure on expansion: our pictures against diffusers' own img2img pipeline's.

Both start from the same pixels and draw the same noise; of the encoder's posterior diffusers takes
the mean here, as we do. A backend passes when its pictures are diffusers' and those of wrong
prompts and of a wrong timestep are not. In fp32 by the max abs error, at most TOLERANCE of the
range [-1, 1]. In half precision by the PSNR: at least MIN_PSNR_DB, and the wrong ones more than
MARGIN_DB below the right ones. They need not be below MIN_PSNR_DB: random weights hardly listen to
prompts and timesteps. SDXL-Turbo's architecture with such weights, 64 px, bf16 on a CPU: 52.3 dB,
and 43.4 and 40.4 dB for the wrong ones.

A backend's name may end in its precision: "ort" is fp32 on the CPU and fp16 on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from diffusers_peer import noise_of_ours, run_pipeline
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.prompts import class_prompts
from patchbloom.engine.turbo import Expander
from patchbloom.export.config import BackendName, DeviceName, Precision
from patchbloom.export.models import ModelSource
from patchbloom.kernels.noise import Draw, uniform
from patchbloom.kernels.pixels import upsample_patches
from torch import Tensor

TOLERANCE = 1e-4
MIN_PSNR_DB = 40.0
MARGIN_DB = 6.0
CONTROLS = ("wrong_timestep", "wrong_prompt")
EPOCH = 0


@dataclass(frozen=True)
class Coreset:
    """Patches of noise: what they show does not change the work."""

    patches_NHWC: Tensor
    labels_N: np.ndarray
    prompts_K: tuple[str, ...]

    def prompts_of(self, samples: Tensor) -> list[str]:
        return [self.prompts_K[self.labels_N[sample]] for sample in samples]


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

    ValueError: no such backend or precision.
    """
    backend, _, precision = name.partition("-")
    config = ExpandConfig(
        mixup=False,
        backend=cast(BackendName, backend),
        precision=cast(Precision, precision or default_precision(device)),
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


def default_precision(device: str) -> Precision:
    """Of diffusers' pipeline, and of ours where a name does not say another."""
    return "fp16" if device == "cuda" else "fp32"


def compare_with_diffusers(
    name: str, expander: Expander, pipeline: Any, coreset: Coreset, samples: Tensor
) -> dict[str, dict[str, float]]:
    """Errors of the same pictures and of both negative controls; RuntimeError at a failed gate."""
    config, prompts = expander.config, coreset.prompts_of(samples)
    patches = coreset.patches_NHWC[samples]
    images = upsample_patches(patches, config.size_px, mode="bicubic", dtype=torch.float32)
    with (
        noise_of_ours(pipeline, samples, seed=config.seed, epoch=EPOCH),
        mock.patch("diffusers.models.autoencoders.vae.randn_tensor", _no_noise),
    ):
        expected = run_pipeline(
            pipeline,
            prompts,
            image=(images * 0.5 + 0.5).to(pipeline.device, pipeline.unet.dtype),
            strength=config.rho,
            num_inference_steps=config.steps,
        )
    timesteps = expander._timesteps_1
    cases = {"same": expander.expand(samples, EPOCH)}
    expander._timesteps_1 = [timestep - 50 for timestep in timesteps]
    cases["wrong_timestep"] = expander.expand(samples, EPOCH)
    expander._timesteps_1 = timesteps
    right, classes = expander.prompts_of, len(coreset.prompts_K)
    with mock.patch.object(expander, "prompts_of", lambda asked: right((asked + 1) % classes)):
        cases["wrong_prompt"] = expander.expand(samples, EPOCH)
    errors = {case: _errors(images, expected) for case, images in cases.items()}
    check_errors(name, errors, config.precision)
    return errors


def check_errors(name: str, errors: dict[str, dict[str, float]], precision: Precision) -> None:
    """RuntimeError: not diffusers' pictures, or wrong ones pass too; `errors` as of `_errors`."""
    same = errors["same"]
    if precision == "fp32":
        right = same["max_abs"] <= TOLERANCE
        told = all(errors[case]["max_abs"] > TOLERANCE for case in CONTROLS)
        expected = f"a max abs error of at most {TOLERANCE:g}, and more for wrong ones"
    else:
        right = same["psnr_db"] >= MIN_PSNR_DB
        told = all(errors[case]["psnr_db"] < same["psnr_db"] - MARGIN_DB for case in CONTROLS)
        expected = f"at least {MIN_PSNR_DB:g} dB, and {MARGIN_DB:g} dB less for wrong ones"
    if not (right and told):
        failed = "wrong prompts or timesteps pass too" if right else "pictures are not diffusers'"
        raise RuntimeError(
            f"{name}: {failed}: expected {expected}, got {errors}; nothing is reported"
        )


def _no_noise(shape: tuple[int, ...], **wanted: Any) -> Tensor:
    return torch.zeros(shape, device=wanted["device"], dtype=wanted["dtype"])


def _errors(images: Tensor, expected: Tensor) -> dict[str, float]:
    difference = (images - expected.to(images.device)).double()
    return {
        "max_abs": float(difference.abs().max()),
        "relative_l2": float(difference.norm() / expected.double().norm()),
        "psnr_db": round(float(10 * (4 / difference.square().mean()).log10()), 1),
    }
