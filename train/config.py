"""How priors, teachers and students are trained, and the recipes. Torch-free.

Sources: RDED's published procedure, the DACE paper with its gaps filled as RDED does, and RD3's
settings (arXiv 2509.19743) as two public notes on that paper give them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..engine.config import RECIPE_PX, SMALL_PX
from .plugins import is_function, require_package

Device = Literal["auto", "cpu", "cuda"]
RecipeName = Literal["rded", "dace", "rd3", "small"]
Scoring = Literal["pad", "resize", "native"]
Choice = Literal["lowest-loss", "facility-location", "k-center", "margin"]
StudentPrecision = Literal["fp32", "bf16", "fp16"]
TeacherPrecision = Literal["fp32", "bf16"]
PriorPrecision = Literal["fp32", "bf16"]
ViewPrecision = Literal["fp32", "fp16"]
Targets = Literal["soft", "hard"]
LabelChoice = Literal["stored", "online", "record"]
TIMESTEPS = 1000  # in a prior's noise schedule, as in SDXL's
SMALL_IMAGES_PX = 64  # RDED keeps images of CIFAR (32) and Tiny-ImageNet (64) whole
CHANGES_NO_RESULT = (
    *("overlap", "accumulate", "evaluate_every", "checkpoint_every", "checkpoints_kept"),
)
"""StudentConfig fields that may change on resume. `accumulate` may, so that a training that ran out
of memory can continue: the gradient is the same, though BatchNorm sees the parts."""
TORCHVISION, TIMM = "torchvision:", "timm:"
CONVNET = re.compile(r"convnet-d([345])(?:-w(\d+)(?:to(\d+))?)?(?:-(bn|in|none))?")
NETWORKS = ("resnet18", "resnet50", "vgg11", "alexnet", "vit-s")
MOST_STUDENTS = 998
_STARTS = 1000  # seeds per run: its students, then the doping student, then the teacher
MOST_SEED = 2**32 // _STARTS - 1
"""Largest --seed: network seeds are 1000 · seed + k and must fit 32 bits."""


def is_brought(name: str) -> bool:
    """Whether a network comes from elsewhere by its name: torchvision:NAME, timm:NAME, or
    package.module:function. As --teacher it is ready; other names are of networks to train."""
    return name.startswith((TORCHVISION, TIMM)) or is_function(name)


def is_ready_teacher(name: str) -> bool:
    """Whether --teacher names a teacher that is ready: a file, or `is_brought`."""
    return is_brought(name) or Path(name).expanduser().is_file()


def require_network(name: str) -> None:
    """Raises ValueError for an unknown network or package; names inside one are not looked up."""
    if is_brought(name):
        require_package(name)
    elif not (CONVNET.fullmatch(name) or name in NETWORKS):
        raise ValueError(
            f"network {name!r} is unknown: expected convnet-d{{3,4,5}}, {', '.join(NETWORKS)} (a "
            "ConvNet may add its width and norm: convnet-d4-w24to96-bn), torchvision:NAME, "
            "timm:NAME or package.module:function"
        )


def require_choice(select: str) -> None:
    """Raises ValueError unless --select is a choice or a function whose package is here."""
    if is_function(select):
        with naming_option("--select", select):
            require_package(select)
    elif select not in get_args(Choice):
        raise ValueError(
            f"--select {select}: expected {', '.join(get_args(Choice))} or package.module:function"
        )


@contextmanager
def naming_option(option: str, network: str) -> Iterator[None]:
    """Prefix a ValueError about a network with the option."""
    try:
        yield
    except ValueError as error:
        hint = " or a file of weights" if option == "--teacher" else ""
        raise ValueError(f"{option} {network}: {error}{hint}") from None


def teacher_file(teacher: str) -> Path | None:
    """The teacher's file; None where `is_brought`, whose package must be here.

    FileNotFoundError when there is no such file.
    """
    if is_brought(teacher):
        with naming_option("--teacher", teacher):
            require_package(teacher)
        return None
    path = Path(teacher).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher {teacher}: no such file; give a file, torchvision:NAME "
            "(torchvision:resnet18), timm:NAME or package.module:function"
        )
    return path


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed whose students could coincide with another seed's."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"--seed {seed}: expected 0 to {MOST_SEED}")


def student_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds of `count` students, at most MOST_STUDENTS; no other network of any run has them."""
    return tuple(_STARTS * seed + k for k in range(count))


def doping_seed(seed: int) -> int:
    """Seed of the doping student; never an evaluated one."""
    return _STARTS * seed + MOST_STUDENTS


def teacher_start(seed: int) -> int:
    """Seed of a teacher's initial weights: a student must not start where its teacher did."""
    return _STARTS * seed + MOST_STUDENTS + 1


def usual_precision(device: Device) -> StudentPrecision:
    """Default precision of a student's passes; `device` is cpu or cuda."""
    return "bf16" if device == "cuda" else "fp32"


def check_at_least(config: object, least: float, *names: str, option: bool = False) -> None:
    """Raises ValueError for a field below `least`; None passes. `option`: written as an option."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            shown = f"--{name.replace('_', '-')}" if option else name
            raise ValueError(f"{shown} {value}: expected {least} or more")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes and lengths of `train prior`; the defaults, in bf16, made the shipped sdxl-tiny."""

    image_size: int = 64
    """Side of the images in px: a multiple of 16."""
    steps: int = 5
    """Scheduler steps that the few-step phase distils for (the sampler's --steps)."""
    guidance: float = 3.0
    """Guidance scale distilled into the model."""
    vae_steps: int = 1600
    """Optimiser steps of the autoencoder."""
    vae_batch: int = 32
    """Images per autoencoder step."""
    vae_width: int = 16
    """Channels of the autoencoder's first level, a multiple of 8; the next two have 2 and 4 times
    as many. The denoiser cannot restore what the autoencoder blurs."""
    vae_factor: int = 4
    """How many times smaller the side of the latents is: 2 or 4."""
    latent_channels: int = 8
    """Channels of the latents: more keep finer detail."""
    patch_factor: int = 2
    """The denoiser also learns to sharpen patches of 1/n of the side, as `train --factor` cuts
    them; 1: it does not."""
    width: int = 64
    """Channels of the denoiser's first two levels, a multiple of 32; the third has twice as many.
    64: 4.8 million parameters, 128: 18.7 million. A narrow first level draws blots for shapes."""
    crops: int = 2
    """Random crops per image for the denoiser, besides the image and its mirror image."""
    precision: PriorPrecision = "fp32"
    """Precision of the denoiser's training passes; bf16 by autocast."""
    unet_steps: int = 20_000
    """Optimiser steps of the denoiser."""
    unet_batch: int = 16
    """Latents per denoiser step, in all three denoiser phases."""
    guidance_steps: int = 1200
    """Steps that distil guidance."""
    few_step_steps: int = 2400
    """Steps that distil several small sampler steps into one."""
    substeps: int = 5
    """Small deterministic teacher steps that one student evaluation replaces."""
    seed: int = 0
    """Seed of initialisation and of each step's batch, noise and timesteps."""

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.image_size % 16:
            raise ValueError(f"image_size {self.image_size}: expected a multiple of 16, 32 or more")
        if self.vae_factor not in (2, 4):
            raise ValueError(f"vae_factor {self.vae_factor}: expected 2 or 4")
        if self.patch_factor < 1 or self.image_size % self.patch_factor:
            raise ValueError(
                f"patch_factor {self.patch_factor}: expected a divisor of image_size "
                f"{self.image_size}"
            )
        for name, step in (("width", 32), ("vae_width", 8)):
            value = getattr(self, name)
            if value < step or value % step:
                raise ValueError(f"{name} {value}: expected a multiple of {step}")
        if not 1 <= self.steps <= TIMESTEPS:
            raise ValueError(f"steps {self.steps}: expected 1 to {TIMESTEPS}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance {self.guidance}: expected a finite number, 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected 0 to 2^63 - 1")
        check_at_least(self, 0, "crops")
        check_at_least(self, 1, "vae_steps", "unet_steps", "guidance_steps", "few_step_steps")
        check_at_least(self, 1, "vae_batch", "unet_batch", "substeps", "latent_channels")

    def as_dict(self) -> dict:
        """The options as plain values, for the model card."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and lengths of `train decoder`."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 32
    """Images per step."""
    width: int = 16
    """Channels of the decoder, a multiple of 8; TAESD, for 512 px, has 64. One CPU core, OpenVINO
    in bf16, ms per image of 64 px: sdxl-tiny's own decoder 3.6; 16 channels and 2 blocks 1.0; 32
    and 1, 2.0."""
    blocks: int = 2
    """Residual blocks per resolution; TAESD has 3."""
    seed: int = 0
    """Seed of initialisation and of each step's images and noise."""

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width {self.width}: expected a multiple of 8")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected 0 to 2^63 - 1")
        check_at_least(self, 1, "steps", "batch", "blocks")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How a teacher is trained on the whole training split: AdamW, cosine to 0 after a warm-up."""

    network: str = "resnet18"
    """A name for networks.build_network."""
    size_px: int = 224
    """Side of its input images."""
    epochs: int = 100
    """Passes over the training split."""
    batch: int = 128
    """Images per optimiser step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the schedule."""
    weight_decay: float = 0.05
    """Decoupled weight decay, not on 1-D parameters."""
    warmup_epochs: float = 1.0
    """Epochs, possibly fractional, over which the learning rate rises from 0."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in [0, 1)."""
    crop_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the image's area that a random crop covers."""
    flip: bool = True
    """Mirror half of the crops."""
    seed: int = 0
    """Seed of initialisation, order, crops and flips."""
    precision: TeacherPrecision = "fp32"
    """Precision of the passes in training, by autocast; weights and answers are fp32."""
    device: Device = "auto"
    """`auto` is cuda where there is one."""

    def settings(self) -> dict[str, Any]:
        """Plain JSON, without fp32: teachers from before `precision` resume."""
        settings = asdict(self)
        if self.precision == "fp32":
            del settings["precision"]
        return settings


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How students are trained on expansions: AdamW, KL to the teacher at a temperature,
    or cross-entropy with hard targets."""

    network: str = "resnet18"
    """A name for networks.build_network."""
    size_px: int = 224
    """Side of its input images."""
    epochs: int = 300
    """Every epoch shows every sample of the coreset once."""
    batch: int = 10
    """Views per optimiser step; the same for every method."""
    learning_rate: float = 1e-3
    """Learning rate of the first epoch."""
    weight_decay: float = 0.01
    """Decoupled weight decay, not on 1-D parameters."""
    final_lr_fraction: float = 0.5
    """Final learning rate as a fraction of the first, in [0, 1): the rate of epoch e of E is
    0.5·(1 + cos(acos(2·fraction - 1)·e/E)) of the first; 0.5 is RDED's, 0 is the full cosine."""
    targets: Targets = "soft"
    """`soft`: KL divergence to the teacher's output; `hard`: cross-entropy on the class, without a
    teacher; CutMix then mixes two classes by their visible area."""
    temperature: float = 20.0
    """Temperature of teacher and student in the KL divergence (batchmean, without the T² factor);
    1 with hard targets."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a view covers."""
    flip: bool = True
    """Mirror half of the views."""
    cutmix: bool = True
    """Paste a box from another sample of the pool into every view; the label is the mixture's."""
    pool: int = 1024
    """Samples rendered together; CutMix partners and batches are drawn from them."""
    group: int = 1
    """Samples of a class that stay together in an epoch's order, to share a prompt in the engine; a
    student shuffles them into the rest of the pool."""
    views: ViewPrecision = "fp32"
    """Precision of the views for teacher and student; bf16 would lose a bit of a pixel's 8."""
    precision: StudentPrecision = "fp32"
    """Precision of a student's passes, in training and validation, by autocast; weights and
    optimiser stay in fp32."""
    compile: bool = False
    """Compile the network with torch.compile, on a GPU as CUDA graphs."""
    accumulate: int = 1
    """Micro-batches per batch, for a batch that does not fit into memory. BatchNorm sees the
    parts."""
    overlap: bool = True
    """Render the next pools while the students learn; changes no result."""
    evaluate_every: int = 0
    """Epochs between two points of the accuracy curve; 0: no curve. Changes no result."""
    checkpoint_every: int = 10
    """Most epochs between two checkpoints of all students; changes no result."""
    checkpoints_kept: int = 2
    """Newest checkpoints to keep, in case one is damaged; changes no result."""
    seed: int = 0
    """The coreset's seed for crops, flips, CutMix and the order of samples, so that stored labels
    fit every student. A student's own seed sets its initialisation and its order within a pool."""
    device: Device = "auto"
    """`auto` is cuda where there is one."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "size_px", "epochs", "batch", "pool", "group", "accumulate")
        check_at_least(self, 1, "checkpoint_every", "checkpoints_kept")
        check_at_least(self, 0, "evaluate_every")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected more than 0")
        if not 0 <= self.final_lr_fraction < 1:
            raise ValueError(f"final_lr_fraction {self.final_lr_fraction}: expected [0, 1)")
        if self.targets == "hard" and self.temperature != 1:
            raise ValueError(f"temperature {self.temperature}: expected 1 with hard targets")

    def at(self, precision: StudentPrecision) -> StudentConfig:
        """A copy with passes in `precision`, and views that lose nothing in such a pass."""
        views = "fp32" if precision == "fp32" else "fp16"
        return replace(self, precision=precision, views=views)

    def recipe(self) -> dict[str, Any]:
        """How a student learns from views and labels, which a manifest describes separately.

        Plain JSON: network, batch, learning rate and so on; nothing about where it runs.
        """
        return {k: v for k, v in asdict(self).items() if k not in _OUTSIDE_RECIPE}


_OUTSIDE_RECIPE = {
    *("seed", "size_px", "crop_scale", "flip", "cutmix", "views"),  # describe the views
    *("epochs", "temperature", "targets"),  # describe the labels
    *("device", "compile"),
    *CHANGES_NO_RESULT,
}


def pool_size(config: StudentConfig) -> int:
    """Samples of a full pool: `config.pool` rounded down, so no partial batch adds a step."""
    return max(config.pool // config.batch, 1) * config.batch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One protocol for all methods, before command-line options change it."""

    name: RecipeName
    about: str
    """Its source, and which gaps were filled."""
    image_size: int
    """Side of the rendered images and of the networks' inputs, in px."""
    factor: int = 2
    """r: a patch is image_size // r wide, and r² patches replace one image."""
    small_factor: int = 2
    """r for images of 64 px or less."""
    crops: int = 5
    """Random crops per image that the teacher scores."""
    pool_per_class: int = 300
    """Images per class that are cropped and scored."""
    scoring: Scoring = "pad"
    """How the teacher sees a crop: padded to the image size, as in RDED, resized, or unchanged."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    batches: tuple[tuple[int, int, int], ...] = ((1, 10, 20), (10, 50, 100), (50, 100, 200))
    """(ipc, batch below 100 classes, batch from 100 on); the first row with this ipc or more
    applies. Tiny-ImageNet's 200 classes have 100 at every ipc. Empty: the student's own, always."""
    full_cosine: tuple[str, ...] = ()
    """Networks whose learning rate ends at 0 instead of the student's final_lr_fraction."""

    def factor_for(self, image_size: int) -> int:
        """r for images of `image_size` px."""
        return self.small_factor if image_size <= SMALL_IMAGES_PX else self.factor

    def student_for(
        self, *, ipc: int, factor: int, classes: int, network: str | None = None
    ) -> StudentConfig:
        """The student config with the batch, learning rate and crop scale for these numbers."""
        network = network or self.student.network
        rows = self.batches or ((ipc, self.student.batch, self.student.batch),)
        few, many = next((row[1:] for row in rows if ipc <= row[0]), rows[-1][1:])
        known = network.removeprefix(TORCHVISION).removeprefix(TIMM)
        rate, to_zero = NETWORK_LEARNING_RATES.get(known), known in self.full_cosine
        return replace(
            self.student,
            network=network,
            batch=100 if classes == 200 and self.batches else few if classes < 100 else many,
            learning_rate=rate or self.student.learning_rate,
            final_lr_fraction=0.0 if to_zero else self.student.final_lr_fraction,
            crop_scale=(1 / factor, 1.0),
        )


NETWORK_LEARNING_RATES = {
    "vgg11": 5e-4,
    "alexnet": 1e-4,
    "vit_b_16": 1e-4,
    "vit-s": 1e-4,
    "swin_t": 1e-4,
    "mobilenet_v2": 2.5e-3,
    "efficientnet_b0": 2e-3,
}
"""Rates of student networks that RDED does not train at the recipe's; vit-s has its ViT-B's."""

RECIPES: dict[RecipeName, Recipe] = {
    "rded": Recipe(
        name="rded",
        about="RDED's student: 300 epochs, half cosine, CutMix, T = 20, r = 1 for images of 64 px "
        "or less; the teacher is ours, as RDED's is unpublished",
        image_size=RECIPE_PX,
        small_factor=1,
    ),
    "dace": Recipe(
        name="dace",
        about="DACE: r = 2, 300 epochs, AdamW 1e-3, weight decay 0.01. Filled in as RDED does: "
        "224 px, batch, temperature 20, CutMix, half cosine, crops, pool and scoring; guidance is "
        "off and the latents' mixing weight is uniform in (0, 1)",
        image_size=RECIPE_PX,
    ),
    "rd3": Recipe(
        name="rd3",
        about="RD3: 400 epochs, batch 50, Adam 1e-3, cosine 0.5·(1 + cos(pi·e/(zeta·E))) with zeta "
        "1 for ResNet-18 and 2 for others, CutMix, crops and flips as RDED. Filled in: no weight "
        "decay, and as RDED does temperature 20, r, pool, scoring and rates of other networks",
        image_size=RECIPE_PX,
        small_factor=1,
        student=StudentConfig(epochs=400, batch=50, weight_decay=0.0),
        batches=(),
        full_cosine=("resnet18",),
    ),
    "small": Recipe(
        name="small",
        about="Few images and small nets, in minutes on a CPU: 64 px, BatchNorm ConvNets, T = 4, "
        "full cosine, no CutMix, patches scored at full size",
        image_size=64,
        scoring="resize",
        teacher=TeacherConfig(
            network="convnet-d4-w24to96",
            size_px=64,
            epochs=4,
            batch=32,
            learning_rate=2e-3,
            warmup_epochs=0.4,
            crop_scale=(0.5, 1.0),
        ),
        student=StudentConfig(
            network="convnet-d4-w24to96",
            size_px=64,
            epochs=100,
            batch=10,
            final_lr_fraction=0.0,
            temperature=4.0,
            cutmix=False,
        ),
    ),
}


def usual_recipe(size_px: int) -> RecipeName:
    """The default recipe for images of this size, and for a model that was trained at it."""
    return "small" if size_px <= SMALL_PX else "dace"
