"""One call for every way to run the networks; today `eager` and `ort`.

What is asked for runs, or fails with what is missing and how to get it: there is no fallback.
Legend: B = G · n images of G prompts, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..export.config import BackendName, DeviceName, EngineSpec
from ..export.models import ModelParts, Unavailable
from ..export.modules import Denoiser, LatentDecoder, LatentEncoder


class Backend(Protocol):
    """The networks at one static batch. Tensors lie on the spec's device; images in [-1, 1].

    A result may be a buffer that the next call of the same method overwrites.
    """

    name: str
    spec: EngineSpec

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        """Mean and standard deviation of the latents, fp32 [B, 2C, h, w]."""
        ...

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        """Predicted noise, fp32, of the scaled states x (fp32)."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images, fp32 [B, 3, H, W] in [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, versions and settings, for a manifest."""
        ...

    def close(self) -> None:
        """Free what the backend holds."""
        ...


class EagerBackend:
    """Torch as it is: the reference of the other backends."""

    name = "eager"

    def __init__(self, parts: ModelParts, spec: EngineSpec, *, tokens: int) -> None:
        self.spec = spec
        self._unet_dtype, self._vae_dtype = parts.unet.dtype, parts.vae.dtype
        self._denoiser = Denoiser(parts.unet, tokens)
        self._encoder, self._decoder = LatentEncoder(parts.vae), LatentDecoder(parts.vae)

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        return self._encoder(images_BCHW.to(self._vae_dtype)).float()

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        return self._denoiser(x_BCHW.to(self._unet_dtype), timestep_1, added_GD, kv_GP).float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._decoder(latents_BCHW.to(self._vae_dtype)).float()

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "torch": torch.__version__}

    def close(self) -> None:
        del self._denoiser, self._encoder, self._decoder


def resolve_device(device: DeviceName) -> Literal["cpu", "cuda"]:
    """Turn `auto` into what is here; Unavailable when cuda is asked for where there is none."""
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise Unavailable(
        "device cuda was asked for, but torch finds no CUDA GPU here: run on a machine with an "
        "NVIDIA GPU, its driver and a CUDA build of torch, or use --device cpu"
    )


def open_backend(name: BackendName, parts: ModelParts, spec: EngineSpec, *, tokens: int) -> Backend:
    """Open the backend asked for; it takes over the parts. Unavailable: something is missing."""
    if name in ("auto", "eager"):
        return EagerBackend(parts, spec, tokens=tokens)
    raise Unavailable(f"the {name} backend cannot run here")
