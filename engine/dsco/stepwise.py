"""An Expander's networks one denoising step at a time; the caller changes states in between.

The step is kernels/sampler.py's without its noise: x ← x + eps·(sigma_down - sigma). Nothing here
needs a gradient, so every backend works. Legend: M images, C h w of a latent, H W of an image.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...kernels.sampler import euler_ancestral_step
from ..expand.batches import BatchPlan, plan_batches
from ..expand.expander import Expander


class Stepwise:
    """Uses the batches, prompts and schedule of an Expander that starts from noise."""

    def __init__(self, expander: Expander) -> None:
        self.expander, self.schedule = expander, expander.schedule
        self.device = torch.device(expander.spec.device)
        self.latent_CHW = tuple(expander.latents().shape[1:])

    @torch.no_grad()
    def mean(self, state_MCHW: Tensor, classes_M: np.ndarray, step: int) -> Tensor:
        """The states after evaluation `step`, before its noise is added: fp32 [M, C, h, w].

        `classes_M` are the images' classes, int64. Raises ValueError when a call does not fit into
        memory.
        """
        mean_MCHW = torch.empty_like(state_MCHW)
        for plan in self._calls(classes_M):
            call = partial(self._step, state_MCHW[torch.from_numpy(plan.samples_B)], plan, step)
            _keep(mean_MCHW, plan, self.expander.within_memory(call))
        return mean_MCHW

    def _step(self, state_BCHW: Tensor, plan: BatchPlan, step: int) -> Tensor:
        schedule = self.schedule
        timestep_1 = torch.tensor([schedule.timesteps[step]], device=self.device)
        eps_BCHW = self.expander.backend.denoise(
            state_BCHW * schedule.model_scales[step],
            timestep_1,
            *self.expander.prompts_of(plan.classes_G),
        )
        mean_BCHW, _ = euler_ancestral_step(
            state_BCHW,
            eps_BCHW,
            torch.from_numpy(plan.samples_B).to(self.device),
            sigma=schedule.sigmas[step],
            sigma_down=schedule.sigmas_down[step],
            sigma_up=0.0,
            next_scale=1.0,
            seed=self.expander.config.seed,
            step=step,
            epoch=0,
        )
        return mean_BCHW

    @torch.no_grad()
    def decode(self, latents_MCHW: Tensor, classes_M: np.ndarray) -> Tensor:
        """Decode the last states to images: fp32 [M, 3, H, W] in [-1, 1].

        Raises ValueError for NaN, or when a call does not fit into memory.
        """
        size_px, backend = self.expander.config.size_px, self.expander.backend
        images_MCHW = torch.empty(len(latents_MCHW), 3, size_px, size_px, device=self.device)
        for plan in self._calls(classes_M):
            latents_BCHW = latents_MCHW[torch.from_numpy(plan.samples_B)]
            call = partial(backend.decode, latents_BCHW)
            _keep(images_MCHW, plan, self.expander.within_memory(call))
        self.expander.require_numbers(images_MCHW)
        return images_MCHW

    def _calls(self, classes_M: np.ndarray) -> list[BatchPlan]:
        spec = self.expander.spec
        return list(
            plan_batches(
                np.arange(len(classes_M)),
                classes_M,
                prompts=spec.prompts,
                images_per_prompt=spec.images_per_prompt,
            )
        )


def _keep(out_MCHW: Tensor, plan: BatchPlan, made_BCHW: Tensor) -> None:
    """Copy a call's results to their places in `out_MCHW`, without the padding."""
    slots = np.flatnonzero(plan.targets_B >= 0)
    out_MCHW[torch.from_numpy(plan.targets_B[slots])] = made_BCHW[torch.from_numpy(slots)]
