"""One interface for all ways to run the networks: torch itself, or compiled engines.

A requested backend runs, or fails with what is missing and how to get it: there is no fallback.
Legend: B = G · n images of G prompts, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ...export.bundle import Bundle, default_bundles_folder, stored_folder, stored_keys
from ...export.config import (
    EIGHT_BITS,
    UNBUILT,
    BackendName,
    DeviceName,
    EngineSpec,
    Precision,
    TrtLibrary,
    TrtLibraryName,
)
from ...export.eight_bits import Calibration, quantise_graph
from ...export.engines import engine_key, exporter, open_engine, require_engine, require_fp8
from ...export.graphs import Graph, make_graphs
from ...export.machine import cxx_compiler, driver_version, gpus_of_driver, triton_needs
from ...export.models import (
    ModelParts,
    ModelSource,
    Unavailable,
    default_dtype,
    resolve_vae_precision,
    rest_precision,
)
from ...export.parity import without_tf32
from ...export.terminal import say
from ...export.trt_library import cards_of, choose_library, trt_title
from ..config import ExpandConfig
from .batches import images_per_prompt
from .fused_layers import fuse
from .regions import compiling

COMPILED: tuple[BackendName, ...] = ("trt", "inductor", "openvino", "ort")
"""Backends with engines, the fastest by expectation first."""


class Backend(Protocol):
    """The networks at one static batch. Tensors are on the spec's device; images in [-1, 1].

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
        """Predicted noise, fp32, for the scaled states x (fp32)."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images, fp32 [B, 3, H, W] in [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, versions and settings, for a manifest."""
        ...

    def close(self) -> None:
        """Free the backend's memory."""
        ...


class TorchBackend:
    """Torch itself: `eager`, the reference for the other backends, or `compile`, whose blocks are
    compiled when it is opened (regions.py)."""

    def __init__(
        self,
        name: BackendName,
        parts: ModelParts,
        spec: EngineSpec,
        *,
        tokens: int,
        quantise: Callable[[Graph], None] | None = None,
    ) -> None:
        self.name, self.spec = name, spec
        if spec.device == "cuda":
            fuse(parts)
        self._unet_dtype, self._vae_dtype = parts.unet.dtype, parts.vae.dtype
        encoder, denoiser, decoder = graphs = make_graphs(parts, spec, tokens=tokens)
        if quantise is not None:
            for graph in graphs:
                quantise(graph)
        self._vae_batch = decoder.inputs[0].shape[0]
        self._denoiser = denoiser.module
        # sdxl-tiny, batch 32, one thread: decoder 8.3 → 6.7 ms per image, encoder 3.1 → 2.7; the
        # UNet gains nothing from it on the CPU (4.3 ms).
        self._encoder = encoder.module.to(memory_format=torch.channels_last)
        self._decoder = decoder.module.to(memory_format=torch.channels_last)
        if name == "compile":
            self._compile(graphs)

    @torch.no_grad()
    def _compile(self, graphs: Sequence[Graph]) -> None:
        images, unet_inputs, latents = (graph.random_inputs(seed=0) for graph in graphs)
        networks = (self._encoder, self._denoiser, self._decoder)
        with compiling(*networks, device=self.spec.device):
            self.encode_moments(*images)
            self.denoise(*unet_inputs)
            self.decode(*latents)

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        with without_tf32():
            return _in_parts(self._encoder, self._for_vae(images_BCHW), self._vae_batch)

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        with without_tf32():
            return self._denoiser(x_BCHW.to(self._unet_dtype), timestep_1, added_GD, kv_GP).float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        with without_tf32():
            return _in_parts(self._decoder, self._for_vae(latents_BCHW), self._vae_batch)

    def _for_vae(self, values_BCHW: Tensor) -> Tensor:
        return values_BCHW.to(self._vae_dtype, memory_format=torch.channels_last)

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "torch": torch.__version__}

    def close(self) -> None:
        del self._denoiser, self._encoder, self._decoder


class CompiledBackend:
    """A bundle's three sessions."""

    def __init__(self, bundle: Bundle, spec: EngineSpec) -> None:
        self.name, self.spec = bundle.manifest["key"]["backend"], spec
        self._bundle = bundle
        self._sessions = exporter(self.name).open_sessions(bundle.folder, spec)

    def encode_moments(self, images_BCHW: Tensor) -> Tensor:
        session = self._sessions["encoder"]
        return _in_parts(session.run, images_BCHW, session.rows)

    def denoise(
        self, x_BCHW: Tensor, timestep_1: Tensor, added_GD: Tensor, kv_GP: Tensor
    ) -> Tensor:
        return self._sessions["denoiser"].run(x_BCHW, timestep_1, added_GD, kv_GP).float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        session = self._sessions["decoder"]
        return _in_parts(session.run, latents_BCHW, session.rows)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "bundle": self._bundle.folder.name,
            "bundle_sha256": self._bundle.manifest["content_sha256"],
            **self._bundle.manifest["key"]["libraries"],
        }

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


def _in_parts(run: Callable[[Tensor], Tensor], values_BCHW: Tensor, rows: int) -> Tensor:
    """`run`, on `rows` images at a time, in fp32; the last image fills up the last part."""
    if len(values_BCHW) <= rows:
        return run(values_BCHW).float()
    padding = values_BCHW[-1:].expand(-len(values_BCHW) % rows, -1, -1, -1)
    parts = (
        torch.cat([values_BCHW, padding]).split(rows) if len(padding) else values_BCHW.split(rows)
    )
    # A call overwrites the last one's result.
    made = torch.cat([run(part).to(torch.float32, copy=True) for part in parts])
    return made[: len(values_BCHW)]


def resolve_device(device: DeviceName) -> Literal["cpu", "cuda"]:
    """Resolve `auto` to a device.

    Raises Unavailable when cuda is requested but missing or Triton cannot launch kernels there, and
    for `auto` when there is a GPU that torch cannot use: nobody who has one means the CPU.
    """
    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        if lacking := triton_needs():
            raise Unavailable(f"our Triton kernels on a GPU need {lacking}")
        return "cuda"
    if gpus_of_driver() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        raise Unavailable(
            f"there is an NVIDIA GPU with driver {driver_version()}, but torch "
            f"{torch.__version__} cannot use it (its CUDA: {torch.version.cuda or 'none'}): update "
            "the driver, install a torch for it, or use --device cpu"
        )
    if device == "auto":
        return "cpu"
    raise Unavailable(
        "device cuda was requested, but torch finds no CUDA GPU here: run on a machine with an "
        "NVIDIA GPU, its driver and a CUDA build of torch, or use --device cpu"
    )


def choose_backend(
    spec: EngineSpec,
) -> Literal["ort", "openvino", "inductor", "compile", "trt", "eager"]:
    """Resolve `auto` for these settings.

    CPU, sdxl-tiny, batch 32, two threads, images per second: in fp32 ort, 112, built in 10 s
    without a compiler (inductor: 135, built in 44 s); in bf16 inductor, 280, if there is a
    compiler, otherwise openvino, which is as fast where it is installed, or eager, 159. On a GPU
    compile, until rows of a card say otherwise; for int8 trt alone.
    """
    if spec.device == "cuda":
        return "trt" if spec.precision == "int8" else "compile"
    if spec.precision == "fp32":
        return "ort"
    if spec.precision == "bf16" and cxx_compiler():
        return "inductor"
    try:
        exporter("openvino").require(spec.precision, spec.device)
    except Unavailable:
        return "ort" if spec.precision == "int8" else "eager"
    return "openvino"


def plan_engine(
    model: ModelSource,
    config: ExpandConfig,
    class_counts: np.ndarray,
    targets: Sequence[str] = (),
    calibration: str | None = None,
) -> tuple[BackendName, EngineSpec]:
    """The backend and the engine that run a configuration; reports what `auto` chose.

    `class_counts`: samples of each class. `targets`: cards elsewhere (EngineSpec.targets).
    `calibration`: of eight bits (EngineSpec.calibration). Where
    choose_backend builds none, `auto` prefers an engine that is stored; trt prefers one of either
    library. Raises Unavailable when a device or library is missing.
    """
    device = "cuda" if targets else resolve_device(config.device)
    spec = EngineSpec(
        size_px=config.size_px,
        batch=config.batch,
        images_per_prompt=config.images_per_prompt or images_per_prompt(config.batch, class_counts),
        precision=config.precision,
        vae_precision=resolve_vae_precision(model, config.precision, config.vae_precision),
        device=device,
        calibration=calibration,
    )
    name = choose_backend(spec) if config.backend == "auto" else config.backend
    looks = not targets and (name == "trt" or (name in UNBUILT and config.backend == "auto"))
    stored = _stored_engine(model, spec, config) if looks else None
    if stored is not None:
        name, spec = stored
    elif name == "trt":
        library, built_for = trt_choice(config.trt_library, device, targets)
        spec = replace(spec, trt_library=library, targets=built_for)
    if config.backend == "auto":
        say(f"backend: {name} on {device}")
    return name, spec


def bundles_of(config: ExpandConfig) -> Path:
    """Folder of built engines."""
    return config.bundles or default_bundles_folder()


def _stored_engine(
    model: ModelSource, spec: EngineSpec, config: ExpandConfig
) -> tuple[BackendName, EngineSpec] | None:
    """The first stored engine for these settings, in COMPILED's order; TensorRT's before RTX's."""
    bundles, asked = bundles_of(config), config.trt_library
    held = {key["backend"] for _, key in stored_keys(bundles) if key["model"] == model.name}
    for name in COMPILED if config.backend == "auto" else (config.backend,):
        libraries = (asked,) if asked != "auto" or name != "trt" else ("tensorrt", "rtx")
        for library in libraries if name in held else ():
            own = spec
            try:
                if name == "trt":
                    chosen, targets = choose_library(library, device=spec.device)
                    own = replace(spec, trt_library=chosen, targets=targets)
                require_engine(name, model, own)
            except Unavailable:
                continue
            if stored_folder(bundles, engine_key(name, model, own)) is not None:
                return name, own
    return None


@default_dtype(torch.float32)  # modules and graphs make the VAE's scale in it
def open_backend(
    name: BackendName,
    model: ModelSource,
    parts: ModelParts,
    spec: EngineSpec,
    *,
    tokens: int,
    bundles: Path,
    calibration: Calibration | None = None,
) -> Backend:
    """Open the backend that plan_engine chose, which takes over the parts.

    Raises Unavailable when a requirement is missing, BundleError when a bundle is damaged or cannot
    be built.
    """
    if name in UNBUILT:
        quantise = None
        if calibration is not None:
            vae = resolve_vae_precision(model, spec.precision, spec.vae_precision)
            settings = {"precision": spec.precision, "vae_precision": vae}
            quantise = partial(quantise_graph, calibration=calibration, **settings)
        return TorchBackend(name, parts, spec, tokens=tokens, quantise=quantise)
    bundle = open_engine(
        name, model, parts, spec, tokens=tokens, bundles=bundles, calibration=calibration
    )
    say_built(bundle)
    return CompiledBackend(bundle, spec)


def say_built(bundle: Bundle) -> None:
    """Report a bundle that was just built."""
    if bundle.built:
        seconds, size_mb = bundle.manifest["report"]["seconds"], bundle.size_bytes / 1e6
        say(f"built {bundle.folder} ({size_mb:.0f} MB) in {seconds:.0f} s")


def require_backend(
    name: BackendName,
    precision: Precision,
    device: str,
    library: TrtLibrary = "auto",
    targets: Sequence[str] = (),
) -> None:
    """Raise Unavailable unless the backend can run here, or build for targets elsewhere: a check
    before hours of other work."""
    if precision == "fp8" and name != "eager":
        require_fp8(device, targets)
    if name == "trt" or (name == "auto" and (precision, device) == ("int8", "cuda")):
        choose_library(library, targets, device)
    elif name == "compile":
        exporter("inductor").require(rest_precision(precision, device), device)
        if precision in EIGHT_BITS and (precision == "int8" or device == "cpu"):
            raise Unavailable(
                f"the compile backend runs fp8 on a GPU, and no int8, not {precision} on {device}: "
                "use --backend openvino on a CPU, --backend trt on a GPU, or --backend eager, "
                "which simulates it"
            )
    elif name not in ("auto", "eager"):
        exporter(name).require(precision, device)


def trt_choice(
    library: TrtLibrary, device: str, targets: Sequence[str] = ()
) -> tuple[TrtLibraryName, tuple[str, ...]]:
    """EngineSpec's (trt_library, targets) of backend trt, reported on stderr."""
    chosen, built_for = choose_library(library, targets, device)
    say(f"library: {trt_title(chosen)}{f', for {cards_of(built_for)}' if built_for else ''}")
    return chosen, built_for
