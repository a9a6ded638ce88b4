"""The Expander: patches → latents once → mixed and noised → a few UNet steps → images.

An image is a pure function of (model, patch, prompt, settings; seed, sample, epoch): all noise is
counter-based (kernels/noise.py), so order, neighbours and batch composition have no effect.
Latents of the patches and text embeddings are computed once, and so are the cross-attention keys
and values of as many classes as fit (prompt_bank.py). Legend: N samples, K classes, B images of G
prompts in a batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...export.config import EIGHT_BITS
from ...export.models import DTYPES, ModelParts, ModelSource, load_parts, rest_precision
from ...kernels.latents import start_state
from ...kernels.noise import Draw, normal
from ...kernels.pixels import upsample_patches
from ...kernels.table_step import euler_ancestral_table_step, step_table
from ..config import ExpandConfig
from .backends import Backend, bundles_of, open_backend, plan_engine, resolve_device
from .batches import DeviceBatch, plan_batches, upload, upload_plans
from .calibration import plan_calibration
from .mixup import mixup_quantiles
from .naming import describe_source
from .prompt_bank import open_prompt_bank
from .prompts import encode_prompts
from .schedule import make_schedule
from .schedule_graph import ScheduleGraph

VARIED = {"steps", "rho", "mixup", "mixup_weight", "start", "seed"}
"""Settings that need no other networks or engine."""


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
        self.model, self._labels_N = model, np.asarray(labels_N, dtype=np.int64)
        self._moments: Tensor | None = None
        device = resolve_device(config.device)
        self._device = torch.device(device)
        self._configure(config)
        self._check_coreset(patches_NHWC, prompts_K)
        counts_K = np.bincount(self._labels_N, minlength=len(prompts_K))
        self._firsts_K = upload(np.cumsum(counts_K) - counts_K, self._device)
        self._counts_K = upload(counts_K, self._device)
        calibration = None
        if config.precision in EIGHT_BITS:
            given = {"patches_NHWC": patches_NHWC, "labels_N": self._labels_N}
            calibration = plan_calibration(
                Expander, model, replace(config, device=device), prompts_K=prompts_K, **given
            )
        sha256 = calibration and calibration.sha256
        backend, self.spec = plan_engine(model, config, counts_K, calibration=sha256)
        dtype = DTYPES[rest_precision(config.precision, device)]
        text = encode_prompts(model, prompts_K, device=device, dtype=dtype)
        parts = load_parts(
            model,
            precision=config.precision,
            vae_precision=config.vae_precision,
            device=device,
        )
        self.latent_CHW = self._latent_shape(parts)
        self.prompt_bank = open_prompt_bank(
            parts,
            text,
            conditioning_px=config.conditioning_px or config.size_px,
            least=self.spec.prompts,
            budget_bytes=config.prompt_cache_bytes,
        )
        self.backend: Backend = open_backend(
            backend,
            model,
            parts,
            self.spec,
            tokens=self.prompt_bank.tokens,
            bundles=bundles_of(config),
            calibration=calibration,
        )
        del parts, text
        gc.collect()
        if patches_NHWC is not None and config.start == "image":
            self._moments = self.encode(patches_NHWC)

    def _configure(self, config: ExpandConfig) -> None:
        """Set what depends on the fields in `VARIED`."""
        self.config = config
        self.schedule = make_schedule(
            self.model.scheduler_config(), steps=config.steps, rho=config.rho, start=config.start
        )
        self._timesteps_1 = [
            torch.tensor([timestep], device=self._device, dtype=torch.float32)
            for timestep in self.schedule.timesteps
        ]
        schedule, evals = self.schedule, self.schedule.evals
        scales = (*schedule.model_scales[1:], 1.0)
        sigmas = (schedule.sigmas, schedule.sigmas_down, schedule.sigmas_up)
        self._table_S3 = step_table(*sigmas, scales, device=self._device)
        self._steps_S = torch.arange(evals, device=self._device)
        on_gpu = self._device.type == "cuda"
        self._graph: ScheduleGraph | None = None
        if config.cuda_graph and on_gpu:
            self._graph = ScheduleGraph(self._evaluate, f"{evals} evaluations and the decoder")
        quantiles_Q = mixup_quantiles(config.mixup_weight)
        self._quantiles_Q = None if quantiles_Q is None else quantiles_Q.to(self._device)
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
        if len(patches_NHWC) != len(labels):
            raise ValueError(f"{len(patches_NHWC)} patches but {len(labels)} labels")

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
        channels = self.latent_CHW[0]
        kept = channels if self.config.posterior == "mean" else 2 * channels
        moments = torch.empty(
            len(patches_NHWC), kept, *self.latent_CHW[1:], device=self._device, dtype=torch.float32
        )
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
            return torch.zeros(1, *self.latent_CHW, device=self._device, dtype=torch.float32)
        if self.config.posterior == "mean":
            return self._moments
        if self._bank_epoch is None or self._bank_epoch[0] != epoch:
            mean, std = self._moments.chunk(2, dim=1)
            samples_N = torch.arange(len(mean), device=self._device)
            noise = normal(self.config.seed, Draw.POSTERIOR, samples_N, epoch, self.latent_CHW)
            self._bank_epoch = (epoch, mean + std * noise)
        return self._bank_epoch[1]

    @torch.no_grad()
    def expand(
        self, samples: Tensor | np.ndarray | Sequence[int], epoch: int | Sequence[int]
    ) -> Tensor:
        """Images of `samples` (rows of the coreset, any order, repeats allowed) at `epoch`, or each
        at its own.

        Returns fp32 [len(samples), 3, H, W] in [-1, 1] in the requested order. Raises ValueError
        when a sample does not exist, when a batch does not fit into memory, or, unless `nan_gate`
        is off, when the networks overflow to NaN.
        """
        rows, epochs = np.asarray(samples, dtype=np.int64), np.atleast_1d(epoch).tolist()
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._labels_N)):
            raise ValueError(
                f"samples must lie in [0, {len(self._labels_N)}), got {rows.min()} to {rows.max()}"
            )
        if not len(rows):
            side = self.config.size_px
            return torch.empty(0, 3, side, side, device=self._device, dtype=torch.float32)
        images = self.in_batches(partial(self._expand_batch, epochs), rows, self._labels_N)
        self.require_numbers(images)
        return images

    def variants(self, sample: int, epochs: Sequence[int]) -> Tensor:
        """`expand` of one sample at each of `epochs`, many of them in one call: the same images, to
        rounding.

        eager, which has no static batch, pads nothing. Shapes and errors are those of `expand`.
        """
        other, made = self, len(epochs)
        if self.backend.name == "eager" and made:
            batch = math.ceil(made / math.ceil(made / self.spec.batch))
            other = copy.copy(self)
            other.spec = replace(self.spec, batch=batch, images_per_prompt=batch)
        return other.expand(np.full(made, sample), epochs)

    def in_batches(
        self, call: Callable[[DeviceBatch], Tensor], rows: np.ndarray, labels_N: np.ndarray
    ) -> Tensor:
        """Results of `call` for `rows`, at least one, in their order, a full batch at a time: fp32.

        `labels_N` holds the class of every row number. Raises ValueError, saying what to do, when
        the networks run out of memory.
        """
        out, plans = None, list(plan_batches(rows, labels_N, self.spec))
        for batch in upload_plans(plans, len(rows), self._device):
            made = self._within_memory(call, batch)
            if out is None:  # padding is written behind the last image
                shape = (len(rows) + 1, *made.shape[1:])
                out = torch.empty(shape, device=self._device, dtype=torch.float32)
            out[batch.targets_B] = made
        assert out is not None
        return out[:-1]

    def require_numbers(self, images: Tensor) -> None:
        """Raise ValueError if any is NaN, unless `nan_gate` is off."""
        # Once per call, not per batch: the check waits for the GPU. Later kernels clamp, and would
        # turn NaN into black pixels, which a teacher labels without complaint.
        if self.config.nan_gate and bool(images.isnan().any()):
            raise ValueError(
                f"{self.model.name} makes NaN in {self.config.precision}: use --vae-precision "
                "fp32, --precision bf16 or fp32, or weights that are not damaged"
            )

    def _within_memory(self, call: Callable[[DeviceBatch], Tensor], batch: DeviceBatch) -> Tensor:
        try:
            return call(batch)
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
        rows = np.asarray(samples, dtype=np.int64)
        plans = plan_batches(rows, self._labels_N, self.spec)
        return [plan.targets_B[plan.targets_B >= 0] for plan in plans]

    def _expand_batch(self, epochs: Sequence[int], batch: DeviceBatch) -> Tensor:
        """Images of a batch at one epoch, or of slots at `epochs` by their target; a graph's next
        replay overwrites them."""
        state_BCHW, x_BCHW = self._start(batch, epochs[0])
        epoch_E = torch.full((1,), epochs[0], dtype=torch.int64, device=self._device)
        work = self._evaluate if self._graph is None else self._graph
        if len(epochs) > 1:
            work, of_slots = self._evaluate, [epochs[target] for target in batch.plan.targets_B]
            starts = {epoch: self._start(batch, epoch) for epoch in set(of_slots)}
            both = [[part[slot] for part in starts[e]] for slot, e in enumerate(of_slots)]
            state_BCHW, x_BCHW = map(torch.stack, zip(*both, strict=True))
            epoch_E = torch.tensor(of_slots, dtype=torch.int64, device=self._device)
        added_GD, kv_GP = self.prompt_bank.of(batch.plan.classes_G, batch.classes_G)
        return work(state_BCHW, x_BCHW, batch.samples_B, added_GD, kv_GP, epoch_E)

    def _evaluate(
        self,
        state_BCHW: Tensor,
        x_BCHW: Tensor,
        samples_B: Tensor,
        added_GD: Tensor,
        kv_GP: Tensor,
        epoch_E: Tensor,
    ) -> Tensor:
        """All evaluations, and the decoded images; only tensors decide, so it can be recorded.

        E is 1, the epoch of all slots, or B.
        """
        for step, timestep_1 in enumerate(self._timesteps_1):
            eps_BCHW = self.backend.denoise(x_BCHW, timestep_1, added_GD, kv_GP)
            parts = (state_BCHW, eps_BCHW, samples_B, epoch_E)
            of_epochs = zip(*(part.split(len(part) // len(epoch_E)) for part in parts), strict=True)
            made = [
                euler_ancestral_table_step(
                    *(state, eps, samples, self._table_S3),
                    step_1=self._steps_S[step : step + 1],
                    epoch_1=epoch_1,
                    seed=self.config.seed,
                )
                for state, eps, samples, epoch_1 in of_epochs
            ]
            state_BCHW, x_BCHW = made[0]
            if len(made) > 1:
                state_BCHW, x_BCHW = map(torch.cat, zip(*made, strict=True))
        return self.backend.decode(state_BCHW)

    def _start(self, batch: DeviceBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """First state and model input."""
        from_noise, samples_B = self.config.start == "noise", batch.samples_B
        classes_B = batch.classes_G.repeat_interleave(self.spec.images_per_prompt)
        return start_state(
            self.latents(epoch),
            torch.zeros_like(samples_B) if from_noise else samples_B,
            samples_B,
            self._firsts_K[classes_B],
            self._counts_K[classes_B],
            seed=self.config.seed,
            epoch=epoch,
            sigma=self.schedule.start_sigma,
            mixup=self.config.mixup and not from_noise,
            model_scale=self.schedule.model_scales[0],
            quantiles_Q=self._quantiles_Q,
        )

    def describe(self) -> dict[str, Any]:
        """The fields that name the images, with batch, device and backend: plain JSON."""
        return {
            **describe_source(self.model, self.config),
            "batch": self.spec.batch,
            "images_per_prompt": self.spec.images_per_prompt,
            "device": self.spec.device,
            "diffusers": version("diffusers"),
            **self.backend.describe(),
        }

    def varied(self, **changes: Any) -> Expander:
        """An Expander that shares patches and networks, with other values of fields in `VARIED`.

        Costs nothing; closing either closes both. Raises ValueError for any other field.
        """
        wrong = changes.keys() - VARIED
        if wrong:
            raise ValueError(f"cannot vary {sorted(wrong)[0]} of an Expander: make a new one")
        other = copy.copy(self)
        other._configure(replace(self.config, **changes))
        if other.config.start == "noise":
            other._moments = None
        elif self._moments is None:
            raise ValueError("this Expander has no patches: make a new one for start 'image'")
        return other

    def close(self) -> None:
        """Free the networks and the banks; the Expander is unusable afterwards."""
        self.backend.close()
        self._graph = None
        self._moments, self._bank_epoch = None, None
        del self.prompt_bank
