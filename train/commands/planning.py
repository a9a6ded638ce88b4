"""Options → plan: data and model are opened, what was left out is chosen and said, all checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...engine.config import ExpandConfig
from ...engine.data.images import ImageSet, check_same_classes, open_image_set
from ...engine.data.names import display_names, read_prompts
from ...engine.expand.backends import require_backend, resolve_device
from ...export.config import DeviceName, Precision
from ...export.models import ModelSource, find_model
from ..batching import engine_batch_for, grouping, together_in_engine
from ..config import RECIPES, TORCHVISION, Recipe, StudentConfig, TeacherConfig, usual_precision
from ..data.folder import data_folder, images_sha256
from ..methods.dace import DACE
from ..methods.registry import METHODS
from ..options import RunOptions
from ..plan import Plan
from ..run.progress import Report
from ..teacher.teacher import torchvision_columns
from .announcement import announce
from .checks import (
    check_compiler,
    check_factor,
    check_images_per_class,
    check_network,
    check_rendered,
)

SMALL_MODEL_PX = 128  # models up to this size are toys: the `small` recipe fits them


def make_plan(options: RunOptions, report: Report) -> Plan:
    """Open the data, find the model, choose what was left out, and say what was chosen.

    Raises ValueError or OSError, one clear line each, for what does not fit together.
    """
    given = _open(options, report)
    classes, each = len(given.train.class_ids), (options.ipc + options.dope) * given.factor**2
    codec = options.label_codec(classes)
    check_images_per_class(
        given.train,
        options.methods,
        ipc=options.ipc,
        factor=given.factor,
        doped=options.dope,
    )
    by_recipe = given.recipe.student_for(
        ipc=options.ipc, factor=given.factor, classes=classes, network=options.student
    )
    group = grouping(classes, each, by_recipe)
    if options.student_compile:
        check_compiler()
    teacher_source, teacher_network = _choose_teacher(options.teacher, given.recipe)
    if teacher_source is not None and teacher_source.startswith(TORCHVISION):
        torchvision_columns(teacher_source, given.train.class_ids)
    _check_networks(options, given, teacher_source, teacher_network, by_recipe.network)
    expand = _expand_config(options, given, by_recipe, each, group)
    plan = Plan(
        methods=options.methods,
        data_name=options.data.rstrip("/").rsplit("/", 1)[-1],
        train=given.train,
        val=given.val,
        data_sha256=images_sha256(given.train, given.val),
        class_names=given.class_names,
        device=given.device,
        seed=options.seed,
        seeds=options.seeds,
        recipe=given.recipe,
        ipc=options.ipc,
        factor=given.factor,
        dope=options.dope,
        scoring=options.scoring or given.recipe.scoring,
        select=options.select,
        candidates=options.candidates,
        teacher=_teacher_config(options, given, teacher_network),
        teacher_source=teacher_source,
        student=_student_config(options, given, by_recipe, group),
        labels=options.labels,
        codec=codec,
        model=given.model,
        prompt=options.prompt,
        own_prompts=given.own_prompts,
        expand=expand,
        refresh=options.refresh,
        variants=options.variants,
        budget_seconds=options.budget_seconds,
        dsco=options.dsco,
        use=_uses(options, given, expand),
    )
    announce(plan, report)
    return plan


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What the options name, opened, and the sizes that follow from it."""

    device: DeviceName
    precision: Precision
    """Of the model."""
    train: ImageSet
    val: ImageSet
    class_names: tuple[str, ...]
    own_prompts: dict[str, str]
    model: ModelSource | None
    recipe: Recipe
    image_size: int
    """In px, as the others."""
    factor: int


def _open(options: RunOptions, report: Report) -> _Given:
    device = resolve_device(options.device)
    precision = options.precision or ("fp16" if device == "cuda" else "fp32")
    if _runs_a_model(options):
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
    if model is not None:
        generate_size = options.generate_size or model.trained_px()
        check_rendered(model, options.methods, image_size, generate_size)
    check_factor(factor, image_size)
    return _Given(
        device=device,
        precision=precision,
        train=train,
        val=val,
        class_names=class_names,
        own_prompts=own_prompts,
        model=model,
        recipe=recipe,
        image_size=image_size,
        factor=factor,
    )


def _runs_a_model(options: RunOptions) -> bool:
    return any(METHODS[method].model for method in options.methods)


def _choose_model(options: RunOptions, device: str, report: Report) -> ModelSource | None:
    if not _runs_a_model(options):
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


def _native_px(model: ModelSource | None, recipe: Recipe) -> int | None:
    """The model's own size under the recipe `small`, whose models make nothing else well."""
    if model is None or recipe.name != "small" or model.trained_px() > SMALL_MODEL_PX:
        return None
    return model.trained_px()


def _choose_teacher(given: str | None, recipe: Recipe) -> tuple[str | None, str]:
    """What to load, if anything, and the network that is trained, or that a state dict is of."""
    network = recipe.teacher.network
    if given is None:
        return None, network
    if given.startswith(TORCHVISION) or Path(given).expanduser().is_file():
        return given, network
    return None, given


def _check_networks(
    options: RunOptions, given: _Given, teacher_source: str | None, teacher: str, student: str
) -> None:
    """Of a teacher that is brought along, `teacher` is what its file may be a state dict of."""
    classes, size_px = len(given.train.class_ids), given.image_size
    for option, network in (("--teacher", teacher), ("--student", student)):
        check_network(option, network, classes, size_px)
    scoring = options.scoring or given.recipe.scoring
    if scoring == "native" and teacher_source is None:
        check_network("--teacher", teacher, classes, size_px, shown_px=size_px // given.factor)


def _teacher_config(options: RunOptions, given: _Given, network: str) -> TeacherConfig:
    recipe = given.recipe.teacher
    return replace(
        recipe,
        network=network,
        size_px=given.image_size,
        epochs=options.teacher_epochs or recipe.epochs,
        seed=options.seed,
        device=given.device,
    )


def _student_config(
    options: RunOptions, given: _Given, recipe: StudentConfig, group: int | None
) -> StudentConfig:
    return replace(
        recipe.at(options.student_precision or usual_precision(given.device)),
        size_px=given.image_size,
        epochs=options.epochs or recipe.epochs,
        batch=options.batch or recipe.batch,
        group=group or 1,
        learning_rate=options.learning_rate or recipe.learning_rate,
        cutmix=recipe.cutmix if options.cutmix is None else options.cutmix == "on",
        compile=options.student_compile,
        targets=options.targets,
        temperature=1.0 if options.targets == "hard" else recipe.temperature,
        accumulate=options.accumulate,
        overlap=options.overlap == "on",
        seed=options.seed,
        device=given.device,
    )


def _expand_config(
    options: RunOptions, given: _Given, student: StudentConfig, each: int, group: int | None
) -> ExpandConfig:
    """`each`: images of a class that a student sees in an epoch."""
    samples = len(given.train.class_ids) * each
    batch = options.engine_batch or engine_batch_for(samples, student, options.refresh)
    return ExpandConfig(
        size_px=given.image_size,
        steps=options.steps or DACE.steps,
        rho=options.rho,
        mixup=options.mixup,
        mixup_weight=options.mixup_weight,
        start=options.start,
        seed=options.seed,
        precision=given.precision,
        vae_precision=options.vae_precision,
        batch=batch,
        backend=options.backend,
        device=given.device,
        images_per_prompt=together_in_engine(group, batch, options.refresh),
        bundles=options.bundles and options.bundles.expanduser(),
    )


def _uses(options: RunOptions, given: _Given, expand: ExpandConfig) -> dict[str, ExpandConfig]:
    """How each method uses the model: on patches, or once, on noise alone."""
    if given.model is None:
        return {}
    size_px, classes = given.model.trained_px(), len(given.train.class_ids)
    uses: dict[str, ExpandConfig] = {}
    for method in (METHODS[name] for name in options.methods):
        if method.model == "rendered":
            uses[method.name] = expand
        elif method.model == "made":
            from_noise = replace(expand, start="noise", mixup=False)
            own = method.use(options, size_px, classes)
            uses[method.name] = replace(from_noise, steps=options.steps or method.steps, **own)
    return uses
