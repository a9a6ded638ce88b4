"""Options → plan: opens data and model, fills in what was not given, and checks that all fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...engine.builds.cards import Card, most_per_call, named_card
from ...engine.builds.needs import engine_needs
from ...engine.config import SMALL_PX, ExpandConfig
from ...engine.data.images import check_same_classes, with_classes
from ...engine.data.names import display_names, doubtful_names, doubtful_order, read_prompts
from ...engine.expand.backends import require_backend, resolve_device
from ...engine.expand.prompts import unseen_classes
from ...engine.labels.file import LabelLayout
from ...export.config import DeviceName, EngineSpec, Precision
from ...export.models import ModelSource, find_model
from ...export.trt_library import parse_targets
from ..batching import CPU_ENGINE_BATCH, engine_batch_for, grouping, together_in_engine
from ..config import (
    RECIPES,
    Recipe,
    RecipeName,
    StudentConfig,
    TeacherConfig,
    is_ready_teacher,
    usual_precision,
    usual_recipe,
)
from ..data.folder import images_sha256
from ..data.forms import data_name, open_data
from ..methods.dace import DACE
from ..methods.registry import METHODS
from ..options import RunOptions
from ..plan import Plan
from ..run.progress import Report
from .checks import check_plan

LARGE_LABELS_GIB = 1.0  # announced before the run, per method


def make_plan(options: RunOptions, report: Report, cards: Sequence[Card] = ()) -> Plan:
    """Open the data, find the model, choose what was not given, and report the choices.

    `cards`: the GPUs of all ranks, which share an engine batch. Raises ValueError or OSError, one
    clear line each, for what does not fit together.
    """
    chosen = _Choices(options, report, cards)
    expand = chosen.expand()
    plan = Plan(
        methods=options.methods,
        data_name=data_name(options.data),
        train=chosen.train,
        val=chosen.val,
        val_fraction=options.where.val_fraction,
        data_sha256=images_sha256(chosen.train, chosen.val),
        damaged=(),
        class_names=chosen.class_names,
        device=chosen.device,
        targets=chosen.targets,
        seed=options.seed,
        seeds=options.seeds,
        recipe=chosen.recipe,
        ipc=options.ipc,
        factor=chosen.factor,
        dope=options.dope,
        scoring=options.scoring or chosen.recipe.scoring,
        select=options.select,
        candidates=options.candidates,
        teacher=chosen.teacher(),
        teacher_source=chosen.teacher_source,
        student=chosen.student(),
        labels=options.labels,
        codec=options.label_codec(chosen.classes),
        model=chosen.model,
        prompt=options.prompt,
        own_prompts=chosen.own_prompts,
        expand=expand,
        refresh=options.refresh,
        variants=options.variants,
        budget_seconds=options.budget_seconds,
        dsco=options.dsco,
        use=chosen.uses(expand),
    )
    check_plan(plan)
    _announce(plan, report)
    return plan


class _Choices:
    """Data and model that the options name, opened, and the settings that follow from them."""

    def __init__(self, options: RunOptions, report: Report, cards: Sequence[Card]) -> None:
        self.options, self.report, self.cards = options, report, cards
        self.device: DeviceName = resolve_device(options.device)
        self.targets = parse_targets(options.build_only or (), "--build-only")
        runs_on = "cuda" if self.targets else self.device  # the model, by its engine
        default: Precision = "fp16" if runs_on == "cuda" else "fp32"
        self.precision: Precision = options.precision or default
        runs_a_model = any(METHODS[method].model for method in options.methods)
        if runs_a_model:
            require_backend(
                *(options.backend, self.precision, self.device),
                library=options.trt_library,
                targets=self.targets,
            )
        given = (options.where, options.shapes_per_class)
        self.train, val = open_data(options.data, ("train", "val"), report, *given)
        self.val = with_classes(val, self.train.class_ids)
        check_same_classes(self.train, self.val)
        ids = self.train.class_ids
        self.classes = len(ids)
        self.class_names = display_names(ids, options.class_names)
        self.own_prompts = read_prompts(options.prompts, ids)
        self.model = _choose_model(options, runs_on, report) if runs_a_model else None
        self.recipe = _choose_recipe(options, runs_on, self.model, report)
        self.image_size = options.image_size or self._native_px() or self.recipe.image_size
        self.factor = options.factor or self.recipe.factor_for(self.image_size)
        self.teacher_source, self.teacher_network = _choose_teacher(options.teacher, self.recipe)
        self.by_recipe = self.recipe.student_for(
            ipc=options.ipc, factor=self.factor, classes=self.classes, network=options.student
        )
        each = (options.ipc + options.dope) * self.factor**2
        self.samples = self.classes * each
        self.group = grouping(self.classes, each, self.by_recipe)

    def _native_px(self) -> int | None:
        """The model's own size under the recipe `small`: its models work only at that size."""
        if self.model is None or self.recipe.name != "small":
            return None
        native = self.model.trained_px()
        return native if native <= SMALL_PX else None

    def teacher(self) -> TeacherConfig:
        """How a teacher is trained here."""
        return replace(
            self.recipe.teacher,
            network=self.teacher_network,
            size_px=self.image_size,
            epochs=self.options.teacher_epochs or self.recipe.teacher.epochs,
            precision=self.options.teacher_precision,
            seed=self.options.seed,
            device=self.device,
        )

    def student(self) -> StudentConfig:
        """How students are trained: the recipe, as the options change it."""
        options, recipe = self.options, self.by_recipe
        return replace(
            recipe.at(options.student_precision or usual_precision(self.device)),
            size_px=self.image_size,
            epochs=options.epochs or recipe.epochs,
            batch=options.batch or recipe.batch,
            group=self.group or 1,
            learning_rate=options.learning_rate or recipe.learning_rate,
            cutmix=recipe.cutmix if options.cutmix is None else options.cutmix == "on",
            compile=options.student_compile,
            targets=options.targets,
            temperature=1.0 if options.targets == "hard" else recipe.temperature,
            accumulate=options.accumulate,
            evaluate_every=options.evaluate_every,
            overlap=options.overlap == "on",
            seed=options.seed,
            device=self.device,
        )

    def expand(self) -> ExpandConfig:
        """How patches are expanded."""
        options = self.options
        batch = options.engine_batch or self._engine_batch()
        return ExpandConfig(
            size_px=self.image_size,
            steps=options.steps or DACE.steps,
            rho=options.rho,
            mixup=options.mixup,
            mixup_weight=options.mixup_weight,
            start=options.start,
            seed=options.seed,
            precision=self.precision,
            vae_precision=options.vae_precision,
            batch=batch,
            backend=options.backend,
            trt_library=options.trt_library,
            cuda_graph=options.cuda_graph,
            device=self.device,
            images_per_prompt=together_in_engine(self.group, batch, options.refresh),
            bundles=options.bundles and options.bundles.expanduser(),
        )

    def _engine_batch(self) -> int:
        elsewhere = self.options.build_only
        cards = [named_card(name) for name in elsewhere] if elsewhere else self.cards
        most = {CPU_ENGINE_BATCH}
        if self.model is not None and cards:
            spec = EngineSpec(
                size_px=self.image_size,
                precision=self.precision,
                vae_precision=self.options.vae_precision,
                device="cuda",
            )
            needs = engine_needs(self.model, spec, "eager")
            most = {most_per_call(needs, card) for card in cards}
        if elsewhere and len(most) > 1:
            raise ValueError(
                f"--build-only {' '.join(elsewhere)}: engines of {sorted(most)} images per call "
                "fill these cards: name one at a time, or give --engine-batch"
            )
        batch = engine_batch_for(self.samples, self.by_recipe, self.options.refresh, min(most))
        if cards and any(METHODS[name].model == "rendered" for name in self.options.methods):
            self.report.say(f"engine batch: {batch} (choose with --engine-batch)")
        return batch

    def uses(self, expand: ExpandConfig) -> dict[str, ExpandConfig]:
        """How each method that runs the model uses it: on patches, or once on noise alone."""
        uses: dict[str, ExpandConfig] = {}
        for method in (METHODS[name] for name in self.options.methods):
            if method.model == "rendered":
                uses[method.name] = expand
            elif method.model == "made" and self.model is not None:
                own = method.use(self.options, self.model.trained_px(), self.classes)
                steps = self.options.steps or method.steps
                uses[method.name] = replace(expand, start="noise", mixup=False, steps=steps, **own)
        return uses


def _choose_model(options: RunOptions, device: str, report: Report) -> ModelSource:
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
    if model is None:  # as dace would choose on the same data
        default = "small" if options.data == "shapes" or device == "cpu" else "dace"
    else:
        default = usual_recipe(model.trained_px())
    return recipe_or_default(options.recipe, default, report)


def recipe_or_default(name: RecipeName | None, default: RecipeName, report: Report) -> Recipe:
    """The named recipe, or the default, which is then reported."""
    if name is not None:
        return RECIPES[name]
    recipe = RECIPES[default]
    report.say(f"recipe: {recipe.name} ({recipe.about})")
    return recipe


def _choose_teacher(given: str | None, recipe: Recipe) -> tuple[str | None, str]:
    """The teacher to load, None to train one, and its network, which a bare state dict needs."""
    network = recipe.teacher.network
    if given is None:
        return None, network
    if is_ready_teacher(given):
        return given, network
    return None, given


def _announce(plan: Plan, report: Report) -> None:
    """Report the amount of data, large labels, prompts, and classes that the model has not seen."""
    classes = len(plan.class_names)
    report.say(
        f"data: {len(plan.train)} training and {len(plan.val)} validation images of "
        f"{classes} classes; {plan.image_size} px, patches of {plan.patch_px} px"
    )
    for warning in doubtful_order(plan.train.class_ids):
        report.say(warning)
    layout = LabelLayout(
        codec=plan.codec, epochs=plan.student.epochs, samples=plan.samples, classes=classes
    )
    labels_gib = layout.bytes / 2**30
    stores = plan.labels != "online" and plan.student.targets == "soft"
    if labels_gib >= LARGE_LABELS_GIB and stores:
        smaller = plan.codec.k is None and classes > 1
        report.say(
            f"labels: {plan.codec.name}, {labels_gib:.1f} GiB for each method, and as much again "
            f"on the disk while they are put into the coreset; "
            f"{'--codec pca keeps less, ' if smaller else ''}--labels online keeps none"
        )
    if plan.model is None:
        return
    if plan.own_prompts:
        report.say(
            f"prompts: {len(plan.own_prompts)} of {classes} classes have their own, the others "
            f"{plan.prompt!r}"
        )
    ids, names = plan.train.class_ids, plan.class_names
    for warning in doubtful_names(ids, names, plan.prompts):
        report.say(warning)
    for announced in (METHODS[method].announced for method in plan.methods):
        if announced is not None:
            report.say(announced(plan))
    unseen = unseen_classes(plan.model, plan.class_names)
    if unseen:
        report.say(
            f"warning: {plan.model.name} has never seen {len(unseen)} of the classes, "
            f"first {unseen[0]!r}: its images of them may not help; `train prior` makes a model"
        )
