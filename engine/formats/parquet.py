"""A coreset as Parquet files that Hugging Face datasets opens: `load_dataset(OUT)["train"]`.

    image        {bytes: the patch's PNG, path}, which datasets decodes to an image
    doped        bool: a real image that doping added, of its own size, and not a patch
    label        int64, a ClassLabel whose names are the class ids in order
    class_name   for prompts and people
    logits                     soft labels as logits, fp16 [A][K]
    probabilities, classes     top-k soft labels, fp16 and int16 [A][k]
    views                      the view of each label, int32 [A][3]: sample, epoch, variant

`--to hf` adds CARD, so that the folder is a data set for the hub too (`hf upload USER/NAME OUT
--repo-type dataset`); it names no licence, as the coreset knows none.

The features are in the files' metadata, as datasets itself writes them. Row groups take about
GROUP_BYTES of soft labels or GROUP_ROWS rows; nothing larger is in memory. Needs pyarrow; the same
coreset and pyarrow version give the same bytes.

Legend: A labels per image (coreset/shown.py), K classes, k kept probabilities, R labels per group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...export.durable import write_durably
from ...export.models import Unavailable
from ..coreset.coreset import Coreset
from ..coreset.shown import StoredImage, stored_images
from ..labels.stored import SoftLabels

GROUP_ROWS = 100
GROUP_BYTES = 2**26
_PARTS = {"logits": "float16", "probabilities": "float16", "classes": "int16", "views": "int32"}

CARD = """---
tags: [patchbloom]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# {images} images of {classes} classes, method {method}

```python
rows = datasets.load_dataset("FOLDER or USER/NAME", split="train")
```

Each row has `image`, `label` (its names are the class ids), `class_name` and `doped`{labels}.
`export.json` has the coreset's sha256, its classes and settings, and the hash of every file.
"""


def write_data_set(coreset: Coreset, labels: SoftLabels | None, folder: Path) -> dict[str, Any]:
    """`write_parquet`, with a card in `folder`/README.md."""
    summary = write_parquet(coreset, labels, folder)
    parts = "" if labels is None else f", and soft labels: {', '.join((*labels.parts, 'views'))}"
    card = CARD.format(
        images=len(coreset.labels_N) + len(coreset.class_ids) * coreset.doped_per_class,
        classes=len(coreset.class_ids),
        method=coreset.settings["method"],
        labels=parts,
    )
    write_durably(folder / "README.md", card.encode())
    return summary


def write_parquet(coreset: Coreset, labels: SoftLabels | None, folder: Path) -> dict[str, Any]:
    """Write `folder`/data/train-00000-of-00001.parquet; returns its entries for export.json.

    Raises Unavailable when pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    schema = _schema(pa, coreset, labels)
    images, most = stored_images(coreset, labels), _group_rows(coreset, labels)
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    with pq.ParquetWriter(path, schema, compression="none", store_schema=True) as writer:
        while group := list(islice(images, most)):
            columns = _columns(coreset.folder, group)
            if labels is not None:
                columns |= _label_columns(pa, group, labels)
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))
    return {"split": "train"}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Unavailable(
            "--to parquet or hf needs pyarrow, which is not installed: pip install "
            "'patchbloom[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


def _group_rows(coreset: Coreset, labels: SoftLabels | None) -> int:
    if labels is None:
        return GROUP_ROWS
    images = len(coreset.labels_N) + len(coreset.class_ids) * coreset.doped_per_class
    bytes_all = labels.epochs * labels.samples * labels.answer_bytes
    return max(1, min(GROUP_ROWS, GROUP_BYTES * images // bytes_all))


def _schema(pa: Any, coreset: Coreset, labels: SoftLabels | None) -> Any:
    fields = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "label": pa.int64(),
        "class_name": pa.string(),
        "doped": pa.bool_(),
    }
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(coreset.class_ids), "_type": "ClassLabel"},
        "class_name": {"dtype": "string", "_type": "Value"},
        "doped": {"dtype": "bool", "_type": "Value"},
    }
    for name in () if labels is None else (*labels.parts, "views"):
        kind = _PARTS[name]
        fields[name] = pa.list_(pa.list_(pa.type_for_alias(kind)))
        each = {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"}
        features[name] = {"feature": each, "_type": "List"}
    info = json.dumps({"info": {"features": features}})
    return pa.schema(list(fields.items()), metadata={"huggingface": info})


def _columns(folder: Path, group: list[StoredImage]) -> dict[str, Any]:
    return {
        "image": [
            {"bytes": (folder / image.file).read_bytes(), "path": image.file} for image in group
        ],
        "label": [image.class_index for image in group],
        "class_name": [image.class_name for image in group],
        "doped": [image.doped for image in group],
    }


def _label_columns(pa: Any, group: list[StoredImage], labels: SoftLabels) -> dict[str, Any]:
    views_R3 = np.concatenate([image.views_A3 for image in group])
    parts = {**labels.answers(views_R3[:, 1], views_R3[:, 0]), "views": views_R3}
    counts = [len(image.views_A3) for image in group]
    return {name: _nested(pa, values_Rk, counts) for name, values_Rk in parts.items()}


def _nested(pa: Any, values_Rk: np.ndarray, counts: Sequence[int]) -> Any:
    """[R, k] as a list of rows per image; `counts`: rows of each image."""
    rows, kept = values_Rk.shape
    flat = pa.array(np.ascontiguousarray(values_Rk).reshape(-1))
    inner = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * kept, flat)
    return pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), inner)
