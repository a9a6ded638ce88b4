"""Options of `engine`. Torch-free, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from ..export.config import (
    DEFAULT_OPSET,
    BackendName,
    DeviceName,
    OnnxOpset,
    Precision,
    TrtLibrary,
    VaePrecision,
    Weights,
)

ExportFormat = Literal["imagefolder", "webdataset", "parquet", "hf", "ddranking"]


@dataclass(frozen=True, kw_only=True)
class CoresetInfo:
    """Describe a coreset: its content, how it was made, and its size in bytes."""

    example: ClassVar = "engine coreset info runs/demo"
    folder: Positional[Path]
    """The coreset's folder, or a run's, for the one in RUN/coreset; or hf:USER/NAME, on the hub."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class CoresetVerify:
    """Compare every file of a coreset with the hash in its manifest."""

    example: ClassVar = "engine coreset verify runs/demo"
    folder: Positional[Path]
    """The coreset's folder, or a run's, for the one in RUN/coreset; or hf:USER/NAME, on the hub."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class CoresetShow:
    """Draw a contact sheet of a coreset: a row of patches per class."""

    example: ClassVar = "engine coreset show runs/demo --out sheet.png"
    folder: Positional[Path]
    """The coreset's folder, or a run's, for the one in RUN/coreset; or hf:USER/NAME, on the hub."""
    out: Path | None = None
    """The PNG to write. Default: FOLDER.png, beside the folder."""
    patches_per_class: int = 10
    """The longest row, at least 1."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""

    def __post_init__(self) -> None:
        if self.patches_per_class < 1:
            raise ValueError(
                f"--patches-per-class: expected at least 1, got {self.patches_per_class}"
            )
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise ValueError(f"--out: expected a name that ends in .png, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class CoresetExport:
    """Write a coreset in the layout of another library: images, classes, and soft labels."""

    example: ClassVar = "engine coreset export runs/demo --to webdataset --out shards"
    folder: Positional[Path]
    """The coreset's folder, or a run's, for the one in RUN/coreset; or hf:USER/NAME, on the hub."""
    to: ExportFormat
    """`imagefolder` for torchvision, `webdataset`, `parquet`, `hf` for Hugging Face datasets
    (Parquet with a card), `ddranking`."""
    out: Path
    """The folder to write."""
    labels: bool = True
    """Export the stored soft labels too, in webdataset, parquet and hf. An image has several, each
    for a view derived from it (export.json says how); refused where no stored image has any."""
    dataset: str | None = None
    """DD-Ranking's name of the data set, such as ImageNette, which decides the class numbers.
    Required for --to ddranking, and only for that. CIFAR's class folders have its names or numbers,
    those of all other data sets WordNet ids."""
    overwrite: bool = False
    """Replace the export in --out."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""

    def __post_init__(self) -> None:
        if self.dataset is not None and self.to != "ddranking":
            raise ValueError(f"--dataset is for --to ddranking, not {self.to}: leave it out")


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """Compile a model for a backend, compare it with torch, and store it; or find it stored."""

    example: ClassVar = "engine build --model sdxl-turbo"
    groups: ClassVar = {
        "Model": "model weights size batch min_batch images_per_prompt precision vae_precision "
        "calibrate opset",
        "Machine": "backend device trt_library targets bundles",
    }
    model: str | None = None
    """sdxl-turbo, sdxl-tiny, or a folder in diffusers' SDXL layout. Default: sdxl-turbo where there
    is a CUDA device, sdxl-tiny elsewhere."""
    backend: BackendName = "auto"
    """The backend to build for; `auto` takes what `train --backend auto` does, or, where that
    builds nothing, the first of trt, inductor, openvino and ort that works here, and says which."""
    size: int | None = None
    """Side of the images in px. Default: 224, as in `train`, or what the model was trained at if
    that is 128 or less (sdxl-tiny 64)."""
    batch: int = 32
    """Images per call; a short batch is padded."""
    min_batch: int | None = None
    """Fewest images per call, for an engine with a range of batches. Default: --batch alone, which
    is fastest, and what `train` uses."""
    images_per_prompt: int = 1
    """n of a batch of G prompts x n images, a divisor of --batch; `train --build-only` builds with
    the batch and the n of a run."""
    precision: Precision | None = None
    """Precision of weights and activations; int8 and fp8 change the images (--calibrate). Default:
    fp16 on cuda and for --export-only, fp32 on the CPU."""
    vae_precision: VaePrecision = "auto"
    """Precision of encoder and decoder; `auto` is --precision, or fp32 for a VAE that overflows in
    fp16."""
    calibrate: Path | None = None
    """The coreset, or the run, whose patches eight bits are calibrated on. Needed for int8 and fp8,
    except with random weights."""
    opset: OnnxOpset = DEFAULT_OPSET
    """Version of the ONNX operators, where a backend starts from ONNX."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    trt_library: TrtLibrary = "auto"
    """Library of --backend trt: `tensorrt`, or `rtx`, TensorRT for RTX. `auto` is tensorrt where it
    is installed, and rtx with --for."""
    targets: Annotated[tuple[str, ...], arg(name="for")] = ()
    """Build for these cards, which need not be here: names or compute capabilities, as a6000 or
    sm86. Needs --backend trt, and TensorRT for RTX. Default: the GPU of this machine."""
    weights: Weights = "pretrained"
    """`random`: the architecture alone, without a download, to measure memory and speed."""
    export_only: bool = False
    """Write and check the ONNX graphs, and stop: listed as `onnx`, never loaded as an engine."""
    verify: bool = False
    """Hash every byte of models and engines again, instead of trusting size and time of files
    hashed before."""
    keep_refused: bool = False
    """Keep an engine that differs too much from torch as NAME.refused in --bundles, with what was
    measured: for study, never listed or used. The next one replaces it; delete it yourself."""
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "min_batch", "images_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if self.backend != "trt" and (self.targets or self.trt_library != "auto"):
            given = "--for" if self.targets else "--trt-library"
            raise ValueError(f"{given} is for --backend trt: give that, or leave it out")
        if self.targets and (self.export_only or self.device == "cpu"):
            other = "--export-only" if self.export_only else "--device cpu"
            raise ValueError(f"--for builds for a card, {other} does not: leave out one of them")


@dataclass(frozen=True, kw_only=True)
class EngineVerify:
    """Verify every byte of stored engines, and measure their parity against torch again."""

    example: ClassVar = "engine verify all"
    names: Positional[tuple[str, ...]] = ()
    """Names of engines, or unique prefixes of them; none or `all`: every engine."""
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class EngineList:
    """List the stored engines: their purpose, their size, and whether they fit this machine."""

    example: ClassVar = "engine list"
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Show everything recorded about a stored engine, and the command that builds it."""

    example: ClassVar = "engine info sdxl-turbo"
    name: Positional[str]
    """Name of an engine, or a unique prefix of it."""
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class EngineRemove:
    """Remove stored engines, and report how many bytes that frees."""

    example: ClassVar = "engine remove sdxl-tiny"
    names: Positional[tuple[str, ...]] = ()
    """Names of engines, or unique prefixes of them."""
    all: bool = False
    """Every engine in the folder."""
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""


@dataclass(frozen=True, kw_only=True)
class EngineDoctor:
    """Show what this machine can run, what is missing for the rest, and how to fix it."""

    example: ClassVar = "engine doctor"
    bundles: Path | None = None
    """Folder of stored engines. Default: patchbloom/bundles in the user's cache."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""
