"""An engine's settings: names and shapes, without torch so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EightBits = Literal["int8", "fp8"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
VaePrecision = Literal["auto", "fp16", "bf16", "fp32", "int8", "fp8"]
EIGHT_BITS = get_args(EightBits)
OnnxOpset = Literal[21, 23]
BackendName = Literal["auto", "trt", "ort", "openvino", "inductor", "compile", "eager"]
DeviceName = Literal["auto", "cpu", "cuda"]
Weights = Literal["pretrained", "random"]
TrtLibraryName = Literal["tensorrt", "rtx"]
TrtLibrary = Literal["auto", "tensorrt", "rtx"]

UNBUILT = ("compile", "eager")
"""Backends that are torch itself: there is nothing to build."""
OPTIONAL = ("trt_library", "targets", "calibration")
"""Fields of EngineSpec that a key holds only where they say something."""
DEFAULT_OPSET: OnnxOpset = 21
"""The first opset with a native GroupNormalization; 23 adds a native Attention."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The static shapes and the precision of one engine."""

    size_px: int
    """Height and width of the images; a multiple of the VAE's factor."""
    batch: int = 32
    """Images per call; a short batch is padded."""
    min_batch: int | None = None
    """Fewest images per call, for an engine with a range of batches; None: `batch` only, which is
    fastest. Both are multiples of `images_per_prompt`."""
    images_per_prompt: int = 1
    """n in a batch of G prompts × n images; divides `batch`."""
    precision: Precision = "fp32"
    """Precision of weights and activations; the sampler's state is always fp32."""
    vae_precision: VaePrecision = "auto"
    """Precision of the VAE; `auto` is `precision`, or fp32 for a VAE that overflows in fp16."""
    opset: OnnxOpset = DEFAULT_OPSET
    """ONNX opset, for backends that start from ONNX."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that it runs on."""
    trt_library: TrtLibraryName | None = None
    """Library of the trt backend; None for other backends."""
    targets: tuple[str, ...] = ()
    """Compute capabilities that TensorRT for RTX builds for, as "sm86"; empty for all others, which
    build for the GPU of this machine."""
    calibration: str | None = None
    """eight_bits.Calibration.sha256 of an engine in eight bits; None for others."""

    def __post_init__(self) -> None:
        if self.size_px < 1 or self.batch < 1:
            raise ValueError(
                f"size_px and batch must be at least 1, got {self.size_px} and {self.batch}"
            )
        if self.images_per_prompt < 1 or self.batch % self.images_per_prompt:
            raise ValueError(
                f"images_per_prompt must divide the batch of {self.batch}, "
                f"got {self.images_per_prompt}"
            )
        if self.vae_precision in EIGHT_BITS and self.vae_precision != self.precision:
            raise ValueError(
                f"--vae-precision {self.vae_precision} goes with --precision {self.vae_precision}, "
                f"got {self.precision}"
            )
        least = self.min_batch
        if least is not None and (not 1 <= least < self.batch or least % self.images_per_prompt):
            raise ValueError(
                f"min_batch must be a multiple of images_per_prompt, {self.images_per_prompt}, "
                f"below the batch of {self.batch}, got {least}"
            )

    @property
    def prompts(self) -> int:
        """G: prompts per batch."""
        return self.batch // self.images_per_prompt

    @property
    def min_prompts(self) -> int:
        """Fewest prompts per batch: `prompts`, unless the engine has a range of batches."""
        return (self.min_batch or self.batch) // self.images_per_prompt
