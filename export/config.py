"""What an engine is built for: names and shapes, free of torch so that `--help` stays quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16"]
BackendName = Literal["auto", "trt", "ort", "inductor", "eager"]
DeviceName = Literal["auto", "cpu", "cuda"]
Weights = Literal["pretrained", "random"]

DEFAULT_OPSET = 21  # gives a native GroupNormalization


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The static shapes and the precision of one engine."""

    size_px: int
    """Height and width of the images; a multiple of the VAE's factor."""
    batch: int = 32
    """Images per call. Always full: a short batch is padded."""
    images_per_prompt: int = 1
    """n of a batch of G prompts × n images; divides `batch`."""
    precision: Precision = "fp32"
    """Of weights and activations; the sampler's state is fp32 in any case."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""

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
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}"
            )

    @property
    def prompts(self) -> int:
        """G: prompts per batch."""
        return self.batch // self.images_per_prompt

    def as_dict(self) -> dict[str, int | str]:
        """The fields, for keys and manifests."""
        return asdict(self)
