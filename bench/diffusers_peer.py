"""Diffusers' own SDXL pipelines, fed with our noise so that pictures can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from patchbloom.engine.expand.prompts import encode_prompts
from patchbloom.export.config import Precision
from patchbloom.export.models import TINY_DECODER, ModelSource, load_parts
from patchbloom.kernels.noise import Draw, normal
from torch import Tensor


def open_pipeline(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Img2img pipeline of a model folder, without a progress bar."""
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder, add_watermarker=False, torch_dtype=dtype
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def open_random_pipeline(model: ModelSource, *, device: str, precision: Precision) -> Any:
    """Img2img pipeline with random weights; texts are the seeded ones of encode_prompts."""
    parts = load_parts(model, precision=precision, device=device)
    make: Any = StableDiffusionXLImg2ImgPipeline
    pipeline = make(
        vae=parts.vae,
        unet=parts.unet,
        scheduler=EulerAncestralDiscreteScheduler.from_config(model.scheduler_config()),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[Any, ...]:
        text = encode_prompts(model, prompt, device=device, dtype=parts.unet.dtype)
        text_KLD, pooled_KD = text.text_KLD.to(device), text.pooled_KD.to(device)
        return text_KLD, None, pooled_KD, None

    pipeline.encode_prompt = encode_prompt
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compile_pipeline(pipeline: Any) -> None:
    """Compile as diffusers advises: channels_last, and only the UNet's repeated blocks.

    The decoder has no repeated blocks and is compiled whole. Shapes are static: otherwise blocks of
    two widths would be recompiled for any width, which is slower.
    """
    settings: Any = {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.unet.compile_repeated_blocks(**settings)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, **settings)


def upcast_vae(pipeline: Any) -> None:
    """Run the VAE of an fp16 pipeline in fp32, as the configuration of SDXL's own VAE asks.

    Raises ValueError for a pipeline in another precision, where it would change nothing.
    """
    if pipeline.vae.dtype != torch.float16:
        raise ValueError(
            "diffusers-upcast: expected a pipeline in fp16, which is usual on a GPU; this one is "
            f"in {str(pipeline.vae.dtype).removeprefix('torch.')}; leave it out, or ask for "
            "diffusers-upcast-fp16"
        )
    pipeline.vae.register_to_config(force_upcast=True)


def decode_tiny(pipeline: Any, model: ModelSource) -> None:
    """Decode by the model's AutoencoderTiny; the encoder stays the VAE's."""
    vae = pipeline.vae
    folder = model.part(TINY_DECODER)
    tiny = AutoencoderTiny.from_pretrained(folder, torch_dtype=vae.dtype).to(vae.device)

    def decode(raw_BCHW: Tensor, **named: Any) -> Any:
        return tiny.decode(raw_BCHW * vae.config.scaling_factor, **named)

    vae.decode = decode


class OurNoise:
    """Replaces diffusers' `randn_tensor`: returns the start noise, then one draw per step."""

    def __init__(self, samples: Tensor, *, seed: int, epoch: int) -> None:
        self.samples, self.seed, self.epoch, self.draws = samples, seed, epoch, 0

    def __call__(self, shape: Sequence[int], *_: Any, **wanted: Any) -> Tensor:
        draw = Draw.ANCESTRAL + self.draws - 1 if self.draws else Draw.START
        self.draws += 1
        if shape[0] != len(self.samples):
            raise ValueError(f"noise asked for {shape[0]} images, fed for {len(self.samples)}")
        noise = normal(self.seed, draw, self.samples, self.epoch, tuple(shape[1:]))
        return noise.to(wanted.get("device"), wanted.get("dtype"))


@contextmanager
def noise_of_ours(pipeline: Any, samples: Tensor, *, seed: int, epoch: int) -> Iterator[OurNoise]:
    """Make the pipeline and its scheduler draw our noise for `samples` within the block."""
    noise = OurNoise(samples, seed=seed, epoch=epoch)
    with (
        mock.patch(f"{type(pipeline).__module__}.randn_tensor", noise),
        mock.patch.object(scheduling_euler_ancestral_discrete, "randn_tensor", noise),
    ):
        yield noise


@torch.no_grad()
def run_pipeline(pipeline: Any, prompts: Sequence[str], **call: Any) -> Tensor:
    """Call the pipeline as users call SDXL-Turbo, without guidance; images fp32 in [-1, 1]."""
    images = pipeline(list(prompts), guidance_scale=0.0, output_type="pt", **call).images
    return images.float() * 2 - 1
