"""README's tables are those of the results, and nothing else of README is touched."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MARKED = """# Title
before
<!-- bench:expand -->
| stale |
<!-- /bench:expand -->
between
<!-- bench:score -->
<!-- /bench:score -->
after
"""


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("tables")


def spread(p50: float) -> dict[str, float]:
    return {"p20": p50 - 1, "p50": p50, "p80": p50 + 1, "n": 5}


def expand_row(p50: float, batch: int = 32, **more: Any) -> dict[str, Any]:
    engine = {"model": "sdxl-tiny", "size_px": 64, "batch": batch, "evals": 4, "precision": "fp32"}
    return {
        "device": "card",
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "engines": {"ort": engine},
        "spread": {"diffusers": spread(10), "ort": spread(p50)},
        "speedup_spread": {"ort": spread(p50 / 10)},
        "errors": {"ort": {"same": {"max_abs": 2e-6, "psnr_db": 130.0}}},
        **more,
    }


def test_readme_is_up_to_date(tables: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.rendered(readme, tables.RESULTS) == readme, "run `make bench-table`"


def test_the_last_row_of_a_setting_is_shown(tables: ModuleType, tmp_path: Path) -> None:
    no_engine = expand_row(77.0) | {"engines": {}}
    counted = expand_row(
        30.0,
        batch=64,
        dirty=True,
        percent_of_roofline={"diffusers": 12.3, "ort": 36.7},
        peak_memory={"ort": {"torch_bytes": 1 << 20, "device_bytes": 3 << 20}},
    )
    (tmp_path / "card").mkdir()
    rows = [expand_row(20.0), counted, expand_row(21.0), no_engine]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "card" / "expand.jsonl").write_text(text)
    found = tables.rendered(MARKED, tmp_path)
    assert "`sdxl-tiny`, 64 px, batch 32, 4 evals; card (2026-01-02, commit abc, n = 5):" in found
    assert "| ort | 21 (20–22) | 2.10 (1.10–3.10) | 2e-06 |" in found
    assert "commit abc-dirty, n = 5" in found
    assert "| ort | 30 (29–31) | 3.00 (2.00–4.00) | 37 % | 3 MiB | 2e-06 |" in found
    assert "20 (19–21)" not in found
    assert "77" not in found
    assert "stale" not in found
    assert tables.rendered(found, tmp_path) == found
    for line in MARKED.splitlines():
        assert line == "| stale |" or line in found.splitlines()


def test_a_missing_marker_is_said(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected <!-- bench:score --> and .* once"):
        tables.rendered(MARKED.replace("<!-- /bench:score -->", ""), tmp_path)
