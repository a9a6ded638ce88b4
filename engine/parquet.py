"""A coreset as Parquet files that Hugging Face datasets opens: `load_dataset(OUT)["train"]`.

    image        {bytes: the patch's PNG, path}, which datasets decodes to an image
    label        int64, a ClassLabel whose names are the class ids in order
    class_name   for prompts and people
    sample       int64: the row of the coreset that labels and noise know it by
    logits                     dense soft labels, fp16 [E][K]
    probabilities, classes     top-k ones, fp16 and int16 [E][k]

The features are in the files' metadata, as datasets writes them itself. Row groups take about
GROUP_BYTES of soft labels or GROUP_ROWS rows; nothing larger is in memory. Needs pyarrow, of which
one version gives the same bytes for the same coreset.

Legend: N samples, E epochs, K classes, k kept probabilities, B rows of a group.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..export.models import Unavailable
from .coreset import Coreset
from .manifest import patch_files
from .soft_labels import SoftLabels

GROUP_ROWS = 100
GROUP_BYTES = 2**26
_PARTS = {"logits": "float16", "probabilities": "float16", "classes": "int16"}


def write_parquet(coreset: Coreset, labels: SoftLabels | None, folder: Path) -> dict[str, Any]:
    """Write `folder`/data/train-00000-of-00001.parquet; what is told of it.

    Unavailable when pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    schema = _schema(pa, coreset, labels)
    rows = _rows(coreset)
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    with pq.ParquetWriter(path, schema, compression="none", store_schema=True) as writer:
        for first in range(0, len(rows), _group_rows(labels)):
            group = rows[first : first + _group_rows(labels)]
            columns = _columns(pa, coreset, group)
            if labels is not None:
                samples = [row["sample"] for row in group]
                for name, values_EBk in labels.every_epoch(samples).items():
                    columns[name] = _nested(pa, values_EBk.transpose(1, 0, 2))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))
    return {"split": "train", "samples": len(rows)}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Unavailable(
            "--to parquet needs pyarrow, which is not installed: pip install 'patchbloom[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


def _rows(coreset: Coreset) -> list[dict[str, Any]]:
    """What a row says, in sample order, but for the pixels and the labels."""
    named = [
        {"file": file, "label": entry["index"], "class_name": entry["name"]}
        for entry in coreset.manifest["classes"]
        for file in patch_files(entry["id"], entry["patches"])
    ]
    return [{**row, "sample": sample} for sample, row in enumerate(named)]


def _group_rows(labels: SoftLabels | None) -> int:
    if labels is None:
        return GROUP_ROWS
    bytes_each = labels.epochs * (4 * labels.k if labels.k else 2 * labels.classes)
    return max(1, min(GROUP_ROWS, GROUP_BYTES // bytes_each))


def _schema(pa: Any, coreset: Coreset, labels: SoftLabels | None) -> Any:
    fields = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "label": pa.int64(),
        "class_name": pa.string(),
        "sample": pa.int64(),
    }
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(coreset.class_ids), "_type": "ClassLabel"},
        "class_name": {"dtype": "string", "_type": "Value"},
        "sample": {"dtype": "int64", "_type": "Value"},
    }
    for name in () if labels is None else labels.parts:
        kind = _PARTS[name]
        fields[name] = pa.list_(pa.list_(pa.float16() if kind == "float16" else pa.int16()))
        each = {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"}
        features[name] = {"feature": each, "_type": "List"}
    told = json.dumps({"info": {"features": features}})
    return pa.schema(list(fields.items()), metadata={"huggingface": told})


def _columns(pa: Any, coreset: Coreset, group: list[dict[str, Any]]) -> dict[str, Any]:
    images = [
        {"bytes": (coreset.folder / row["file"]).read_bytes(), "path": row["file"]} for row in group
    ]
    columns = {name: [row[name] for row in group] for name in ("label", "class_name", "sample")}
    return {"image": images, **columns}


def _nested(pa: Any, values_BEk: np.ndarray) -> Any:
    """[B, E, k] as B lists of E lists."""
    rows, epochs, kept = values_BEk.shape
    flat = pa.array(np.ascontiguousarray(values_BEk).reshape(-1))
    inner = pa.ListArray.from_arrays(np.arange(rows * epochs + 1, dtype=np.int32) * kept, flat)
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * epochs, inner)
