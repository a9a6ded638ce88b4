"""One call for every way to run the networks; today `eager` and `ort`.

What is asked for runs, or fails with what is missing and how to get it: there is no fallback.
Legend: B = G · n images of G prompts, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..export.bundle import Bundle
from ..export.config import BackendName, DeviceName, EngineSpec
from ..export.models import ModelParts, ModelSource, Unavailable
from ..export.modules import Denoiser, LatentDecoder, LatentEncoder
from ..export.to_ort import GRAPHS, OrtSession, open_ort_bundle


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
        # sdxl-tiny, batch 32, one thread: decoder 8.3 → 6.7 ms per image, encoder 3.1 → 2.7; the
        # UNet gains nothing from it on the CPU (4.3 ms).
        self._encoder = LatentEncoder(parts.vae).to(memory_format=torch.channels_last)
        self._decoder = LatentDecoder(parts.vae).to(memory_format=torch.channels_last)

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        return self._encoder(self._for_vae(images_BCHW)).float()

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        return self._denoiser(x_BCHW.to(self._unet_dtype), timestep_1, added_GD, kv_GP).float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._decoder(self._for_vae(latents_BCHW)).float()

    def _for_vae(self, values_BCHW: Tensor) -> Tensor:
        return values_BCHW.to(self._vae_dtype, memory_format=torch.channels_last)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "torch": torch.__version__}

    def close(self) -> None:
        del self._denoiser, self._encoder, self._decoder


class OrtBackend:
    """ONNX Runtime on the graphs of a bundle."""

    name = "ort"

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        self.spec, self._bundle = spec, bundle
        self._encoder, self._denoiser, self._decoder = (
            OrtSession(bundle.file(f"{graph}.onnx"), spec.device) for graph in GRAPHS
        )

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        return self._encoder.run(images_BCHW).float()

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        return self._denoiser.run(x_BCHW, timestep_1, added_GD, kv_GP).float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._decoder.run(latents_BCHW).float()

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "bundle": self._bundle.folder.name,
            "bundle_sha256": self._bundle.manifest["content_sha256"],
            **self._bundle.manifest["key"]["libraries"],
        }

    def close(self) -> None:
        del self._encoder, self._denoiser, self._decoder


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


def choose_backend(spec: EngineSpec) -> Literal["ort", "eager"]:
    """What `auto` means: the fastest backend that works for these settings on this machine.

    On the CPU in fp32 that is ort (sdxl-tiny, batch 32, one thread, UNet and decoder per image: ort
    3.3 and 5.8 ms, eager 3.9 and 6.8 ms); it has no other precision there.
    """
    if spec.device == "cpu" and spec.precision == "fp32":
        return "ort"
    return "eager"


def open_backend(
    name: BackendName,
    model: ModelSource,
    parts: ModelParts,
    spec: EngineSpec,
    *,
    tokens: int,
    bundles: Path,
) -> Backend:
    """Open the backend asked for; it takes over the parts. `auto` says on stderr what it chose.

    Unavailable: what it needs is missing. BundleError: a bundle that is damaged or cannot be built.
    """
    require_backend(name)
    if name == "auto":
        name = choose_backend(spec)
        print(f"backend: {name} on {spec.device}", file=sys.stderr)
    if name == "eager":
        return EagerBackend(parts, spec, tokens=tokens)
    bundle = open_ort_bundle(model, parts, spec, tokens=tokens, bundles=bundles)
    if bundle.built:
        seconds, size_mb = bundle.manifest["report"]["seconds"], bundle.size_bytes / 1e6
        print(f"built {bundle.folder} ({size_mb:.0f} MB) in {seconds:.0f} s", file=sys.stderr)
    return OrtBackend(bundle, spec)


def require_backend(name: BackendName) -> None:
    """Unavailable unless the backend can run here; asked at once, before hours of other work."""
    if name == "trt":
        raise Unavailable(_why_no_tensorrt())
    if name == "inductor":
        raise Unavailable(
            "the inductor backend is not part of this version: use --backend ort or --backend eager"
        )


def _why_no_tensorrt() -> str:
    if not torch.cuda.is_available():
        return (
            "the trt backend needs an NVIDIA GPU, and torch finds none here: run on a machine with "
            "one and `pip install 'patchbloom[trt]'`, or use --backend ort"
        )
    if find_spec("tensorrt") is None:
        return (
            "the trt backend needs TensorRT: pip install 'patchbloom[trt]', or use --backend eager"
        )
    return "the trt backend is not part of this version: use --backend ort or --backend eager"
