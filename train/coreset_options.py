"""Options of `train student|labels --coreset`, `train verify`, `train check` and ExpandedLoader.

They start from a coreset folder, whose manifest describes images, views and labels. The options
describe the machine that makes them again and the training that uses them. Torch-free, so that
--help is quick.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from tyro.conf import OmitArgPrefixes, Positional

from ..engine.labels.codecs import CODECS, DEFAULT_CODEC, Codec, CodecName, TopK
from ..export.config import BackendName, DeviceName, Precision, TrtLibrary, VaePrecision
from .config import RecipeName, StudentPrecision, Targets, check_at_least, check_seed

GROUPS = {
    "Data": "coreset data where out class_names skip_corrupt shapes_per_class resume overwrite",
    "Method": "method ipc factor image_size steps rho mixup mixup_weight start prompt prompts "
    "variants generate_size budget_seconds scoring select candidates refresh dope seed dsco",
    "Model": "model precision vae_precision prior decoder",
    "Labels": "targets labels codec top_k components teacher teacher_epochs "
    "teacher_precision other_teacher samples",
    "Student": "recipe student epochs seeds batch learning_rate final_lr_fraction weight_decay "
    "accumulate cutmix student_precision student_compile overlap evaluate_every ceiling",
    "Machine": "device backend trt_library cuda_graph engine_batch bundles build_only verify "
    "start_timeout",
}
"""Headings of --help, each with the names of its options; `dsco` and `prior` name all of theirs."""

LabelKind = Literal["probabilities", "logits"]


def check_names(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raises ValueError for a name that is not known, with the nearest one."""
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, 1, 0.5)
            hint = f"perhaps {near[0]}" if near else f"expected one of {', '.join(sorted(known))}"
            raise ValueError(f"{what} {name!r} is unknown: {hint}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options that complete --data."""

    val_data: str | None = None
    """Validation images, in any form of --data; a folder without val/ or shards are taken whole.
    Default: those of --data."""
    val_fraction: float | None = None
    """Share of each class of --data to validate on, if it has no val/; a hash of the names chooses,
    whatever the --seed."""
    root: Path | None = None
    """Folder of torchvision's files. Default: patchbloom/torchvision in the user's cache."""

    def __post_init__(self) -> None:
        if self.val_fraction is None:
            return
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"--val-fraction {self.val_fraction:g}: expected more than 0, less than 1"
            )
        if self.val_data is not None:
            raise ValueError("--val-data and --val-fraction: give one of them")


Where = Annotated[DataOptions, OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How this machine renders a coreset's images; the manifest says which images."""

    groups: ClassVar = GROUPS
    model: str | None = None
    """A name, or a folder in diffusers' SDXL layout, whose weights have the manifest's sha256.
    Default: the model that the manifest names."""
    precision: Precision | None = None
    """Precision of the model's weights. Default: the manifest's. Another changes the images
    slightly; `train verify` measures the effect on the labels."""
    vae_precision: VaePrecision | None = None
    """Precision of its encoder and decoder. Default: the manifest's; `auto` with another
    --precision."""
    engine_batch: int | None = None
    """Images per call of the model; changes images by rounding at most. Default: as `train`
    chooses on this machine."""
    trt_library: TrtLibrary = "auto"
    """Library of --backend trt: `tensorrt`, or `rtx`, TensorRT for RTX. `auto` is tensorrt where it
    is installed, otherwise rtx."""
    cuda_graph: bool = True
    """On a GPU, record the evaluations of a batch and its decoding as one CUDA graph, and replay
    it; where that fails, the reason is reported."""
    bundles: Path | None = None
    """Folder of built engines. Default: patchbloom/bundles in the user's cache."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one."""
    verify: bool = False
    """Hash every byte of models and engines again, instead of trusting size and time of files
    hashed before."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "engine_batch", option=True)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(RenderOptions):
    """Content and order of ExpandedLoader's batches, and how far ahead it renders."""

    batch: int
    """Images per step."""
    drop_last: bool = False
    """Drop an epoch's last batch when it is not full."""
    epochs: int | None = None
    """Number of epochs available. Default: those with stored labels; unlimited with a teacher."""
    targets: Targets = "soft"
    """`soft`, the stored labels or those of a teacher; or `hard`, the class alone (mixed by area
    under CutMix)."""
    labels: LabelKind = "probabilities"
    """`probabilities` at the temperature, each row summing to 1, or the teacher's `logits`."""
    temperature: float | None = None
    """Temperature of the probabilities. Default: the manifest's; top-k labels have no other."""
    class_indices: bool = False
    """Yield (images, labels, classes): the class of each image (int64), whatever CutMix pasted into
    it."""
    seed: int = 0
    """Seed of the order within a pool; the coreset's seed decides which samples are in it."""
    ahead: int = 1
    """Pools rendered ahead of the one in use; each takes the memory of its views and labels."""
    backend: BackendName = "auto"
    """Backend that runs the model; `auto` chooses one for this machine and reports it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch", "epochs", "ahead")
        if self.labels not in get_args(LabelKind):
            raise ValueError(
                f"labels {self.labels!r}: expected one of {', '.join(get_args(LabelKind))}"
            )
        check_names([self.targets], get_args(Targets), "targets")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: expected more than 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed}: expected 0 to {2**64 - 1}")


@dataclass(frozen=True, kw_only=True)
class StudentElsewhere(RenderOptions):
    """Train students from a coreset folder alone: no teacher, no original images."""

    example: ClassVar = (
        "train student --coreset runs/demo/coreset --data shapes --out runs/elsewhere"
    )

    coreset: Path
    """The coreset folder, or hf:USER/NAME, on the hub. Its manifest describes images, views, labels
    and the recipe."""
    out: Path
    """The run folder to write. The same command resumes a stopped run."""
    data: str | None = None
    """Data in any form that `train` takes, to measure accuracy on its validation images (of shards,
    on all). Default: no accuracy."""
    where: Where = field(default_factory=DataOptions)
    shapes_per_class: int = 1000
    """Training images per class of --data shapes, as in the coreset's run."""
    backend: BackendName = "auto"
    """Backend that runs the model; `auto` chooses one for this machine and reports it."""
    targets: Targets | None = None
    """Training targets: `soft`, the stored labels; or `hard`, the class alone (cross-entropy, mixed
    by area under CutMix). Default: soft where labels are stored."""
    recipe: RecipeName | None = None
    """Training recipe when no labels are stored; with labels the manifest holds it. Default:
    `small` for images of 128 px or less, `dace` for others."""
    factor: int | None = None
    """r of the run that wrote whole images without labels (t2i, dsco, herding): a view covers at
    least 1/r of an image. Default: the recipe's; for patches the manifest holds it."""
    cutmix: Literal["on", "off"] | None = None
    """With hard targets: paste boxes from other samples into the views. Default: the manifest's, or
    the recipe's."""
    student: str | None = None
    """The students' network. Default: the manifest's, or the recipe's."""
    epochs: int | None = None
    """Epochs of the students; with stored labels, no more than have labels. Default: all that have
    labels, or the recipe's."""
    batch: int | None = None
    """Views per optimiser step; with CutMix and stored labels, a divisor of the manifest's pool.
    Default: the manifest's, or the recipe's."""
    learning_rate: float | None = None
    """Learning rate of the first epoch. Default: the manifest's, or the recipe's."""
    final_lr_fraction: float | None = None
    """Final learning rate as a fraction of the first, in [0, 1). Default: the manifest's, or the
    recipe's."""
    weight_decay: float | None = None
    """Decoupled weight decay, not on 1-D parameters. Default: the manifest's, or the recipe's."""
    student_precision: StudentPrecision | None = None
    """Precision of the students' passes, by autocast. Default: the manifest's; without labels, bf16
    on cuda and fp32 on the CPU."""
    student_compile: bool = False
    """Compile the students' network with torch.compile, on a GPU as CUDA graphs."""
    accumulate: int = 1
    """Micro-batches per batch, for a batch that does not fit into memory."""
    overlap: Literal["on", "off"] = "on"
    """Render the next images while the students learn; the students are the same either way."""
    evaluate_every: int = 0
    """Epochs between two points of the students' accuracy curve, each a pass over the validation
    images. 0: the last epoch alone."""
    seed: int | None = None
    """Seed of the students' initialisation and order. Default: the manifest's, which reproduces the
    students of the coreset's run."""
    seeds: int = 3
    """Number of students; accuracy is the mean ± std over them."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("shapes_per_class", "epochs", "batch", "accumulate", "seeds", "factor")
        check_at_least(self, 1, *names, option=True)
        check_at_least(self, 0, "evaluate_every", option=True)
        if self.seed is not None:
            check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class LabelsElsewhere(RenderOptions):
    """Store a teacher's soft labels in a coreset folder that was built by hand."""

    example: ClassVar = "train labels --coreset mine --teacher teacher.safetensors"

    coreset: Path
    """The coreset folder. The same command goes on with a stopped one."""
    teacher: str
    """A file of `train teacher`, torchvision:NAME, timm:NAME or package.module:function."""
    backend: BackendName = "auto"
    """Backend that runs the model; `auto` chooses one for this machine and reports it."""
    recipe: RecipeName | None = None
    """Training recipe of the students, which decides the views. Default: `small` for images of 128
    px or less, `dace` for others."""
    factor: int | None = None
    """r, where the coreset holds whole images: a view covers at least 1/r of one. Default: the
    recipe's; for patches the manifest holds it."""
    cutmix: Literal["on", "off"] | None = None
    """Paste boxes from other samples into the views. Default: the recipe's."""
    student: str | None = None
    """The students' network. Default: the recipe's."""
    epochs: int | None = None
    """Epochs to label. Default: the recipe's."""
    batch: int | None = None
    """Views per optimiser step. Default: the recipe's."""
    codec: CodecName = DEFAULT_CODEC
    """How labels are stored: `dense`, `pca` or `topk`."""
    top_k: int = TopK.k
    """Probabilities per label that --codec topk stores; fewer than half of the classes."""
    components: int | None = None
    """Components that --codec pca stores. Default: 40, or one fewer than the classes."""
    overwrite: bool = False
    """Replace the labels that the coreset has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "factor", "epochs", "batch", "top_k", "components", option=True)

    def label_codec(self, classes: int) -> Codec:
        """The codec of the labels; ValueError when --codec cannot store labels of `classes`."""
        kind = CODECS[self.codec]
        return kind.chosen(getattr(self, kind.option) if kind.option else None, classes)


@dataclass(frozen=True, kw_only=True)
class TrainVerify(RenderOptions):
    """Render some images of a coreset again and measure how far the teacher's labels drift."""

    example: ClassVar = (
        "train verify --coreset runs/demo/coreset --teacher runs/demo/teacher/teacher.safetensors"
    )

    coreset: Path
    """The coreset folder, or hf:USER/NAME, on the hub; with stored labels."""
    teacher: str
    """The teacher that made the labels: a file of weights, torchvision:NAME, timm:NAME or
    package.module:function."""
    other_teacher: bool = False
    """Accept a teacher whose sha256 differs from the manifest's."""
    samples: int = 256
    """Pairs of (sample, epoch) to compare, spread over a few epochs."""
    backend: tuple[BackendName, ...] = ("auto",)
    """Backends that run the model; each is measured."""
    seed: int = 0
    """Seed of the choice of pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "samples", option=True)
        if not self.backend:
            raise ValueError("--backend: expected one or several, got none")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")


@dataclass(frozen=True, kw_only=True)
class TrainCheck(RenderOptions):
    """Check the files of a publication, and train its students again to compare accuracies."""

    example: ClassVar = "train check published --data shapes"
    folder: Positional[Path]
    """The folder that `train publish` wrote, wherever it lies now; or hf:USER/NAME, on the hub."""
    data: str | None = None
    """Data with the published validation images, in any form that `train` takes."""
    where: Where = field(default_factory=DataOptions)
    files_only: bool = False
    """Compare files with their hashes, and train nothing."""
    out: Path | None = None
    """Folder for the students; the same command then resumes. Default: a temporary one."""
    backend: BackendName | None = None
    """Backend that runs the model. Default: the published one on a device of its kind, otherwise
    `auto`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and not self.files_only:
            raise ValueError(
                "train check trains students and measures them on --data: give it, or --files-only"
            )
