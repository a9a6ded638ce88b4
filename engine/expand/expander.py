"""The Expander: patches → latents once → mixed and noised → a few UNet steps → images.

An image is a pure function of (model, patch, prompt, settings; seed, sample, epoch): all noise is
counter-based (kernels/noise.py), so order, neighbours and batch composition have no effect.
Latents of the patches and text embeddings are computed once, and so are the cross-attention keys
and values of as many classes as fit (prompt_bank.py). Legend: N samples, K classes, B images of G
prompts in a batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...export.bundle import default_bundles_folder
from ...export.config import EngineSpec
from ...export.models import DTYPES, ModelParts, ModelSource, load_parts
from ...kernels.latents import start_state
from ...kernels.noise import Draw, normal
from ...kernels.pixels import upsample_patches
from ...kernels.sampler import euler_ancestral_step
from ..config import ExpandConfig
from .backends import Backend, open_backend, resolve_device
from .batches import BatchPlan, images_per_prompt, plan_batches
from .mixup import mixup_quantiles
from .naming import describe_source
from .prompt_bank import open_prompt_bank
from .prompts import encode_prompts
from .schedule import make_schedule

VARIED = {"steps", "rho", "mixup", "mixup_weight", "start", "seed"}


class Expander:
    """Makes images of a coreset's samples with a few-step latent diffusion model.

    `patches_NHWC` (uint8) and `labels_N` (sorted) are the coreset; `prompts_K` has one prompt per
    class. With start "noise" the patches may be None. Raises ValueError when settings or shapes do
    not fit, Unavailable when a backend or device is missing.
    """

    def __init__(
        self,
        model: ModelSource,
        config: ExpandConfig,
        *,
        patches_NHWC: Tensor | None,
        labels_N: Tensor | np.ndarray,
        prompts_K: Sequence[str],
    ) -> None:
        self.model, self.config = model, config
        self._labels_N = np.asarray(labels_N, dtype=np.int64)
        self._check_coreset(patches_NHWC, prompts_K)
        self.schedule = make_schedule(
            model.scheduler_config(), steps=config.steps, rho=config.rho, start=config.start
        )
        self._counts_K = np.bincount(self._labels_N, minlength=len(prompts_K))
        self._firsts_K = np.cumsum(self._counts_K) - self._counts_K
        self.spec = EngineSpec(
            size_px=config.size_px,
            batch=config.batch,
            images_per_prompt=config.images_per_prompt
            or images_per_prompt(config.batch, self._counts_K),
            precision=config.precision,
            vae_precision=config.vae_precision,
            device=resolve_device(config.device),
        )
        self._device = torch.device(self.spec.device)
        text = encode_prompts(
            model, prompts_K, device=self.spec.device, dtype=DTYPES[config.precision]
        )
        parts = load_parts(
            model,
            precision=config.precision,
            vae_precision=config.vae_precision,
            device=self.spec.device,
        )
        self._latent_CHW = self._latent_shape(parts)
        self.prompt_bank = open_prompt_bank(
            parts,
            text,
            conditioning_px=config.conditioning_px or config.size_px,
            least=self.spec.prompts,
            budget_bytes=config.prompt_cache_bytes,
        )
        self.backend: Backend = open_backend(
            config.backend,
            model,
            parts,
            self.spec,
            tokens=self.prompt_bank.tokens,
            bundles=config.bundles or default_bundles_folder(),
        )
        del parts, text
        gc.collect()
        self._timesteps_1 = self._as_tensors(self.schedule.timesteps)
        self._quantiles_Q = self._mixup_quantiles(config)
        self._moments: Tensor | None = None
        if patches_NHWC is not None and config.start == "image":
            self._moments = self.encode(patches_NHWC)
        self._bank_epoch: tuple[int, Tensor] | None = None

    def _check_coreset(self, patches_NHWC: Tensor | None, prompts_K: Sequence[str]) -> None:
        labels = self._labels_N
        if labels.ndim != 1 or not len(labels) or np.any(np.diff(labels) < 0):
            raise ValueError("labels_N must be a sorted, non-empty list of class indices")
        if labels[0] < 0 or labels[-1] >= len(prompts_K):
            raise ValueError(
                f"labels run from {labels[0]} to {labels[-1]}, but there are {len(prompts_K)} "
                "prompts: give one prompt per class"
            )
        if patches_NHWC is None:
            if self.config.start == "image":
                raise ValueError("start 'image' needs patches; use start 'noise' without them")
            return
        shape = tuple(patches_NHWC.shape)
        if patches_NHWC.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(
                f"patches must be uint8 [N, H, W, 3], got {patches_NHWC.dtype} {shape}"
            )
        if shape[0] != len(labels):
            raise ValueError(f"{shape[0]} patches but {len(labels)} labels")

    def _as_tensors(self, timesteps: Sequence[float]) -> list[Tensor]:
        return [torch.tensor([t], dtype=torch.float32, device=self._device) for t in timesteps]

    def _mixup_quantiles(self, config: ExpandConfig) -> Tensor | None:
        quantiles_Q = mixup_quantiles(config.mixup_weight)
        return None if quantiles_Q is None else quantiles_Q.to(self._device)

    def _latent_shape(self, parts: ModelParts) -> tuple[int, int, int]:
        vae_config: Any = parts.vae.config
        factor = 2 ** (len(vae_config.block_out_channels) - 1)
        if self.config.size_px % factor:
            raise ValueError(
                f"the image size must be a multiple of {factor} px, the VAE's factor, "
                f"got {self.config.size_px}"
            )
        side = self.config.size_px // factor
        return vae_config.latent_channels, side, side

    @torch.no_grad()
    def encode(self, patches_NHWC: Tensor) -> Tensor:
        """Moments of patches (uint8, any size), fp32 [N, 2C, h, w]; with posterior "mean" only the
        means, [N, C, h, w]."""
        channels = self._latent_CHW[0]
        kept = channels if self.config.posterior == "mean" else 2 * channels
        moments = torch.empty(len(patches_NHWC), kept, *self._latent_CHW[1:], device=self._device)
        for first in range(0, len(patches_NHWC), self.spec.batch):
            rows = torch.arange(first, first + self.spec.batch).clamp_(max=len(patches_NHWC) - 1)
            images_BCHW = upsample_patches(patches_NHWC[rows].to(self._device), self.config.size_px)
            encoded = self.backend.encode_moments(images_BCHW)[:, :kept]
            count = min(self.spec.batch, len(patches_NHWC) - first)
            moments[first : first + count] = encoded[:count]
        return moments

    def latents(self, epoch: int = 0) -> Tensor:
        """The latent bank fp32 [N, C, h, w]: one row per sample, before mixup and noise.

        With posterior "sample" it is mean + std · n, with a new n for every epoch. With start
        "noise" it is one row of zeros for all samples.
        """
        if self._moments is None:
            return torch.zeros(1, *self._latent_CHW, device=self._device)
        if self.config.posterior == "mean":
            return self._moments
        if self._bank_epoch is None or self._bank_epoch[0] != epoch:
            mean, std = self._moments.chunk(2, dim=1)
            samples_N = torch.arange(len(mean), device=self._device)
            noise = normal(self.config.seed, Draw.POSTERIOR, samples_N, epoch, self._latent_CHW)
            self._bank_epoch = (epoch, mean + std * noise)
        return self._bank_epoch[1]

    @torch.no_grad()
    def expand(
        self, samples: Tensor | np.ndarray | Sequence[int], epoch: int, out: Tensor | None = None
    ) -> Tensor:
        """Images of `samples` (rows of the coreset, any order, repeats allowed) at `epoch`.

        Returns fp32 [len(samples), 3, H, W] in [-1, 1] in the requested order, in `out` if given.
        Raises ValueError when samples or `out` do not fit, or, unless `nan_gate` is off, when the
        networks overflow to NaN.
        """
        rows = np.asarray(samples, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._labels_N)):
            raise ValueError(
                f"samples must lie in [0, {len(self._labels_N)}), got {rows.min()} to {rows.max()}"
            )
        shape = (len(rows), 3, self.config.size_px, self.config.size_px)
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=self._device)
        elif tuple(out.shape) != shape or out.dtype != torch.float32:
            raise ValueError(f"out must be fp32 {shape}, got {out.dtype} {tuple(out.shape)}")
        for plan in self._plans(rows):
            images_BCHW = self.within_memory(partial(self._expand_batch, plan, epoch))
            slots = np.flatnonzero(plan.targets_B >= 0)
            targets = torch.from_numpy(plan.targets_B[slots]).to(out.device)
            kept = images_BCHW[torch.from_numpy(slots).to(self._device)]
            out[targets] = kept.to(out.device)
        self.require_numbers(out)
        return out

    def require_numbers(self, images: Tensor) -> None:
        """Raise ValueError if any is NaN, unless `nan_gate` is off."""
        # Once per call, not per batch: the check waits for the GPU. Later kernels clamp, and would
        # turn NaN into black pixels, which a teacher labels without complaint.
        if self.config.nan_gate and bool(images.isnan().any()):
            raise ValueError(
                f"{self.model.name} makes NaN in {self.config.precision}: use --vae-precision "
                "fp32, --precision bf16 or fp32, or weights that are not damaged"
            )

    def within_memory(self, call: Callable[[], Tensor]) -> Tensor:
        """Call the networks. Raises ValueError, saying what to do, when they run out of memory."""
        try:
            return call()
        except torch.OutOfMemoryError:
            pass  # raise below, when the frames that hold tensors are gone
        raise ValueError(
            f"{self.spec.batch} images of {self.config.size_px} px at a time do not fit into the "
            f"memory of {self.spec.device} with {self.model.name}: give a smaller --engine-batch"
        )

    def calls(self, samples: Tensor | np.ndarray | Sequence[int]) -> list[np.ndarray]:
        """Positions in `samples` of the images that each call of the denoiser makes, int64.

        `expand` of some of these sets, one after the other, repeats their calls slot for slot: so
        ranks can share the samples and get the same bits.
        """
        plans = self._plans(np.asarray(samples, dtype=np.int64))
        return [plan.targets_B[plan.targets_B >= 0] for plan in plans]

    def _plans(self, rows: np.ndarray) -> Iterator[BatchPlan]:
        return plan_batches(
            rows,
            self._labels_N,
            prompts=self.spec.prompts,
            images_per_prompt=self.spec.images_per_prompt,
        )

    def _expand_batch(self, plan: BatchPlan, epoch: int) -> Tensor:
        schedule, seed = self.schedule, self.config.seed
        samples_B = torch.from_numpy(plan.samples_B).to(self._device)
        added_GD, kv_GP = self.prompts_of(plan.classes_G)
        state_BCHW, x_BCHW = self._start(plan, samples_B, epoch)
        for step in range(schedule.evals):
            eps_BCHW = self.backend.denoise(x_BCHW, self._timesteps_1[step], added_GD, kv_GP)
            last = step + 1 == schedule.evals
            state_BCHW, x_BCHW = euler_ancestral_step(
                state_BCHW,
                eps_BCHW,
                samples_B,
                sigma=schedule.sigmas[step],
                sigma_down=schedule.sigmas_down[step],
                sigma_up=schedule.sigmas_up[step],
                next_scale=1.0 if last else schedule.model_scales[step + 1],
                seed=seed,
                step=step,
                epoch=epoch,
            )
        return self.backend.decode(state_BCHW)

    def prompts_of(self, classes_G: np.ndarray) -> tuple[Tensor, Tensor]:
        """Added embeddings, keys and values of the prompts of a call, on the device."""
        return self.prompt_bank.of(classes_G)

    def _start(self, plan: BatchPlan, samples_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """First state and model input."""
        from_noise = self.config.start == "noise"
        classes_B = self._labels_N[plan.samples_B]
        return start_state(
            self.latents(epoch),
            torch.zeros_like(samples_B) if from_noise else samples_B,
            samples_B,
            torch.from_numpy(self._firsts_K[classes_B]).to(self._device),
            torch.from_numpy(self._counts_K[classes_B]).to(self._device),
            seed=self.config.seed,
            epoch=epoch,
            sigma=self.schedule.start_sigma,
            mixup=self.config.mixup and not from_noise,
            model_scale=self.schedule.model_scales[0],
            quantiles_Q=self._quantiles_Q,
        )

    def describe(self) -> dict[str, Any]:
        """What names the images, and what made them, for a manifest."""
        return {
            **describe_source(self.model, self.config),
            "batch": self.spec.batch,
            "images_per_prompt": self.spec.images_per_prompt,
            "device": self.spec.device,
            "diffusers": version("diffusers"),
            **self.backend.describe(),
        }

    def varied(self, **changes: Any) -> Expander:
        """An Expander of the same patches and networks with other settings, of those in `VARIED`.

        Costs nothing; closing either closes both. Raises ValueError for any other field.
        """
        wrong = changes.keys() - VARIED
        if wrong:
            raise ValueError(f"cannot vary {sorted(wrong)[0]} of an Expander: make a new one")
        other = copy.copy(self)
        other.config = config = dataclasses.replace(self.config, **changes)
        other.schedule = make_schedule(
            self.model.scheduler_config(), steps=config.steps, rho=config.rho, start=config.start
        )
        other._timesteps_1 = self._as_tensors(other.schedule.timesteps)
        other._quantiles_Q = self._mixup_quantiles(config)
        if config.start == "noise":
            other._moments = None
        elif self._moments is None:
            raise ValueError("this Expander has no patches: make a new one for start 'image'")
        other._bank_epoch = None
        return other

    def close(self) -> None:
        """Free the networks and the banks; the Expander is unusable afterwards."""
        self.backend.close()
        self._moments, self._bank_epoch = None, None
        del self.prompt_bank
