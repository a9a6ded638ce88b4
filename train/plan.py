"""Options → what will be done: the sets, the recipe with all numbers filled in, model, device."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..engine.backends import require_backend, resolve_device
from ..engine.batches import fitting_batch
from ..engine.class_names import display_names
from ..engine.class_texts import read_prompts
from ..engine.config import ExpandConfig
from ..engine.images import ImageSet, check_same_classes, open_image_set
from ..engine.prompts import class_prompts, unseen_classes
from ..export.machine import cxx_compiler
from ..export.models import ModelSource, Unavailable, find_model
from .commands import BY_MODEL, GENERATED, RunOptions
from .config import RECIPES, Recipe, Scoring, StudentConfig, TeacherConfig
from .networks import TORCHVISION, build_network
from .record import Report
from .shapes import GENERATOR_VERSION, write_shapes
from .teacher import torchvision_columns
from .views import pool_size

LARGE_LABELS_GIB = 1.0  # labels of a method from here on are told before the run
LARGE_ENGINE_BATCH = 32  # where an epoch is many pools: the last batch of each may be padded
MOST_TOGETHER = 8  # samples of a class in a group: more would show in a student's batches
SMALL_MODEL_PX = 128  # models up to this size are toys: the `small` recipe fits them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's options with nothing left open."""

    options: RunOptions
    train: ImageSet
    val: ImageSet
    data_sha256: str
    """Of the names and sizes of all images of both splits."""
    class_names: tuple[str, ...]
    device: str
    model: ModelSource | None
    """None when no method renders with one."""
    recipe: Recipe
    factor: int
    teacher: TeacherConfig
    """Of a teacher that is trained here."""
    teacher_source: str | None
    """torchvision:NAME or a file; None when the teacher is trained here."""
    student: StudentConfig
    expand: ExpandConfig
    """How dace makes images of patches."""
    generate: ExpandConfig
    """How t2i makes images of nothing, one of each class at a time."""
    own_prompts: dict[str, str]
    """Of the classes in --prompts, by id."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The model's prompt for each class."""
        template, ids = self.options.prompt, self.train.class_ids
        return class_prompts(self.class_names, template, class_ids=ids, own=self.own_prompts)

    @property
    def samples_per_class(self) -> int:
        """Images of a class that a student sees in an epoch, of every method, but for doping's."""
        return self.options.ipc * self.factor**2

    @property
    def doped_samples_per_class(self) -> int:
        """Real images of a class that doping adds to these."""
        return self.options.dope * self.factor**2

    @property
    def image_size(self) -> int:
        """Side of rendered images and of what the networks see, in px."""
        return self.student.size_px

    @property
    def patch_px(self) -> int:
        """Side of a stored patch."""
        return self.image_size // self.factor

    @property
    def scoring(self) -> Scoring:
        """How the teacher is shown a patch that it scores."""
        return self.options.scoring or self.recipe.scoring

    @property
    def student_seeds(self) -> tuple[int, ...]:
        """One per student."""
        return student_seeds(self.options.seed, self.options.seeds)


def student_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds of `count` students of a run; no two runs of different --seed share one."""
    return tuple(1000 * seed + k for k in range(count))


def make_plan(options: RunOptions, report: Report) -> Plan:
    """Open the data, find the model, choose what was left out, and say what was chosen.

    Raises ValueError or OSError, one clear line each, for what does not fit together.
    """
    device = resolve_device(options.device)
    precision = options.precision or ("fp16" if device == "cuda" else "fp32")
    if set(options.methods) & set(BY_MODEL):
        require_backend(options.backend, precision, device)
    data = data_folder(options.data, options.shapes_per_class, report)
    train, val = open_image_set(data, "train"), open_image_set(data, "val")
    check_same_classes(train, val)
    class_names = display_names(train.class_ids, options.class_names)
    own_prompts = read_prompts(options.prompts, train.class_ids)
    model = _choose_model(options, device, report)
    recipe = _choose_recipe(options, device, model, report)
    image_size = options.image_size or _native_px(model, recipe) or recipe.image_size
    factor = options.factor or recipe.factor_for(image_size)
    generate_size = options.generate_size or (image_size if model is None else model.trained_px())
    if model is not None:
        _check_rendered(model, options.methods, image_size, generate_size)
    if image_size % factor:
        raise ValueError(
            f"--factor {factor}: expected a divisor of the image size, {image_size} px: "
            "patches are image size / factor wide"
        )
    _check_labels(options, len(train.class_ids))
    check_images_per_class(train, images_needed(options, factor), options.dope)
    student = recipe.student_for(
        ipc=options.ipc, factor=factor, classes=len(train.class_ids), network=options.student
    )
    each = (options.ipc + options.dope) * factor**2
    samples = len(train.class_ids) * each
    engine_batch = options.engine_batch or engine_batch_for(samples, student, options.refresh)
    group = grouping(len(train.class_ids), each, student)
    student_precision = options.student_precision or ("bf16" if device == "cuda" else "fp32")
    if options.student_compile:
        check_compiler()
    teacher_source, teacher_network = _choose_teacher(options.teacher, recipe)
    if teacher_source is not None and teacher_source.startswith(TORCHVISION):
        torchvision_columns(teacher_source, train.class_ids)
    for option, network in (("--teacher", teacher_network), ("--student", student.network)):
        check_network(option, network, len(train.class_ids), image_size)
    if (options.scoring or recipe.scoring) == "native" and teacher_source is None:
        shown_px = image_size // factor
        classes = len(train.class_ids)
        check_network("--teacher", teacher_network, classes, image_size, shown_px=shown_px)
    expand = ExpandConfig(
        size_px=image_size,
        steps=options.steps_of("dace"),
        rho=options.rho,
        mixup=options.mixup,
        mixup_weight=options.mixup_weight,
        start=options.start,
        seed=options.seed,
        precision=precision,
        vae_precision=options.vae_precision,
        batch=engine_batch,
        backend=options.backend,
        device=device,
        images_per_prompt=together_in_engine(group, engine_batch, options.refresh),
        bundles=options.bundles and options.bundles.expanduser(),
    )
    plan = Plan(
        options=options,
        train=train,
        val=val,
        data_sha256=images_sha256(train, val),
        class_names=class_names,
        device=device,
        model=model,
        recipe=recipe,
        factor=factor,
        teacher=replace(
            recipe.teacher,
            network=teacher_network,
            size_px=image_size,
            epochs=options.teacher_epochs or recipe.teacher.epochs,
            seed=options.seed,
            device=device,
        ),
        teacher_source=teacher_source,
        student=replace(
            student,
            size_px=image_size,
            epochs=options.epochs or student.epochs,
            batch=options.batch or student.batch,
            group=group or 1,
            learning_rate=options.learning_rate or student.learning_rate,
            cutmix=student.cutmix if options.cutmix is None else options.cutmix == "on",
            precision=student_precision,
            views="fp32" if student_precision == "fp32" else "fp16",
            compile=options.student_compile,
            targets=options.targets,
            temperature=1.0 if options.targets == "hard" else student.temperature,
            accumulate=options.accumulate,
            overlap=options.overlap == "on",
            seed=options.seed,
            device=device,
        ),
        expand=expand,
        generate=replace(
            expand,
            size_px=generate_size,
            steps=options.steps_of("t2i"),
            start="noise",
            mixup=False,
            batch=options.engine_batch or fitting_batch(len(train.class_ids)),
            images_per_prompt=1,
        ),
        own_prompts=own_prompts,
    )
    _say(plan, report)
    return plan


def engine_batch_for(samples: int, student: StudentConfig, refresh: float = 1.0) -> int:
    """Images per call of the model when nobody says how many: of `samples` per epoch."""
    if refresh < 1:
        return fitting_batch(round(refresh * min(samples, pool_size(student))))
    return fitting_batch(samples) if samples <= pool_size(student) else LARGE_ENGINE_BATCH


def grouping(classes: int, each: int, student: StudentConfig) -> int | None:
    """Samples of a class that stay together in an epoch's order.

    None where an epoch is one pool: its order is of no matter, and the Expander's own choice, a
    divisor of what a whole class has, pads nothing. A pool of 1000 classes has about one sample of
    each: at 8 images per prompt, and no groups, five times as many images would be rendered as are
    wanted; at 1, keys and values of a prompt would be read for every image.
    """
    if classes * each <= pool_size(student):
        return None
    return math.gcd(each, pool_size(student), MOST_TOGETHER)


def together_in_engine(group: int | None, engine_batch: int, refresh: float) -> int | None:
    """ExpandConfig.images_per_prompt for groups of an epoch's order, None: the Expander's choice.

    What is expanded anew of a group, when not all is, has no fixed number.
    """
    if refresh < 1:
        return 1
    return None if group is None else math.gcd(group, engine_batch)


def check_compiler() -> None:
    """Unavailable when torch.compile has nothing to compile with."""
    if cxx_compiler() is None:
        raise Unavailable(
            "--student-compile needs a C++ compiler, and there is none here: install g++, or leave "
            "it out"
        )


def data_folder(data: str, shapes_per_class: int, report: Report) -> Path:
    """The folder that --data means; `shapes` is generated into the cache on first use."""
    if data != "shapes":
        return Path(data).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbloom"
    folder = cache / f"shapes-{GENERATOR_VERSION}-{shapes_per_class}"
    if not folder.is_dir():
        report.say(f"data: writing the generated set to {folder}")
    return write_shapes(
        folder,
        train_per_class=shapes_per_class,
        val_per_class=max(1, shapes_per_class // 5),
    )


def _choose_model(options: RunOptions, device: str, report: Report) -> ModelSource | None:
    if not set(options.methods) & set(BY_MODEL):
        return None
    name = options.model
    if name is None:
        small = options.data == "shapes" or device == "cpu"
        name = "sdxl-tiny" if small else "sdxl-turbo"
        reason = "for --data shapes" if options.data == "shapes" else f"on {device}"
        report.say(f"model: {name} ({reason}; choose with --model)")
    return find_model(name)


def _choose_recipe(
    options: RunOptions, device: str, model: ModelSource | None, report: Report
) -> Recipe:
    if options.recipe is not None:
        return RECIPES[options.recipe]
    native = model.trained_px() if model is not None else None
    if native is None:  # the recipe that dace would have had on the same data
        small = options.data == "shapes" or device == "cpu"
    else:
        small = native <= SMALL_MODEL_PX
    recipe = RECIPES["small" if small else "dace"]
    report.say(f"recipe: {recipe.name} ({recipe.about})")
    return recipe


def _check_labels(options: RunOptions, classes: int) -> None:
    if options.codec == "topk" and classes <= 2 * options.top_k:
        raise ValueError(
            f"--codec topk --top-k {options.top_k} keeps {min(options.top_k, classes)} of "
            f"{classes} probabilities, no less than dense: give a smaller --top-k, or --codec dense"
        )


def _choose_teacher(given: str | None, recipe: Recipe) -> tuple[str | None, str]:
    """What to load, if anything, and the network that is trained, or that a state dict is of."""
    network = recipe.teacher.network
    if given is None:
        return None, network
    if given.startswith(TORCHVISION) or Path(given).expanduser().is_file():
        return given, network
    return None, given


def check_network(
    option: str, name: str, classes: int, size_px: int, *, shown_px: int | None = None
) -> None:
    """Build it and run it without memory: what cannot work is told before anything is trained.

    It is built for images of `size_px`, and shown some of `shown_px`, the same when left out.
    ValueError, naming `option`.
    """
    shown_px = shown_px or size_px
    try:
        with torch.device("meta"):
            network = build_network(name, classes, size_px)
    except ValueError as error:
        hint = " or a file of weights" if option == "--teacher" else ""
        raise ValueError(f"{option} {name}: {error}{hint}") from None
    try:
        network(torch.empty(2, 3, shown_px, shown_px, device="meta"))
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["it is made for one size"])[0]
        way_out = "give a larger --image-size" if shown_px == size_px else "give another --scoring"
        raise ValueError(
            f"{option} {name}: cannot take images of {shown_px} px ({reason}): {way_out} or "
            "another network"
        ) from None


def _native_px(model: ModelSource | None, recipe: Recipe) -> int | None:
    """The model's own size under the recipe `small`, whose models make nothing else well."""
    if model is None or recipe.name != "small" or model.trained_px() > SMALL_MODEL_PX:
        return None
    return model.trained_px()


def _check_rendered(
    model: ModelSource, methods: tuple[str, ...], image_size: int, generate_size: int
) -> None:
    """ValueError for a size that the model cannot make."""
    made = {"dace": ("--image-size", image_size), "t2i": ("--generate-size", generate_size)}
    for option, size_px in (made[method] for method in methods if method in made):
        if size_px % model.vae_factor():
            raise ValueError(
                f"{option} {size_px}: expected a multiple of {model.vae_factor()}, by which "
                f"the VAE of {model.name} makes images smaller"
            )


def images_needed(options: RunOptions, factor: int) -> int:
    """Training images of a class that the methods take patches of."""
    return options.ipc * factor**2 if set(options.methods) - set(GENERATED) else 0


def check_images_per_class(train: ImageSet, needed: int, doped: int = 0) -> None:
    """ValueError when a class has fewer than `needed` images, of each of which a patch is taken, or
    fewer than the `doped` that --dope adds."""
    counts = [int((train.labels == index).sum()) for index in range(len(train.class_ids))]
    fewest = min(range(len(counts)), key=counts.__getitem__)
    if counts[fewest] < needed:
        raise ValueError(
            f"class {train.class_ids[fewest]!r} has {counts[fewest]} training images, but "
            f"ipc · factor² = {needed} patches are wanted, one of each image: "
            "give a smaller --ipc or --factor, or more images"
        )
    if counts[fewest] < doped:
        raise ValueError(
            f"class {train.class_ids[fewest]!r} has {counts[fewest]} training images, but "
            f"--dope {doped} asks for more: give a smaller one"
        )


def images_sha256(*sets: ImageSet) -> str:
    """One name for the images of these sets: of their names and sizes, not of their place."""
    digest = hashlib.sha256()
    for images in sets:
        for path in images.paths:
            size = os.stat(images.root / path).st_size
            digest.update(f"{images.split}/{path} {size}\n".encode())
    return digest.hexdigest()


def label_gib(plan: Plan) -> float:
    """GiB of a method's labels as --codec keeps them, of every sample and epoch."""
    classes = len(plan.class_names)
    each = plan.samples_per_class + plan.doped_samples_per_class
    answers = plan.student.epochs * classes * each
    bytes_each = 2 * classes if plan.options.codec == "dense" else 4 * plan.options.top_k
    return bytes_each * answers / 2**30


def _say(plan: Plan, report: Report) -> None:
    options, classes = plan.options, len(plan.class_names)
    report.say(
        f"data: {len(plan.train)} training and {len(plan.val)} validation images of "
        f"{classes} classes; {plan.image_size} px, patches of {plan.patch_px} px"
    )
    kept_gib = label_gib(plan)
    stores = options.labels != "online" and options.targets == "soft"
    if kept_gib >= LARGE_LABELS_GIB and stores:
        smaller = options.codec == "dense" and classes > 2 * options.top_k
        report.say(
            f"labels: {options.codec}, {kept_gib:.1f} GiB for each method, and as much again on "
            f"the disk while they are put into the coreset; "
            f"{'--codec topk keeps less, ' if smaller else ''}--labels online keeps none"
        )
    if plan.model is None:
        return
    if plan.own_prompts:
        report.say(
            f"prompts: {len(plan.own_prompts)} of {classes} classes have their own, the others "
            f"{options.prompt!r}"
        )
    if "t2i" in options.methods:
        report.say(_said_of_t2i(plan))
    unseen = unseen_classes(plan.model, plan.class_names)
    if unseen:
        report.say(
            f"warning: {plan.model.name} has never seen {len(unseen)} of the classes, "
            f"first {unseen[0]!r}: its images of them may not help; `train prior` makes a model"
        )


def _said_of_t2i(plan: Plan) -> str:
    options, generate = plan.options, plan.generate
    fitting = f"as many as fit into {options.budget_seconds or 0:g} s"
    count = fitting if options.generated is None else str(options.generated)
    shown = f", each and {options.variants} variants" if options.variants else ""
    return (
        f"t2i: images per class: {count}, made at {generate.size_px} px in {generate.steps} "
        f"step(s), kept at {plan.image_size} px{shown}"
    )
