"""The report in a real browser: the gallery, sortable tables, accessibility, no request outside."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from golden_cases import unpack
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.train.report.gallery import draw_gallery
from patchbloom.train.report.page import REPORT, write_report

AXE = Path(__file__).parents[1] / ".browser" / "axe.min.js"
TILE = "document.querySelectorAll('#gallery button.tile')[1]"


class Expander:
    """Pictures whose grey says what was asked for."""

    def __init__(self, rho: float = 0.8, mixup: bool = True) -> None:
        self.config = ExpandConfig(size_px=32, rho=rho, mixup=mixup)

    def varied(self, **changes):
        return Expander(**changes)

    def expand(self, samples, epoch):
        greys = [self.config.rho - 0.1 * self.config.mixup - 0.02 * each for each in epoch]
        return torch.tensor(greys)[:, None, None, None].expand(-1, 3, 32, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    unpack("runs", folder)
    run = folder / "topk"
    coreset = open_coreset(run / "coreset")
    classes = len(coreset.class_ids)
    answers = torch.eye(classes) * 9
    teacher = types.SimpleNamespace(
        device="cpu", logits_from_uint8=lambda pixels: answers[: len(pixels)]
    )
    (run / "pictures").mkdir()
    firsts = [coreset.labels_N.tolist().index(label) for label in range(classes)]
    draw_gallery(run, Expander(), coreset, firsts, teacher)  # pyright: ignore
    write_report(run)
    return run


def test_the_gallery_tells_what_every_tile_is(run: Path) -> None:
    told = json.loads((run / "pictures" / "gallery.json").read_text())
    assert told["rhos"] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert told["shown_rho"] == 3
    rows = 1 + 2 * 3 * len(told["rhos"])
    assert len(told["answers"]) == len(told["partners"]) == rows
    assert [row is not None for row in told["partners"][1:7]] == [False] * 3 + [True] * 3
    assert told["answers"][0][1].startswith(f"{told['classes'][1]} 100 %, ")
    assert told["patches"][0].split(",")[0].endswith((".png", ".jpg"))


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: run make setup-browser"
)


@needs_chromium
@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: run make setup-browser")
def test_axe_finds_nothing_that_keeps_people_out(run: Path) -> None:
    with Browser(run / REPORT, 390, dark=True) as page:
        page.run(AXE.read_text() + ";0")
        found = json.loads(page.run("axe.run().then(told => JSON.stringify(told.violations))"))
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


@needs_chromium
@pytest.mark.parametrize(("width_px", "dark"), [(390, True), (1440, False)])
def test_the_page_in_a_browser(run: Path, width_px: int, dark: bool) -> None:
    with Browser(run / REPORT, width_px, dark=dark) as page:
        before = page.run(f"getComputedStyle({TILE}).backgroundPosition")
        side = json.loads((run / "pictures" / "gallery.json").read_text())["tile_px"]
        assert before == f"-{side}px -{(1 + 6 * 3) * side}px"  # rho 0.8, no mixup, epoch 0
        page.run("document.querySelector('[name=rho]').focus()")
        key = {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37}
        page.call("Input.dispatchKeyEvent", type="keyDown", **key)
        page.run("document.querySelector('[name=mixup]').click()")
        page.run("document.querySelector('[name=epoch]').click()")
        after = page.run(f"getComputedStyle({TILE}).backgroundPosition")
        assert after == f"-{side}px -{(1 + 6 * 2 + 3 + 1) * side}px"
        page.run(f"{TILE}.click()")
        status = page.run("document.querySelector('#gallery [role=status]').textContent")
        assert ", rho 0.6, epoch 1, from " in status
        assert ", mixed with " in status
        page.run("document.querySelectorAll('th button')[1].click()")
        rows = page.run("[...document.querySelector('tbody').rows].map(r => r.cells[1].innerText)")
        numbers = [float(row.split()[0]) for row in rows]
        assert numbers == sorted(numbers, reverse=True)
        assert page.run("document.documentElement.scrollWidth") <= width_px
        assert page.told("Runtime.exceptionThrown") == page.told("Log.entryAdded") == []
        asked = [each["request"]["url"] for each in page.told("Network.requestWillBeSent")]
        assert asked[0] == (run / REPORT).as_uri()
        assert all(url.startswith("data:") for url in asked[1:])
