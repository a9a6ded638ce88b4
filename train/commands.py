"""What `train` can be asked for. Torch-free, so that --help is quick.

An option left out ("None" in the help) follows from the data, the model and the machine; what was
chosen is said on stderr and written to RUN/summary.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from ..engine.config import DscoConfig, Start
from ..export.config import BackendName, DeviceName, Precision, VaePrecision
from .config import PriorConfig, RecipeName, Scoring, StudentPrecision
from .coreset_options import StudentElsewhere, TrainVerify

METHODS = ("dace", "rded", "random", "upsample", "dsco")
GENERATED = ("dsco",)
"""Methods whose coreset holds images that a model made, and no patches of the data."""
BY_MODEL = ("dace", "dsco")
"""Methods that run a diffusion model."""
LabelChoice = Literal["stored", "online", "record"]
CodecChoice = Literal["dense", "topk"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the whole run and of each of its stages."""

    data: str
    """An image folder with train/ and val/ (or test/), or `shapes`: the generated set."""
    out: Path
    """The run folder to write."""
    model: str | None = None
    """sdxl-turbo, sdxl-tiny, or a folder in diffusers' SDXL layout. Left out: sdxl-turbo where
    there is a CUDA device, sdxl-tiny elsewhere and for --data shapes."""
    backend: BackendName = "auto"
    """What runs the model; `auto` takes the fastest that works here and says which."""
    method: tuple[str, ...] = ("dace",)
    """One or several of dace, rded, random, upsample, dsco; they share teacher, patches and
    recipe."""
    ipc: int = 1
    """Images per class; the coreset holds ipc · factor² patches of each, or ipc images of dsco."""
    factor: int | None = None
    """r: patches are r times smaller than images. Left out: the recipe's, 2."""
    image_size: int | None = None
    """Side of rendered images and of what the networks see, in px. Left out: the recipe's."""
    steps: int = 5
    """Scheduler steps; an image takes int(steps · rho) evaluations of the UNet."""
    rho: float = 0.8
    """Share of the noise schedule that is run, in (0, 1]; 1.0 still starts from the patch."""
    mixup: bool = True
    """Mix the latents of two patches of one class before the noise is added."""
    start: Start = "image"
    """`noise` starts from pure noise: patches, rho and mixup then play no part."""
    precision: Precision | None = None
    """Of the model's weights. Left out: fp16 on cuda, fp32 on the CPU."""
    vae_precision: VaePrecision = "auto"
    """Of its encoder and decoder; `auto` is --precision, or fp32 for a VAE that overflows in
    fp16."""
    engine_batch: int | None = None
    """Images per call of the model; pictures differ by rounding at most. Left out: 32, or, when an
    epoch is rendered at once, the divisor of its images that is nearest to 32 from below."""
    bundles: Path | None = None
    """Folder of built engines. Left out: patchbloom/bundles in the user's cache."""
    recipe: RecipeName | None = None
    """How teacher and students are trained. Left out: `small` with a model of 128 px or less and,
    without a model, for --data shapes and on a CPU; `dace` elsewhere."""
    scoring: Scoring | None = None
    """How the teacher is shown a patch that it scores: padded to the image size, as RDED does, or
    enlarged to it. Left out: the recipe's."""
    epochs: int | None = None
    """Epochs of the students, each with fresh images. Left out: the recipe's."""
    teacher_epochs: int | None = None
    """Epochs of a teacher that is trained here. Left out: the recipe's."""
    teacher: str | None = None
    """A network to train, torchvision:NAME, or a file. Left out: the recipe's network."""
    student: str | None = None
    """The students' network. Left out: the recipe's."""
    labels: LabelChoice = "record"
    """How the teacher's soft labels come: `record` trains and stores them in one pass, `stored`
    stores them first, `online` stores none. The students are the same."""
    codec: CodecChoice = "dense"
    """How labels are kept: `dense`, fp16 logits of all classes, or `topk`, the largest
    probabilities, from which the students of this run then learn."""
    top_k: int = 10
    """Probabilities per label that --codec topk keeps; fewer than half of the classes."""
    seed: int = 0
    """Of everything random: patches, noise, crops, order, initialisation."""
    seeds: int = 3
    """Students per method; accuracies are the mean ± std over them."""
    batch: int | None = None
    """Views per optimiser step of a student. Left out: the recipe's for this ipc."""
    accumulate: int = 1
    """Parts that a batch is split into when it does not fit into memory whole; the gradient is that
    of the batch, a BatchNorm sees parts."""
    student_precision: StudentPrecision | None = None
    """Of the students' passes, by autocast. Left out: bf16 on cuda, fp32 on the CPU."""
    student_compile: bool = False
    """Compile the students' network with torch.compile, on a GPU as CUDA graphs."""
    overlap: Literal["on", "off"] = "on"
    """Render the next images while the students learn; `off` is the serial baseline. The students
    are the same either way."""
    refresh: float = 1.0
    """Share of the patches that dace expands anew in an epoch; the others are shown again, with new
    crops. Less than 1 is lossy."""
    dsco: DscoConfig = field(default_factory=DscoConfig)
    """Method dsco: how the noise of its images is optimised."""
    dope: int = 0
    """Real images per class that are added to every coreset: those that a student of the coreset is
    least sure of. They are kept whole, and shown factor² times an epoch."""
    ceiling: bool = True
    """Also train students on fresh real images: the ceiling that the methods are measured by."""
    class_names: Path | None = None
    """Names for prompts: a JSON object or lines "folder name"."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    skip_corrupt: bool = False
    """Leave out and count images that cannot be decoded, instead of stopping at them."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes; a fifth as many for validation."""
    resume: bool = False
    """Go on with the run in --out, from the stage and epoch where it was stopped."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"--method: expected one or several of {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(
                    f"--method {method}: expected one or several of {', '.join(METHODS)}"
                )
        for name in (
            *("ipc", "factor", "image_size", "steps", "engine_batch", "epochs", "teacher_epochs"),
            *("top_k", "seeds", "batch", "accumulate", "shapes_per_class"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if self.dope < 0:
            raise ValueError(f"--dope {self.dope}: expected 0 or more")
        if "dsco" in self.methods and self.steps < 2:
            raise ValueError(
                f"--steps {self.steps}: expected 2 or more for dsco, which optimises the noise of "
                "every step but the last"
            )
        if not 0 < self.rho <= 1:
            raise ValueError(f"--rho {self.rho:g}: expected more than 0, and 1 at most")
        if not 0 < self.refresh <= 1:
            raise ValueError(f"--refresh {self.refresh:g}: expected more than 0, and 1 at most")
        if "dace" in self.methods and self.start == "image" and int(self.steps * self.rho) < 1:
            raise ValueError(
                f"--rho {self.rho:g} of --steps {self.steps} rounds to 0 evaluations: "
                f"give --rho {1 / self.steps:g} or more, or more --steps"
            )
        if self.labels == "online" and self.codec == "topk":
            raise ValueError(
                "--labels online stores none, so --codec topk has no use: leave one of them out"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps what --overwrite removes: give one of them")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods asked for, in that order, each once; commas separate as spaces do."""
        names = [name for word in self.method for name in word.split(",") if name]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Teacher, coreset, labels, students, report: all of it, in one run folder."""


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(RunOptions):
    """Train (or fetch and check) the teacher only."""


@dataclass(frozen=True, kw_only=True)
class TrainCoreset(RunOptions):
    """Choose the patches and write the coresets; the teacher first, if the run has none."""


@dataclass(frozen=True, kw_only=True)
class TrainLabels(RunOptions):
    """Store the teacher's soft labels of every view in the coresets, without training a student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "online":
            raise ValueError("--labels online stores none: leave it out to train labels")


@dataclass(frozen=True, kw_only=True)
class TrainStudent(RunOptions):
    """Train the students; no report. From a coreset alone: `train student --coreset DIR --help`."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Write the report of a finished run again, from its summary and pictures."""

    run: Positional[Path]
    """The run folder: the one with summary.json in it."""


@dataclass(frozen=True, kw_only=True)
class TrainPrior:
    """Train a small few-step latent diffusion model in SDXL's shape, for --model."""

    data: str
    """An image folder with train/, a plain one, or `shapes`: the generated set."""
    out: Path
    """The model folder to write."""
    prior: Annotated[PriorConfig, OmitArgPrefixes] = field(default_factory=PriorConfig)
    class_names: Path | None = None
    """Names for prompts: a JSON object or lines "folder name"."""
    skip_corrupt: bool = False
    """Leave out and count images that cannot be decoded, instead of stopping at them."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes."""
    resume: bool = False
    """Go on with the training in --out."""
    overwrite: bool = False
    """Replace the model in --out."""


STAGES = {
    "teacher": TrainTeacher,
    "coreset": TrainCoreset,
    "labels": TrainLabels,
    "student": TrainStudent,
    "verify": TrainVerify,
    "prior": TrainPrior,
    "report": TrainReport,
}
"""Sub-commands by name; anything else on the command line belongs to `Train`."""

StageCommand = Train | TrainTeacher | TrainCoreset | TrainLabels | TrainStudent
Command = StageCommand | StudentElsewhere | TrainVerify | TrainPrior | TrainReport
