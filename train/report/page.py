"""RUN/report.html, one self-contained page, and the card of a publication, from templates."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Self

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import AfterValidator, BaseModel, Field, model_validator

from ...engine.console import size
from ...export.documents import Count, Finite, Seed, read_json
from ...export.durable import replace_file, write_durably
from .chart import Bar, chart

SUMMARY, REPORT, PICTURES, LOG = "summary.json", "report.html", "pictures", "log.jsonl"
CAPTIONS = {
    "coreset.png": "The coreset: patches of the first classes, a row each, pixels kept square.",
    "expansions.png": "The same patches, a column each, expanded with more and more noise.",
    "curves.png": "Training curves. A low KL divergence on a few fixed images is memorising: the "
    "accuracy above is what counts.",
}
SIZES = ("without_labels", "labels", "with_labels", "generator", "with_generator")
GALLERY = "gallery"  # .webp and .json
REAL = "real"  # the ceiling's students: fresh real images, no distillation
NAMES = {REAL: "fresh real images (ceiling)"}


def _with_mean(accuracy: list[float | None]) -> list[float | None]:
    if accuracy[0] is None:
        raise ValueError("expected a mean and a standard deviation, found no mean")
    return accuracy


_Accuracy = Annotated[
    list[Finite | None], Field(min_length=2, max_length=2), AfterValidator(_with_mean)
]


class ReportError(ValueError):
    """A summary that cannot be reported: expected, found, what to do."""


class Students(BaseModel):
    """Accuracies in percent of a method's students, and their seeds."""

    accuracies: list[Annotated[Finite, Field(ge=0, le=100)]] = Field(min_length=1)
    seeds: list[Seed]
    class_accuracies: list[list[Finite]] = []

    @model_validator(mode="after")
    def _one_seed_each(self) -> Self:
        if not len(self.accuracies) == len(self.seeds) == len(set(self.seeds)):
            raise ValueError("expected a seed of its own for each accuracy")
        return self


class _Teacher(BaseModel):
    accuracy: Finite | None = None


class _Data(BaseModel):
    name: str
    classes: Count
    class_names: list[str] = []
    validation_images: Count


class _Gallery(BaseModel):
    tile_px: Count
    rhos: list[Finite] = Field(min_length=1)
    epochs: Count
    shown_rho: Count
    classes: list[str]
    patches: list[str]
    partners: list[list[str] | None]
    answers: list[list[str]]


class _Settings(BaseModel):
    ipc: Any
    factor: Any
    patch_px: Any
    image_size: Any
    recipe: Any
    student_steps: Any
    seeds: Any


class Summary(BaseModel):
    """The fields of summary.json that the page and the command's result show."""

    accuracy: dict[str, _Accuracy]
    ceiling: _Accuracy | None
    share_of_ceiling: dict[str, Finite]
    seconds: dict[str, Finite]
    images_per_s: dict[str, Finite | None]
    evals_per_image: dict[str, Any]
    compute: dict[str, dict[str, Finite]] = {}
    bytes: dict[str, dict[str, Count | None]]
    content_sha256: dict[str, str]
    skipped_images: dict[str, Count]
    students: dict[str, Students] = {}
    teacher: _Teacher
    data: _Data
    settings: _Settings
    notes: list[str]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _one_accuracy_per_class(self) -> Self:
        told = [each for students in self.students.values() for each in students.class_accuracies]
        if any(len(each) != len(self.data.class_names) for each in told):
            raise ValueError("expected an accuracy per class")
        return self


def write_report(run: Path) -> dict[str, Any]:
    """Write the report of a finished run.

    Every value of the summary is escaped. Raises FileNotFoundError if the run has no summary,
    RunError if it holds a link.
    """
    from ..run.folder import refuse_links  # torch

    refuse_links(run)
    path = run / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} has no {SUMMARY}: give the folder of a finished run, or finish it with --resume"
        )
    remedy = "finish the run again with --resume"
    summary = read_json(path, ReportError, remedy, Summary)
    teacher = {key: value for key, value in summary["teacher"].items() if key != "losses"}
    summary["notes"] += _warnings(run / LOG, summary["notes"])
    page = render_page(
        "page.html",
        **{**summary, "teacher": teacher},
        headline=_headline(summary),
        chart=_chart(summary),
        methods=_method_rows(summary),
        by_student=[
            (NAMES.get(method, method), *(f"{seed}: {value:.1f}" for seed, value in each))
            for method, each in _students(summary).items()
        ],
        by_class=_class_rows(summary),
        **_gallery(run / PICTURES),
        figures=_figures(run / PICTURES, [*summary["accuracy"], REAL]),
        run=run.resolve().name,
        costs=[
            (method, *(f"{each:,.6g}" for each in cost.values()))
            for method, cost in summary.get("compute", {}).items()  # older runs have none
        ],
        sizes=_size_rows(summary),
        stage_seconds=[(stage, f"{taken:.1f}") for stage, taken in summary["seconds"].items()],
    )
    replace_file(run / REPORT, page)
    return {"report": str(run / REPORT), "bytes": len(page)}


def render_page(template: str, **values: Any) -> bytes:
    """A page of this folder, in UTF-8. HTML is escaped; in Markdown the filter `cell` keeps a value
    to its cell of a table."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["plain"] = plain
    environment.filters["cell"] = lambda value: " ".join(plain(value).split()).replace("|", "\\|")
    page = environment.get_template(template).render(values)
    return page.encode(errors="backslashreplace")  # names of folders need not be UTF-8


def write_card(folder: Path, content: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write README.md of a publication; `summary` is the run's, of the published methods alone."""
    card = render_page(
        "card.jinja",
        **content,
        summary=summary,
        accuracies=accuracy_rows(summary),
        sizes=_size_rows(summary),
        pictures=sorted(path.name for path in (folder / PICTURES).iterdir()),
    )
    write_durably(folder / "README.md", card)


def _headline(summary: Mapping[str, Any]) -> str:
    """The method with the highest accuracy, what it reaches, and what it takes."""
    accuracy, shares = summary["accuracy"], summary["share_of_ceiling"]
    method = max(accuracy, key=lambda each: accuracy[each][0])
    share = f": {shares[method]:.0f} % of what fresh real images give" if method in shares else ""
    sizes = summary["bytes"].get(method, {})
    kept = f", from {_amount(sizes.get('without_labels'))} of images" if sizes else ""
    generator = sizes.get("generator")
    made = f" and a generator of {_amount(generator)}" if generator else ""
    return f"{method} {plus_minus(accuracy[method])} %{share}{kept}{made}"


def _students(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(seed, accuracy in percent) of every student; runs of older versions tell none."""
    return {
        method: list(zip(told["seeds"], told["accuracies"], strict=True))
        for method, told in summary.get("students", {}).items()
    }


def _class_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A class and the mean accuracy of each method's students on it, and a head; [] if unknown."""
    means: dict[str, list[float]] = {
        NAMES.get(method) or method: [
            fmean(students) for students in zip(*of_students, strict=True)
        ]
        for method, told in summary.get("students", {}).items()
        if (of_students := told.get("class_accuracies"))
    }
    if not means:
        return []
    rows = zip(summary["data"]["class_names"], *means.values(), strict=True)
    return [("class", *means), *((name, *(f"{each:.1f}" for each in row)) for name, *row in rows)]


def _chart(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A bar per method and for the ceiling, the highest first."""
    students, told = _students(summary), dict(summary["accuracy"])
    if summary["ceiling"] is not None:
        told[REAL] = summary["ceiling"]
    bars = [
        Bar("real" if name == REAL else "soft", NAMES.get(name, name), mean, std, [dots])
        for name, (mean, std) in told.items()
        for dots in ([value for _, value in students.get(name, ())],)
    ]
    return chart("Accuracy in percent by method", sorted(bars, key=lambda bar: -bar.mean))


def _warnings(log: Path, known: Sequence[str]) -> list[str]:
    """Warnings that the run printed, once each; a damaged line of its log has none."""
    found: dict[str, None] = {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        with suppress(ValueError, AttributeError):
            mark, _, said = str(json.loads(line).get("said")).partition("warning: ")
            if said and not mark:
                found[said[0].upper() + said[1:]] = None
    return [said for said in found if said not in known]


def _size_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (method, *(_amount(sizes.get(kind)) for kind in SIZES))
        for method, sizes in summary["bytes"].items()
    ]


def accuracy_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Method, mean ± std, share of the ceiling; the ceiling and the teacher come last."""
    shares = summary["share_of_ceiling"]
    rows = [
        (method, plus_minus(value), f"{shares[method]:.0f} %" if method in shares else "-")
        for method, value in summary["accuracy"].items()
    ]
    if summary["ceiling"] is not None:
        rows.append((NAMES[REAL], plus_minus(summary["ceiling"]), "100 %"))
    if summary["teacher"].get("accuracy") is not None:
        rows.append(("teacher", f"{summary['teacher']['accuracy']:.1f}", "-"))
    return rows


def plus_minus(value: Sequence[float | None] | None) -> str:
    """`40.6 ± 1.9`, or the mean alone for a single student; a dash without a mean."""
    if value is None or value[0] is None:
        return "–"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _method_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rates, evals = summary["images_per_s"], summary["evals_per_image"]
    return [
        (*row, str(evals.get(row[0], "-")), f"{rates[row[0]]:.1f}" if rates.get(row[0]) else "-")
        for row in accuracy_rows(summary)
    ]


def _amount(size_bytes: int | None) -> str:
    return "not known" if size_bytes is None else size(size_bytes)


def _gallery(folder: Path) -> dict[str, Any]:
    """The values that gallery.html takes; None for a run without expansions."""
    tiles, told = (folder / f"{GALLERY}.{ending}" for ending in ("webp", "json"))
    if not tiles.is_file() or not told.is_file():
        return {"gallery_told": None, "gallery_tiles": None}
    remedy = "remove it, and write the report again without the gallery"
    return {
        "gallery_told": read_json(told, ReportError, remedy, _Gallery),
        "gallery_tiles": base64.b64encode(tiles.read_bytes()).decode(),
    }


def _figures(folder: Path, methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, caption and base64 of each picture."""
    captions = dict(CAPTIONS)
    for method in methods:
        captions[f"rendered-{method}.png"] = (
            f"{NAMES.get(method, method)}: what students see of the same samples, before the crop."
        )
    return [
        (name, caption, base64.b64encode((folder / name).read_bytes()).decode())
        for name, caption in captions.items()
        if (folder / name).is_file()
    ]


def plain(value: Any) -> str:
    """A value of JSON as text; a dash for null."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "-" if value is None else str(value)
