"""`train prior`: a small few-step latent diffusion model in SDXL's shape, from an image folder.

The result is a folder that diffusers, and everything here that takes `--model`, opens like
SDXL-Turbo: four evals, no guidance. Beside the weights it holds `model_card.json` (command, seed,
data, losses, times, class names, reconstruction error) and `samples.png`. The training can be
stopped at any point and resumes from the last checkpoint in `OUT/.work`.

With a teacher the card also reports the share of real images, of their reconstructions, of samples
that start from images and of samples from noise that the teacher recognises: where a class is first
lost tells which phase loses it.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...engine.data.crops import to_pixels, to_unit
from ...kernels.noise import Draw, uniform
from ...kernels.pixels import upsample_patches
from ...kernels.student_input import student_input
from ..config import PriorConfig
from ..teacher.teacher import Teacher
from .linear_start import norm_groups, start_linear
from .loop import LossOf, M, Phase
from .losses import (
    Conditioning,
    Denoising,
    LatentBank,
    balance_channels,
    denoiser_loss,
    few_step_loss,
    fix_posterior_width,
    guidance_loss,
    sampled_steps,
    samples_of_class,
    sigma_table,
    vae_loss,
)
from .model import move_model, new_parts, prompt_embeddings, save_parts, separate_prompts

PROMPT = "A photo of a {name}"
HALF_UNIT = (0.5, 0.5, 0.5)  # mean and std that leave [-1, 1] unchanged


class PriorTraining:
    """The state of one `train prior` run: data in memory, parts, and the folder it fills."""

    def __init__(
        self,
        config: PriorConfig,
        pixels_NHWC: Tensor,
        labels_N: Tensor,
        class_names: Sequence[str],
        out: Path,
        report: Callable[[str], None],
        device: str,
    ) -> None:
        self.config, self.out, self.report = config, out, report
        self.work = out / ".work"
        self.pixels_NHWC, self.labels_N = pixels_NHWC, labels_N
        self.class_names = tuple(class_names)
        torch.manual_seed(config.seed)
        width, vae_width = config.width, config.vae_width
        self.parts = new_parts(
            config.image_size,
            self.work / "tokenizer",
            unet_channels=(width, width, 2 * width),
            vae_channels=tuple(vae_width * 2**k for k in range(config.vae_factor.bit_length())),
            latent_channels=config.latent_channels,
            vae_groups=norm_groups(vae_width),
        )
        prompts = [PROMPT.format(name=name) for name in self.class_names] + [""]
        separate_prompts(self.parts, prompts)
        states_GLD, pooled_GD = prompt_embeddings(self.parts, prompts)
        self.device = torch.device(device)
        self.conditioning = Conditioning(states_GLD.to(device), pooled_GD.to(device))
        self.sigmas = sigma_table(self.parts.scheduler).to(device)
        for module in (self.parts.vae, self.parts.unet):
            nn.Module.to(module, device)
        self.phases: dict[str, dict[str, Any]] = {}
        """The card's entry for each finished phase."""

    def _run(self, name: str, module: M, steps: int, learning_rate: float, loss_of: LossOf[M]) -> M:
        phase = Phase(name, module, steps, learning_rate, self.work / f"{name}.safetensors")
        average = phase.run(loss_of, seed=self.config.seed, report=self.report)
        seconds = round(phase.seconds, 1)
        self.phases[name] = {"steps": steps, "seconds": seconds, "losses": phase.losses}
        return average

    def _images(self, rows: Tensor | slice) -> Tensor:
        """Training images on the device, float [B, 3, H, W] in [-1, 1]."""
        return to_unit(self.pixels_NHWC[rows].to(self.device))

    def train_vae(self) -> None:
        """Phase 1; its latents' means have mean 0 and, on average, variance 1."""
        rows = torch.arange(0, len(self.pixels_NHWC), max(1, len(self.pixels_NHWC) // 1024))
        start_linear(self.parts.vae, self._images(rows))
        fix_posterior_width(self.parts.vae)
        batch = self.config.vae_batch

        def loss_of(vae: AutoencoderKL, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(self.pixels_NHWC), (batch,), generator=generator)
            images = self._images(rows)
            if torch.rand((), generator=generator, dtype=torch.float32) < 0.5:
                images = images.flip(-1)
            return vae_loss(vae, images, generator)

        vae = self._run("vae", self.parts.vae, self.config.vae_steps, 1e-3, loss_of)
        fix_posterior_width(vae)  # undo the weight decay
        self.parts.vae = vae
        latents = torch.cat([self._encode(self._images(part)) for part in rows.split(128)])
        balance_channels(vae, latents)

    @torch.no_grad()
    def _encode(self, images_BCHW: Tensor) -> Tensor:
        """The posterior's means of images in [-1, 1], scaled."""
        vae: Any = self.parts.vae
        # 256 images at once leave a CPU's caches: 1.7 × the time.
        batches = images_BCHW.split(len(images_BCHW) if images_BCHW.is_cuda else 32)
        means = [vae.encode(batch, return_dict=False)[0].mean for batch in batches]
        return torch.cat(means) * vae.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latents_B4hw: Tensor) -> Tensor:
        """Scaled latents → images in [-1, 1]."""
        scale = self.parts.vae.config["scaling_factor"]
        decoded = self.parts.vae.decode(latents_B4hw / scale, return_dict=False)[0]
        return decoded.clamp(-1, 1)

    def encode_bank(self) -> LatentBank:
        """Encode each image, its mirror image and `crops` square crops of 30–100 % area.

        A crop's micro-conditioning is SDXL's: its size before it is enlarged, its corner after.
        """
        size, seed = self.config.image_size, self.config.seed
        views, labels, time_ids = [], [], []
        for rows in torch.arange(len(self.labels_N)).split(256):
            images = self._images(rows)
            whole = torch.tensor([size, size, 0.0, 0.0, size, size], dtype=torch.float32)
            for view in (images, images.flip(-1)):
                views.append(self._encoded(view))
                time_ids.append(whole.repeat(len(rows), 1))
            for crop in range(self.config.crops):
                u = uniform(seed, Draw.PRIOR, rows, crop, 4)
                side = size * (0.3 + 0.7 * u[:, 0]).sqrt()
                corner = u[:, 1:3] * (size - side)[:, None]
                boxes = torch.cat([corner, side[:, None], side[:, None]], dim=1).to(self.device)
                flips = (u[:, 3] < 0.5).to(self.device)
                view = student_input(images, boxes, flips, size, HALF_UNIT, HALF_UNIT)
                views.append(self._encoded(view.contiguous()))
                enlarged = size / side[:, None]
                target = torch.full((len(rows), 2), float(size), dtype=torch.float32)
                ids = [side[:, None], side[:, None], corner * enlarged, target]
                time_ids.append(torch.cat(ids, dim=1))
            labels.append(self.labels_N[rows].repeat(2 + self.config.crops))
        latents, enlarged = zip(*views, strict=True)
        columns = (latents, enlarged, labels, time_ids)
        return LatentBank(*(torch.cat(column).to(self.device) for column in columns))

    def _encoded(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of images, and of the same images reduced to a patch and enlarged again."""
        size, factor = self.config.image_size, self.config.patch_factor
        latents = self._encode(images_BCHW).half()
        if factor == 1:
            return latents, latents
        patches = interpolate(
            images_BCHW, size=(size // factor,) * 2, mode="bilinear", antialias=True
        )
        enlarged = upsample_patches(to_pixels(patches).contiguous(), size)
        return latents, self._encode(enlarged).half()

    def train_denoiser(self, bank: LatentBank) -> None:
        """Phases 2, 3 and 4; leaves the few-step UNet in `parts`."""
        config, parts = self.config, self.parts
        half = config.precision == "bf16"
        task = Denoising(bank, self.conditioning, self.sigmas, config.unet_batch, half)

        def distil(
            name: str, teacher: UNet2DConditionModel, steps: int, loss: Callable[..., Tensor]
        ) -> UNet2DConditionModel:
            student = copy.deepcopy(teacher).requires_grad_(True)
            return self._run(name, student, steps, 4e-4, partial(loss, task=task, teacher=teacher))

        loss = partial(denoiser_loss, task=task)
        unet = self._run("denoiser", parts.unet, config.unet_steps, 8e-4, loss)
        loss = partial(guidance_loss, guidance=config.guidance)
        guided = distil("guidance", unet, config.guidance_steps, loss)
        visited = sampled_steps(parts.scheduler, config.steps, self.device)
        loss = partial(few_step_loss, visited=visited, substeps=config.substeps)
        parts.unet = distil("few_step", guided, config.few_step_steps, loss)

    @torch.no_grad()
    def sample_sheet(self, count: int = 6) -> Image.Image:
        """One row per class: 2 reconstructions, `count` samples from images, `count` from noise.

        The real images are the first `count` of the class, repeated where it has fewer.
        """
        rows = []
        for label in range(len(self.class_names)):
            _, real, sampled = self._samples(label, count)
            tiles = self.decode(torch.cat([real[:2], sampled]))
            rows.append(torch.cat(list(tiles), dim=2))
        return Image.fromarray(to_pixels(torch.cat(rows, dim=1)[None])[0].cpu().numpy())

    def _samples(self, label: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` images [C, 3, H, W] of a class, their latents, and [2C, 4, h, w] samples."""
        of_class = torch.nonzero(self.labels_N == label).flatten()
        images = self._images(of_class[torch.arange(count) % len(of_class)])
        real = self._encode(images)
        sampled = samples_of_class(
            *(self.parts.unet, self.parts.scheduler, self.conditioning, real, label),
            steps=self.config.steps,
            size_px=self.config.image_size,
            seed=self.config.seed + label,
        )
        return images, real, sampled

    @torch.no_grad()
    def recognised(self, teacher: Teacher) -> dict[str, Any]:
        """Shares that the teacher recognises, in percent, by class and their mean.

        At most 50 per class of each: real training images, their reconstructions, samples from them
        with all steps but the first, samples from noise.
        """
        count = max(1, min(50, 500 // len(self.class_names)))
        shares: dict[str, list[float]] = {}
        for label in range(len(self.class_names)):
            images, real, sampled = self._samples(label, count)
            made = self.decode(torch.cat([real, sampled])).split(count)
            names = ("real", "reconstructed", "from_images", "from_noise")
            for name, part in zip(names, (images, *made), strict=True):
                classes = teacher.logits_from_uint8(to_pixels(part)).argmax(1)
                share = (classes == label).float().mean().item()
                shares.setdefault(name, []).append(round(100 * share, 1))
        return {
            "teacher": teacher.describe(),
            "images_per_class": count,
            "percent": {
                name: {"mean": round(fmean(by_class), 1), "by_class": by_class}
                for name, by_class in shares.items()
            },
        }

    @torch.no_grad()
    def reconstruction_psnr_db(self, count: int = 512) -> float:
        """PSNR of the reconstructions of every n-th training image; n = images // `count`, or 1."""
        every = max(1, len(self.pixels_NHWC) // count)
        images = self._images(slice(None, None, every))
        error = [(self.decode(self._encode(x)) - x).square().mean() for x in images.split(128)]
        return float(-10 * torch.log10(torch.stack(error).mean() / 4))

    def card(self, data: str, command: str) -> dict:
        """The model card: everything needed to make these weights again, and their quality."""
        return {
            "made_by": command,
            "data": data,
            "images": len(self.labels_N),
            "class_names": list(self.class_names),
            "prompt": PROMPT,
            "image_size_px": self.config.image_size,
            "seed": self.config.seed,
            "config": self.config.as_dict(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "reconstruction_psnr_db": round(self.reconstruction_psnr_db(), 2),
            "phases": self.phases,
        }

    def run(self, *, data: str, command: str, teacher: Teacher | None = None) -> Path:
        """Run all phases, then replace the model in the folder; return the folder.

        ValueError when a phase diverges; the folder then keeps its old model.
        """
        began = time.monotonic()
        self.train_vae()
        bank = self.encode_bank()
        self.report(f"encoded {len(bank.labels_N)} latents of {len(self.labels_N)} images")
        self.train_denoiser(bank)
        building = self.out / ".building"
        shutil.rmtree(building, ignore_errors=True)
        save_parts(self.parts, building)
        self.sample_sheet().save(building / "samples.png")
        card = self.card(data, command)
        if teacher is not None:
            card["recognised"] = self.recognised(teacher)
            means = ((k, v["mean"]) for k, v in card["recognised"]["percent"].items())
            shares = ", ".join(f"{name.replace('_', ' ')} {mean:g} %" for name, mean in means)
            self.report(f"the teacher recognises: {shares}")
        card["seconds_of_this_session"] = round(time.monotonic() - began, 1)
        text = json.dumps(card, indent=1, allow_nan=False) + "\n"
        (building / "model_card.json").write_text(text)
        move_model(building, self.out)
        return self.out
