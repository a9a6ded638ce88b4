"""Options of what takes a coreset folder alone: two commands of `train`, and ExpandedLoader.

What names images, views and labels is in the coreset's manifest: the options here are those of the
machine that makes them again, and of what learns from them. Torch-free, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..export.config import BackendName, DeviceName, Precision, VaePrecision
from .config import RecipeName, StudentPrecision, Targets, check_seed

LabelKind = Literal["probabilities", "logits"]


def _check_at_least_1(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How this machine makes a coreset's images; which ones, the manifest says."""

    model: str | None = None
    """A name, or a folder in diffusers' SDXL layout, with the weights whose sha256 the manifest
    holds. Left out: the model of the manifest's name."""
    precision: Precision | None = None
    """Of the model's weights. Left out: the manifest's. Another one makes slightly other images:
    `train verify` tells what that does to the labels."""
    vae_precision: VaePrecision | None = None
    """Of its encoder and decoder. Left out: the manifest's; `auto` beside another --precision."""
    engine_batch: int | None = None
    """Images per call of the model; pictures differ by rounding at most. Left out: as the run that
    made the labels would choose it."""
    bundles: Path | None = None
    """Folder of built engines. Left out: patchbloom/bundles in the user's cache."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""

    def __post_init__(self) -> None:
        _check_at_least_1(self, "engine_batch")


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(RenderOptions):
    """What ExpandedLoader yields, in which order, and how far ahead it renders."""

    batch: int
    """Images per step."""
    drop_last: bool = False
    """Leave out an epoch's last batch when it is not full."""
    epochs: int | None = None
    """Epochs that may be asked for. Left out: as many as have stored labels; no end with a
    teacher."""
    labels: LabelKind = "probabilities"
    """`probabilities` at the temperature, each row summing to 1, or the teacher's `logits`."""
    temperature: float | None = None
    """Of the probabilities. Left out: the manifest's; top-k labels have no other."""
    class_indices: bool = False
    """Yield triples: images, labels, and the class of each image (int64), whatever CutMix pasted
    into it."""
    seed: int = 0
    """Of the order within a pool; the coreset's seed decides which samples are in it."""
    ahead: int = 1
    """Pools that are rendered while one is drained; each takes its views' and labels' memory."""
    backend: BackendName = "auto"
    """What runs the model; `auto` takes the fastest that works here and says which."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "epochs", "ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected 1 or more")
        if self.labels not in get_args(LabelKind):
            raise ValueError(
                f"labels {self.labels!r}: expected one of {', '.join(get_args(LabelKind))}"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: expected more than 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed}: expected 0 to {2**64 - 1}")


@dataclass(frozen=True, kw_only=True)
class StudentElsewhere(RenderOptions):
    """Train students from a coreset folder alone: no teacher, no original images."""

    coreset: Path
    """The coreset folder. Its manifest says what images, views and labels are, and the recipe."""
    out: Path
    """The run folder to write. The same command given again goes on where it was stopped."""
    data: str | None = None
    """An image folder with val/ (or test/), or `shapes`, to measure the accuracy on. Left out:
    none is measured."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes, as the coreset's run had them."""
    backend: BackendName = "auto"
    """What runs the model; `auto` takes the fastest that works here and says which."""
    targets: Targets | None = None
    """What students learn: the stored labels, or with `hard` the class alone: cross-entropy, mixed
    by area under CutMix. Left out: the labels, or the classes where none are stored."""
    recipe: RecipeName | None = None
    """How students are trained, where no labels are stored; with labels the manifest says it. Left
    out: `small` for images of 128 px or less, `dace` for others."""
    factor: int | None = None
    """r of the run that wrote whole images without labels (t2i, dsco): a view is 1/r of an image or
    more. Left out: the recipe's; of patches the manifest says it."""
    cutmix: Literal["on", "off"] | None = None
    """With hard targets: paste boxes of other samples into the views. Left out: the manifest's, or
    the recipe's."""
    student: str | None = None
    """The students' network. Left out: the manifest's, or the recipe's."""
    epochs: int | None = None
    """Epochs of the students, no more than have labels if they learn these. Left out: as many, or
    the recipe's."""
    batch: int | None = None
    """Views per optimiser step; with CutMix and stored labels a divisor of the manifest's pool.
    Left out: the manifest's, or the recipe's."""
    learning_rate: float | None = None
    """Of the first epoch. Left out: the manifest's, or the recipe's."""
    final_lr_fraction: float | None = None
    """What is left of it after the last epoch, in [0, 1). Left out: the manifest's, or the
    recipe's."""
    weight_decay: float | None = None
    """Decoupled; none on 1-D parameters. Left out: the manifest's, or the recipe's."""
    student_precision: StudentPrecision | None = None
    """Of the students' passes, by autocast. Left out: the manifest's; without labels bf16 on cuda,
    fp32 on the CPU."""
    student_compile: bool = False
    """Compile the students' network with torch.compile, on a GPU as CUDA graphs."""
    accumulate: int = 1
    """Parts that a batch is split into when it does not fit into memory whole."""
    overlap: Literal["on", "off"] = "on"
    """Render the next images while the students learn; the students are the same either way."""
    seed: int | None = None
    """Of the students' initialisation and order. Left out: the manifest's, which gives the
    students of the coreset's own run."""
    seeds: int = 3
    """Students; the accuracy is the mean ± std over them."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_1(self, "shapes_per_class", "epochs", "batch", "accumulate", "seeds")
        _check_at_least_1(self, "factor")
        if self.seed is not None:
            check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class TrainVerify(RenderOptions):
    """Make some images of a coreset again, ask the teacher, and tell how far its labels drifted."""

    coreset: Path
    """The coreset folder, with stored labels."""
    teacher: str
    """The teacher that made the labels: a file, or torchvision:NAME."""
    other_teacher: bool = False
    """Take a teacher of another sha256 than the manifest's."""
    samples: int = 256
    """Pairs of (sample, epoch) to look at, spread over a few epochs."""
    backend: tuple[BackendName, ...] = ("auto",)
    """What runs the model: one or several, each of them measured."""
    seed: int = 0
    """Of the choice of pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_1(self, "samples")
        if not self.backend:
            raise ValueError("--backend: expected one or several, got none")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
