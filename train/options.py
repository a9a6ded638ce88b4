"""Options of `train`. Torch-free, so that --help is quick.

An option that is not given ("None" in the help) follows from the data, the model and the machine;
the choice is logged to stderr and written to RUN/summary.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from ..engine.config import TEMPLATE, DscoConfig, Start, parse_mixup_weight
from ..engine.labels.codecs import CODECS, DEFAULT_CODEC, MOST_COMPONENTS, Codec, CodecName, TopK
from ..export.config import BackendName, DeviceName, Precision, TrtLibrary, VaePrecision
from .config import (
    MOST_STUDENTS,
    DecoderConfig,
    LabelChoice,
    PriorConfig,
    RecipeName,
    Scoring,
    StudentPrecision,
    Targets,
    TeacherPrecision,
    check_at_least,
    check_seed,
    require_choice,
)
from .coreset_options import (
    GROUPS,
    DataOptions,
    LabelsElsewhere,
    StudentElsewhere,
    TrainCheck,
    TrainVerify,
    Where,
)
from .methods.registry import METHODS, known_methods
from .papers import PLANS

LEAST_REFRESH = 0.001
METHOD_HELP = (
    f"One or several of {', '.join(METHODS)}, or of those that installed packages bring; they "
    "share teacher, recipe and steps."
)
PLAN_HELP = f"The table: one of {', '.join(PLANS)}."
NOT_STATED = "not stated"
NOT_FOR_CELLS = {
    *("--data", "--out", "--method", "--ipc", "--seed", "--resume", "--overwrite", "--build-only"),
}
"""Options of `train` that `train reproduce` sets for each cell itself, or that train nothing."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the whole run and of each of its stages."""

    groups: ClassVar = GROUPS
    data: str
    """An image folder, with train/ and val/ (or test/) or without; `shapes`, a generated dataset;
    torchvision:NAME; hf:NAME or hf:NAME:CONFIG, of the Hugging Face hub; a folder of Parquet files
    or of `save_to_disk`; or WebDataset shards, as "train-{000..146}.tar"."""
    where: Where = field(default_factory=DataOptions)
    out: Path
    """The run folder to write."""
    model: str | None = None
    """sdxl-turbo, sdxl-tiny, or a folder in diffusers' SDXL layout. Default: sdxl-turbo where there
    is a CUDA device, sdxl-tiny elsewhere and for --data shapes."""
    backend: BackendName = "auto"
    """Backend that runs the model; `auto` chooses one for this machine and reports it."""
    trt_library: TrtLibrary = "auto"
    """Library of --backend trt: `tensorrt`, or `rtx`, TensorRT for RTX. `auto` is tensorrt where it
    is installed, otherwise rtx."""
    cuda_graph: bool = True
    """On a GPU, record the evaluations of a batch and its decoding as one CUDA graph, and replay
    it; where that fails, the reason is reported."""
    method: Annotated[tuple[str, ...], arg(help=METHOD_HELP)] = ("dace",)
    ipc: int = 1
    """Images per class. A coreset holds ipc · factor² patches per class; for t2i, ipc / (1 +
    variants) generated images; for dsco and herding, ipc images."""
    factor: int | None = None
    """r: the side of a patch is 1/r of the image's. Default: the recipe's: 2, or 1 in `rded` for
    images of 64 px or less."""
    image_size: int | None = None
    """Side of rendered images and of the networks' inputs, in px. Default: the model's own size in
    recipe `small`, otherwise the recipe's."""
    steps: int | None = None
    """Scheduler steps; dace evaluates the UNet int(steps · rho) times per image. Default: 5 for
    dace and dsco, 1 for t2i, which allows 4 at most."""
    rho: float = 0.8
    """Share of the noise schedule to run, in (0, 1]; 1.0 still starts from the patch."""
    mixup: bool = True
    """Mix the latents of two patches of a class before noise is added."""
    mixup_weight: str = "uniform"
    """Weight of the patch itself in that mixture; its partner gets the rest. `uniform` in (0, 1), a
    fixed number, or beta:A for Beta(A, A)."""
    start: Start = "image"
    """`noise` starts from pure noise; patches, rho and mixup then have no effect."""
    prompt: str = TEMPLATE
    """The model's prompt; {name} stands for the name of the class."""
    prompts: Path | None = None
    """Prompts of single classes: a JSON object {folder: prompt}, or lines of folder, tab, prompt (a
    space will do if no folder name has one). Other classes use --prompt."""
    variants: int = 0
    """Augmented variants of each generated image of t2i, new in every epoch; the paper has 4."""
    generate_size: int | None = None
    """Side of t2i's images as generated, in px; they are stored at the image size. Default: the
    model's own size."""
    budget_seconds: float | None = None
    """Generate as many images for t2i as fit into these seconds, whatever --ipc is. --ipc still
    sets the length of an epoch."""
    precision: Precision | None = None
    """Precision of the model; int8 and fp8, calibrated on the coreset, change the images. Default:
    fp16 on cuda, fp32 on the CPU."""
    vae_precision: VaePrecision = "auto"
    """Precision of its encoder and decoder; `auto` is --precision, or fp32 for a VAE that overflows
    in fp16."""
    engine_batch: int | None = None
    """Images per call of the model; changes images by rounding at most. Default: on a GPU as many
    as fill it and fit (SDXL-Turbo at 224 px: 48 on an A6000, 64 on an H100), on the CPU 32; when an
    epoch is rendered at once, the largest divisor of its images up to that."""
    bundles: Path | None = None
    """Folder of built engines. Default: patchbloom/bundles in the user's cache."""
    recipe: RecipeName | None = None
    """How teacher and students are trained. Default: `small` with a model of 128 px or less, and
    without a model for --data shapes or on a CPU; otherwise `dace`."""
    scoring: Scoring | None = None
    """How the teacher sees a patch that it scores: `pad` to the image size, as in RDED; `resize` to
    it; or `native`, unchanged, for a network that takes any size. Default: the recipe's."""
    select: str = "lowest-loss"
    """How dace, rded and upsample choose patches: by `lowest-loss`, as in RDED, or among more
    candidates without near-duplicates: `facility-location`, `k-center`, or `margin`, which takes
    half of them where the teacher is least sure; or a rule, package.module:function."""
    candidates: int = 4
    """Candidates per chosen patch of facility-location, k-center and margin."""
    epochs: int | None = None
    """Epochs of the students, each with fresh images. Default: the recipe's."""
    teacher_epochs: int | None = None
    """Epochs of a teacher that is trained here. Default: the recipe's."""
    teacher_precision: TeacherPrecision = "fp32"
    """Precision of the passes that train a teacher here, by autocast; it answers in fp32."""
    teacher: str | None = None
    """A network to train; or a ready one: torchvision:NAME, timm:NAME, package.module:function, or
    a file of weights. Default: the recipe's network."""
    student: str | None = None
    """The students' network: a name, torchvision:NAME, timm:NAME or package.module:function.
    Default: the recipe's."""
    targets: Targets = "soft"
    """Training targets: `soft`, the teacher's soft labels; or `hard`, the class alone
    (cross-entropy, mixed by area under CutMix), without any soft labels."""
    labels: LabelChoice = "record"
    """When the teacher's soft labels are stored: `record` while the students train, `stored`
    before, `online` never. The students are the same."""
    codec: CodecName = DEFAULT_CODEC
    """How labels are stored: `dense`, fp16 logits of all classes; `pca`, one byte for each of the
    first principal components of the logits; or `topk`, the largest probabilities. Students of this
    run learn from the labels as stored."""
    top_k: int = TopK.k
    """Probabilities per label that --codec topk stores; fewer than half of the classes."""
    components: int | None = None
    """Components that --codec pca stores; fewer than the classes, 256 at most. Default: 40, or one
    fewer than the classes."""
    seed: int = 0
    """Seed of everything random: patches, noise, crops, order, initialisation."""
    seeds: int = 3
    """Students per method; accuracies are the mean ± std over them."""
    batch: int | None = None
    """Views per optimiser step of a student. Default: the recipe's for this --ipc."""
    learning_rate: float | None = None
    """Learning rate of a student's first epoch. Default: the recipe's for the network."""
    accumulate: int = 1
    """Micro-batches per batch, for a batch that does not fit into memory. The gradient is the
    whole batch's, but BatchNorm sees the parts."""
    cutmix: Literal["on", "off"] | None = None
    """Paste boxes from other samples into the views of students and teacher. Default: the
    recipe's."""
    student_precision: StudentPrecision | None = None
    """Precision of the students' passes, by autocast. Default: bf16 on cuda, fp32 on the CPU."""
    student_compile: bool = False
    """Compile the students' network with torch.compile, on a GPU as CUDA graphs."""
    overlap: Literal["on", "off"] = "on"
    """Render the next images while the students learn; `off` is the serial baseline. The students
    are the same either way. --labels stored renders its labels serially."""
    evaluate_every: int = 0
    """Epochs between two points of the students' accuracy curve, each a pass over the validation
    images. 0: the last epoch alone."""
    refresh: float = 1.0
    """Share of the patches that dace expands again in every epoch; the others keep their images and
    get new crops. Less than 1 is lossy."""
    dsco: DscoConfig = field(default_factory=DscoConfig)
    """How method dsco optimises the noise of its images."""
    dope: int = 0
    """Real images per class to add to every coreset: those that a network trained on the
    coreset is least sure of. They are stored whole and shown factor² times per epoch."""
    ceiling: bool = True
    """Also train students on fresh real images, the ceiling for all methods."""
    class_names: Path | None = None
    """Names for prompts: a JSON object or lines "folder name"."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    skip_corrupt: bool = False
    """Skip and count images that cannot be decoded, instead of stopping at them."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes; validation has a fifth as many."""
    verify: bool = False
    """Hash every byte of models and engines again, instead of trusting size and time of files
    hashed before."""
    start_timeout: float = 600.0
    """Seconds to wait for the other processes that were started together with this one."""
    build_only: Annotated[tuple[str, ...] | None, arg(metavar="[CARD …]")] = None
    """Build the engines of this run, or find them stored, and stop; reads and writes no --out. With
    --backend trt also for cards that are not here, as `engine build --for` names them. Default: the
    run builds its engines before all else."""
    resume: bool = False
    """Resume the run in --out from the stage and epoch where it stopped."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"--method: expected one or several of {', '.join(known_methods())}")
        for method in self.methods:
            METHODS[method]  # raises for an unknown one
        require_choice(self.select)
        names = (
            *("ipc", "factor", "image_size", "steps", "engine_batch", "epochs", "teacher_epochs"),
            *("top_k", "seeds", "batch", "accumulate", "shapes_per_class", "candidates"),
            *("generate_size", "components"),
        )
        check_at_least(self, 1, *names, option=True)
        check_at_least(self, 0, "dope", "variants", "evaluate_every", option=True)
        if self.seeds > MOST_STUDENTS:
            raise ValueError(f"--seeds {self.seeds}: expected {MOST_STUDENTS} at most")
        if not 0 < self.rho <= 1:
            raise ValueError(f"--rho {self.rho:g}: expected more than 0, and 1 at most")
        if not LEAST_REFRESH <= self.refresh <= 1:
            raise ValueError(f"--refresh {self.refresh:g}: expected {LEAST_REFRESH:g} to 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate:g}: expected more than 0")
        self._check_mixup()
        self._check_generated()
        if self.labels == "online" and self.codec != DEFAULT_CODEC:
            raise ValueError(
                f"--labels online stores none, so --codec {self.codec} has no use: leave one of "
                "them out"
            )
        if self.components is not None and CODECS[self.codec].option != "components":
            raise ValueError(f"--components has no use with --codec {self.codec}: leave it out")
        if (self.components or 0) > MOST_COMPONENTS:
            raise ValueError(f"--components {self.components}: expected {MOST_COMPONENTS} at most")
        if self.targets == "hard" and (self.labels != "record" or self.codec != DEFAULT_CODEC):
            raise ValueError(
                "--targets hard makes no soft labels: leave out --labels and --codec, or give "
                "--targets soft"
            )
        for method in self.methods:
            METHODS[method].check(self)
        check_seed(self.seed)
        if self.build_only and self.backend != "trt":
            raise ValueError(
                f"--build-only {' '.join(self.build_only)}: cards are for --backend trt: give that"
            )
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps what --overwrite removes: give one of them")

    def label_codec(self, classes: int) -> Codec:
        """The codec of the labels; ValueError when --codec cannot store labels of `classes`."""
        kind = CODECS[self.codec]
        return kind.chosen(getattr(self, kind.option) if kind.option else None, classes)

    def _check_mixup(self) -> None:
        law = parse_mixup_weight(self.mixup_weight)
        if law != ("beta", 1) and not (self.mixup and self.start == "image"):
            other = "--no-mixup" if self.start == "image" else "--start noise"
            raise ValueError(
                f"--mixup-weight {self.mixup_weight} has no use with {other}: leave one of them out"
            )

    def _check_generated(self) -> None:
        if "{name}" not in self.prompt:
            raise ValueError(
                f"--prompt {self.prompt!r}: expected {{name}} in it, where the name of the class "
                "goes; --prompts gives single classes a prompt without"
            )
        if self.budget_seconds is not None and not 0 < self.budget_seconds < inf:
            raise ValueError(
                f"--budget-seconds {self.budget_seconds:g}: expected a number of seconds, more "
                "than 0"
            )
        each = 1 + self.variants
        if "t2i" in self.methods and self.budget_seconds is None and self.ipc % each:
            raise ValueError(
                f"--ipc {self.ipc}: expected a multiple of {each}, each generated "
                f"image and its {self.variants} --variants: give another --ipc or --variants"
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The given methods in order, each once; commas separate them as spaces do."""
        names = [name for word in self.method for name in word.split(",") if name]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Teacher, coreset, labels, students, report: everything, in one run folder."""

    example: ClassVar = "train --data shapes --out runs/demo --method random dace"


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(RunOptions):
    """Train only the teacher, or fetch and check it."""

    example: ClassVar = "train teacher --data shapes --out runs/demo"


@dataclass(frozen=True, kw_only=True)
class TrainCoreset(RunOptions):
    """Make the coresets, after the teacher if the run has none."""

    example: ClassVar = "train coreset --data shapes --out runs/demo --ipc 10"


@dataclass(frozen=True, kw_only=True)
class TrainLabels(RunOptions):
    """Store the teacher's soft labels in the coresets, without training students. In a coreset that
    was built by hand: `train labels --coreset DIR --help`."""

    example: ClassVar = "train labels --data shapes --out runs/demo --codec pca"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "online":
            raise ValueError("--labels online stores none: leave it out to train labels")
        if self.targets == "hard":
            raise ValueError("--targets hard makes no soft labels: leave it out to train labels")


@dataclass(frozen=True, kw_only=True)
class TrainStudent(RunOptions):
    """Train the students, no report. From a coreset alone: `train student --coreset DIR --help`."""

    example: ClassVar = "train student --data shapes --out runs/demo --seeds 1"


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Write the report of a finished run again, from its summary and pictures."""

    example: ClassVar = "train report runs/demo"
    run: Positional[Path]
    """The run folder, which holds summary.json."""


@dataclass(frozen=True, kw_only=True)
class TrainReproduce:
    """Run a paper's table beside its published numbers; options of `train` follow after `--`."""

    example: ClassVar = "train reproduce imagenette-table1 --data imagenet10 --out runs/table1"
    plan: Annotated[Positional[str], arg(help=PLAN_HELP, metavar="PLAN")]
    data: str | None = None
    """The data that the plan describes (--list shows it), in any form that `train` takes."""
    out: Path | None = None
    """The folder to write: a run folder per cell, table.md and results.json. The same command
    resumes a stopped one."""
    only: tuple[str, ...] = ()
    """Cells to run, by name or by its beginning up to a dash (rded-ipc1). Default: all."""
    coresets: int = 1
    """Coresets per row, selected with the seeds 0, 1, …; more than one gives a ± over coresets."""
    list: bool = False
    """Print the plan and its cells, and run none."""
    yes: bool = False
    """Start without asking."""
    words: Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise ValueError(f"plan {self.plan}: expected one of {', '.join(PLANS)}")
        if (self.data is None or self.out is None) and not self.list:
            raise ValueError("expected --data and --out, or --list")
        check_at_least(self, 1, "coresets", option=True)
        for word in self.words:
            if word.split("=")[0] in NOT_FOR_CELLS:
                raise ValueError(f"{word} after `--`: not an option of cells: leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainCompare:
    """Compare finished runs: settings that differ, accuracies, paired differences."""

    example: ClassVar = "train compare runs/demo runs/other --out compared.html"
    runs: Positional[tuple[Path, ...]]
    """Folders of finished runs, also of `train student --coreset` with --data."""
    out: Path | None = None
    """The HTML page to write, with a chart. Default: none."""
    reference: str | None = None
    """Take differences to this method of the first run that has it; `real` is the ceiling. Default:
    the first method of the first run."""
    json: bool = False
    """Print only the result, as one line of JSON. Default: a terminal gets a table, a pipe both."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("RUNS: expected one or several folders, got none")
        if self.out is not None and self.out.suffix.lower() != ".html":
            raise ValueError(f"--out: expected a name that ends in .html, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class TrainPublish:
    """Copy a finished run's coresets, teacher and numbers to a folder that others can check."""

    example: ClassVar = "train publish runs/demo --to published"
    run: Positional[Path]
    """The folder of the finished run."""
    to: Path
    """The folder to write, which holds no absolute path and may be moved; or hf:USER/NAME, a data
    set on the Hugging Face hub, which gets the same folder as one commit."""
    method: tuple[str, ...] = ()
    """Methods to publish. Default: every method of the run."""
    data_name: str | None = None
    """Name of the data set and its split, for the card. Default: that of the run's data folder."""
    data_licence: str = NOT_STATED
    """Licence of the data, for the card; the hub needs one. It takes a single word for one of its
    identifiers, such as cc-by-4.0 or unknown, and shows a longer text as `other`."""
    generator_licence: str = NOT_STATED
    """Licence of the model that expands or generates, for the card; the hub needs one."""
    private: bool = False
    """On the hub, create a data set that only you can read. One that exists stays as it is."""
    overwrite: bool = False
    """Replace the publication in --to. On the hub its earlier commits stay."""


@dataclass(frozen=True, kw_only=True)
class TrainPrior:
    """Train a small few-step latent diffusion model in SDXL's shape, for --model."""

    example: ClassVar = "train prior --data shapes --out models/shapes"
    groups: ClassVar = GROUPS
    data: str
    """The training images, in any form that `train` takes."""
    where: Where = field(default_factory=DataOptions)
    out: Path
    """The model folder to write."""
    prior: Annotated[PriorConfig, OmitArgPrefixes] = field(default_factory=PriorConfig)
    class_names: Path | None = None
    """Names for prompts: a JSON object or lines "folder name"."""
    teacher: str | None = None
    """A file from `train teacher`, torchvision:NAME, timm:NAME or package.module:function. The
    model card then says what share of samples this teacher classifies as their class; --resume adds
    that to a finished model."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    skip_corrupt: bool = False
    """Skip and count images that cannot be decoded, instead of stopping at them."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes."""
    resume: bool = False
    """Resume the training in --out."""
    overwrite: bool = False
    """Replace the model in --out."""


@dataclass(frozen=True, kw_only=True)
class TrainDecoder:
    """Distil a model's decoder into a tiny one, which makes slightly other images in less time."""

    example: ClassVar = "train decoder --model sdxl-tiny --data shapes --out models/fast"
    groups: ClassVar = GROUPS
    model: str
    """The model whose decoder teaches: sdxl-turbo, sdxl-tiny, or a folder."""
    data: str
    """Images to learn from, in any form that `train` takes."""
    where: Where = field(default_factory=DataOptions)
    out: Path
    """The model folder to write: the model, on the same disk without a copy, and the decoder."""
    decoder: Annotated[DecoderConfig, OmitArgPrefixes] = field(default_factory=DecoderConfig)
    image_size: int | None = None
    """Side of the images in px. Default: 224, or what the model was trained at if that is 128 or
    less."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    skip_corrupt: bool = False
    """Skip and count images that cannot be decoded, instead of stopping at them."""
    shapes_per_class: int = 1000
    """Training images per class of --data shapes."""
    resume: bool = False
    """Resume the training in --out."""
    overwrite: bool = False
    """Replace the model in --out."""


STAGES = {
    "teacher": TrainTeacher,
    "coreset": TrainCoreset,
    "labels": TrainLabels,
    "student": TrainStudent,
    "verify": TrainVerify,
    "prior": TrainPrior,
    "decoder": TrainDecoder,
    "reproduce": TrainReproduce,
    "report": TrainReport,
    "compare": TrainCompare,
    "publish": TrainPublish,
    "check": TrainCheck,
}
"""Sub-commands by name; anything else on the command line belongs to `Train`."""

StageCommand = Train | TrainTeacher | TrainCoreset | TrainLabels | TrainStudent
Command = (
    StageCommand
    | StudentElsewhere
    | LabelsElsewhere
    | TrainVerify
    | TrainPrior
    | TrainDecoder
    | TrainReproduce
    | TrainReport
    | TrainCompare
    | TrainPublish
    | TrainCheck
)
