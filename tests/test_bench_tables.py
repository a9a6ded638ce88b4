"""bench/tables.py writes the tables of bench/README.md and changes nothing else in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tables

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


def spread(p50: float) -> dict[str, float]:
    return {"p20": p50 - 1, "p50": p50, "p80": p50 + 1, "n": 5}


def expand_row(p50: float, batch: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "device": "card",
        "model": "sdxl-tiny",
        "weights": "pretrained",
        "size_px": 64,
        "batch": batch,
        "evals": 4,
        "images": 64,
        "threads": 2,
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "engines": {"ort": {"precision": "fp32"}},
        "spread": {"diffusers": spread(10), "ort": spread(p50)},
        "speedup_spread": {"ort": spread(p50 / 10)},
        "errors": {"ort": {"same": {"max_abs": 2e-6, "psnr_db": 130.0}}},
        **more,
    }


def test_readme_is_up_to_date() -> None:
    readme = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert tables.rendered(readme, tables.RESULTS) == readme, "run `make bench-table`"


def test_the_last_row_of_a_setting_is_shown(tmp_path: Path) -> None:
    alone = expand_row(77.0) | {"spread": {"diffusers": spread(77.0)}}
    counted = expand_row(
        30.0,
        batch=64,
        dirty=True,
        percent_of_roofline={"diffusers": 12.3, "ort": 36.7},
        roofline={"reached_tflops": {"fp32": 1.0}},
        peak_memory={"ort": {"torch_bytes": 1 << 20, "device_bytes": 3 << 20}},
    )
    (tmp_path / "card").mkdir()
    rows = [expand_row(20.0), counted, expand_row(21.0), alone]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "card" / "expand.jsonl").write_text(text)
    found = tables.rendered(MARKED, tmp_path)
    assert (
        "4 evals, 64 images of 10 classes, 2 threads; card (2026-01-02, commit abc, n = 5):"
        in found
    )
    assert "| ort | fp32 | 21 (20–22) | 2.10 (1.10–3.10) | 2.10 (1.10–3.10) | 2e-06 |" in found
    assert "commit abc-dirty, n = 5" in found
    assert "| 3.00 (2.00–4.00) | 3.00 (2.00–4.00) | 37 % | 3 MiB | 2e-06 |" in found
    assert "20 (19–21)" not in found
    assert "77" not in found
    assert "stale" not in found
    assert tables.rendered(found, tmp_path) == found
    for line in MARKED.splitlines():
        assert line == "| stale |" or line in found.splitlines()


def test_backends_in_processes_of_their_own_are_one_table(tmp_path: Path) -> None:
    def of_one(name: str, p50: float, slow: float, **more: Any) -> dict[str, Any]:
        return expand_row(0.0) | {
            "weights": "random",
            "engines": {},
            "errors": {},
            "spread": {"diffusers": spread(slow), name: spread(p50)},
            "speedup_spread": {name: spread(p50 / slow)},
            **more,
        }

    rows = [
        of_one("trt", 99.0, 10.0, commit="old"),
        of_one("eager", 30.0, 10.0),
        of_one("diffusers-compiled", 44.0, 11.0),
    ]
    (tmp_path / "card").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in [*rows, expand_row(50.0)])
    (tmp_path / "card" / "expand.jsonl").write_text(text)
    lines = tables.rendered(MARKED, tmp_path).splitlines()
    first = lines.index(next(line for line in lines if "with random weights" in line))
    assert lines[first + 4 : first + 8] == [
        "| diffusers | fp32 | 11 (10–12) |  |  |",
        "| eager | fp32 | 30 (29–31) | 3.00 (2.00–4.00) | 3.00 (2.00–4.00) |",
        "| diffusers-compiled | fp32 | 44 (43–45) | 4.00 (3.00–5.00) |  |",
        "",
    ]
    assert (
        "| ort | fp32 | 50 (49–51) | 5.00 (4.00–6.00) | 5.00 (4.00–6.00) | 2e-06 |" in lines
    )  # other weights, so another table


def test_precisions_are_told_apart(tmp_path: Path) -> None:
    """A GPU's row: bf16 against diffusers in fp16, in bf16, and with an fp32 VAE."""
    names = ("diffusers", "diffusers-upcast", "diffusers-bf16", "eager-bf16")
    row = expand_row(0.0, sm_count=132) | {
        "spread": {name: spread(10) for name in names},
        "speedup_spread": {"eager-bf16": spread(4)},
        "speedup_over": {
            name: {"eager-bf16": spread(4 + n)} for n, name in enumerate(names) if "d" in name
        },
        "precision": dict(zip(names, ("fp16", "fp16", "bf16", "bf16"), strict=True)),
        "vae_precision": dict(zip(names, ("fp16", "fp32", "bf16", "bf16"), strict=True)),
        "engines": {"eager-bf16": {"precision": "bf16"}},
        "errors": {"eager-bf16": {"same": {"max_abs": 0.1, "psnr_db": 44.0}}},
    }
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "expand.jsonl").write_text(json.dumps(row) + "\n")
    lines = tables.rendered(MARKED, tmp_path).splitlines()
    assert (
        "| backend | precision | images/s | × diffusers (fp16) | × diffusers, same precision "
        "| × diffusers, VAE in fp32 | error of pictures |"
    ) in lines
    ours = "| eager-bf16 | bf16 | 10 (9–11) | 4.00 (3.00–5.00) | 6.00 (5.00–7.00) "
    assert f"{ours}| 5.00 (4.00–6.00) | 44 dB |" in lines
    assert "| diffusers-upcast | fp16, VAE fp32 | 10 (9–11) |  |  |  |  |" in lines


@pytest.mark.parametrize("changed", [{"images": 128}, {"classes": 2}, {"threads": 1}])
def test_other_work_is_another_table(tmp_path: Path, changed: dict[str, int]) -> None:
    (tmp_path / "card").mkdir()
    rows = [expand_row(20.0), expand_row(30.0, **changed), expand_row(21.0, classes=10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "card" / "expand.jsonl").write_text(text)
    found = tables.rendered(MARKED, tmp_path)
    assert found.count("| backend |") == 2
    assert "21 (20–22)" in found
    assert "30 (29–31)" in found


def test_a_missing_marker_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected <!-- bench:score --> and .* once"):
        tables.rendered(MARKED.replace("<!-- /bench:score -->", ""), tmp_path)
