"""RUN/report.html: one self-contained page, made of RUN/summary.json and RUN/pictures/*.png."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...export.durable import replace_file

SUMMARY, REPORT, PICTURES = "summary.json", "report.html", "pictures"
CAPTIONS = {
    "coreset.png": "The coreset: patches of the first classes, a row each, pixels kept square.",
    "expansions.png": "The same patches, a column each, expanded with more and more noise.",
    "curves.png": "Training curves.",
}
RENDERED = "rendered-*.png"  # one per method
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 1.2rem } th, td { padding: .25rem .8rem;
       border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.text { text-align: left } td.text { word-break: break-word }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption, .note { color: #555 }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto }
"""


def write_report(run: Path) -> dict[str, Any]:
    """Write the report of a finished run; FileNotFoundError when there is no summary in it."""
    path = run / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} has no {SUMMARY}: give the folder of a finished run, or finish it with --resume"
        )
    page = render(json.loads(path.read_text()), run / PICTURES).encode()
    replace_file(run / REPORT, page)
    return {"report": str(run / REPORT), "bytes": len(page)}


def render(summary: Mapping[str, Any], pictures: Path) -> str:
    """The page; every value of the summary is escaped."""
    title = _text(f"patchbloom: {summary['data']['name']}")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f"<p>{_headline(summary)}</p>",
        "<h2>Accuracy</h2>",
        _methods_table(summary),
        *(f"<p class='note'>{_text(note)}</p>" for note in summary["notes"]),
        "<h2>Pictures</h2>",
        *_figures(pictures),
        "<h2>Bytes</h2>",
        _bytes_table(summary),
        "<h2>Seconds per stage</h2>",
        _table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in summary["seconds"].items()]),
        "<h2>Settings</h2>",
        _pairs(summary["settings"]),
        "<h2>Teacher</h2>",
        _pairs({key: value for key, value in summary["teacher"].items() if key != "losses"}),
        "<h2>Provenance</h2>",
        _pairs(summary["provenance"]),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def accuracy_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """method, mean ± std, share of the ceiling; the ceiling and the teacher last."""
    shares = summary["share_of_ceiling"]
    rows = [
        (method, mean_and_std(value), f"{shares[method]:.0f} %" if method in shares else "-")
        for method, value in summary["accuracy"].items()
    ]
    if summary["ceiling"] is not None:
        rows.append(("fresh real images (ceiling)", mean_and_std(summary["ceiling"]), "100 %"))
    if summary["teacher"].get("accuracy") is not None:
        rows.append(("teacher", f"{summary['teacher']['accuracy']:.1f}", "-"))
    return rows


def mean_and_std(value: Sequence[float | None]) -> str:
    """`40.6 ± 1.9`; the mean alone when there was one student."""
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _headline(summary: Mapping[str, Any]) -> str:
    settings, data = summary["settings"], summary["data"]
    return _text(
        f"{data['classes']} classes, {settings['ipc']} image(s) per class as {settings['factor']}² "
        f"patches of {settings['patch_px']} px; {settings['image_size']} px; recipe "
        f"{settings['recipe']}; {settings['student_steps']} steps of every student; "
        f"{settings['seeds']} student(s) per method, "
        f"{settings.get('targets', 'soft')} targets. Accuracy in percent, of the last epoch, on "
        f"all {data['validation_images']} validation images."
    )


def _methods_table(summary: Mapping[str, Any]) -> str:
    rates, evals = summary["images_per_s"], summary["evals_per_image"]
    heads = ("method", "accuracy", "share of ceiling", "evals per image", "images/s in training")
    rows = []
    for name, accuracy, share in accuracy_rows(summary):
        rate = rates.get(name)
        rows.append(
            (name, accuracy, share, str(evals.get(name, "-")), f"{rate:.1f}" if rate else "-")
        )
    return _table(heads, rows)


def _bytes_table(summary: Mapping[str, Any]) -> str:
    kinds = ("without_labels", "labels", "with_labels", "generator", "with_generator")
    rows = [
        (method, *(_amount(sizes.get(kind)) for kind in kinds))
        for method, sizes in summary["bytes"].items()
    ]
    return _table(("method", *(kind.replace("_", " ") for kind in kinds)), rows)


def _amount(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "not known"
    return f"{size_bytes / 1024:.1f} KiB" if size_bytes < 2**20 else f"{size_bytes / 2**20:.1f} MiB"


def _figures(folder: Path) -> list[str]:
    figures = []
    captions = dict(CAPTIONS)
    for path in sorted(folder.glob(RENDERED)):
        method = path.stem.removeprefix("rendered-")
        captions[path.name] = f"{method}: what its students see of the same samples, three epochs."
    for name, caption in captions.items():
        if (folder / name).is_file():
            inlined = base64.b64encode((folder / name).read_bytes()).decode()
            figures.append(
                f"<figure><img alt='{_text(name)}' src='data:image/png;base64,{inlined}'>"
                f"<figcaption>{_text(caption)}</figcaption></figure>"
            )
    return figures


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td class='text'>{_text(_plain(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>{rows}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "-" if value is None else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))
