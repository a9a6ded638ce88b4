"""`import patchbloom`: its examples, what it costs, what it refuses; `patchbloom` as a command."""

from __future__ import annotations

import ast
import doctest
import gc
import json
import os
import re
import subprocess
import sys
import weakref
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import patchbloom
import pytest
import torch
from patchbloom import Coreset
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.expand.expander import Expander
from PIL import Image, ImageChops
from student_cases import Sets, new_sets, train, untrained_teacher, upsampled
from torch import nn

SCRIPT = Path(__file__).with_name("researcher.py")
TOUR = SCRIPT.parent.parent / "docs" / "tour.ipynb"
PUBLIC = ("Coreset", "open", "select", "evaluate", "model_entry")


@pytest.fixture(scope="module")
def folder(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: data, and a coreset in runs/demo/coreset."""
    here = tmp_path_factory.mktemp("public")
    (here / "data").symlink_to(shapes)
    patchbloom.select(shapes, ipc=1, out=here / "runs/demo/coreset", device="cpu").close()
    return here


@pytest.fixture(scope="module")
def core(folder: Path) -> Coreset:
    return patchbloom.open(folder / "runs/demo/coreset", device="cpu", backend="eager")


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=False, recurse=False)
    members = [member for member in vars(Coreset).values() if hasattr(member, "__doc__")]
    found = [*finder.find(patchbloom, "patchbloom")]
    for name in PUBLIC:
        found += finder.find(getattr(patchbloom, name), name, module=False)
    for member in members:
        if callable(member) and not member.__name__.startswith("_"):
            found += finder.find(member, f"Coreset.{member.__name__}", module=False)
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_the_example_of_every_public_name_runs(
    example: doctest.DocTest, core: Coreset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if example.name not in ("Coreset.close",):
        assert example.examples
    monkeypatch.chdir(folder)
    example.globs = {"patchbloom": patchbloom, "torch": torch, "core": core, "__name__": "me"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    told: list[str] = []
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


def test_every_public_name_is_there_and_no_other() -> None:
    assert {*patchbloom.__all__} == {*PUBLIC, "__version__"}
    assert {*patchbloom.__all__} <= {*dir(patchbloom)}
    with pytest.raises(AttributeError, match="'patchbloom' has no attribute 'expand'"):
        patchbloom.expand  # noqa: B018


def test_the_import_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "import patchbloom\n"
        "taken = time.process_time() - began\n"
        "assert patchbloom.__version__[0].isdigit()\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers'} & {*sys.modules}\n"
        "print(taken < 0.1 or taken, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True set()\n", "")


def test_the_readmes_first_example_runs(folder: Path, tmp_path: Path, monkeypatch) -> None:
    text = (SCRIPT.parent.parent / "README.md").read_text()
    (example,) = [
        part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "rule=" in part
    ]
    for name in ("data", "runs"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["mine"].settings["selection"] == "readme:most_contrast"
    assert len([*tmp_path.glob("star-[0-7].png")]) == 8
    namespace["core"].close()


def test_a_researchers_script_runs_on_public_names(folder: Path, tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 30
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["torch"]
    (tmp_path / "data").symlink_to(folder / "data")
    command = [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    accuracy, words = done.stdout.split(" % ")
    assert 0 <= float(accuracy) <= 100
    assert words.startswith("with ")
    assert len([*tmp_path.glob("star-0.[48]-[0-7].png")]) == 16
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["settings"]["selection"] == "__main__:most_contrast"
    assert manifest["teacher"] is None


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, and what Jupyter would show of it, without a kernel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "tour"}
    shown = []
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                named = getattr(node, "module", None) or node.names[0].name
                assert named in ("matplotlib.pyplot", "patchbloom", "torch"), named
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, TOUR.name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), TOUR.name, "eval"), namespace))
    assert [type(each) for each in shown if each is not None] == [Coreset, *[Image.Image] * 2]
    drawn = [place.images[0].get_array().shape for place in namespace["axes"].flat]
    assert drawn == ([(32, 32, 3)] + [(64, 64, 3)] * 8) * 2
    assert namespace["mine"].settings["selection"] == "tour:most_contrast"
    assert 15 < namespace["accuracy"] <= 100  # 10 by chance
    assert [path.name for path in tmp_path.glob("cache/*/shapes-*")] == ["shapes-1-60"]
    namespace["plt"].close("all")
    namespace["core"].close()


def test_the_tour_is_small_and_keeps_two_pictures() -> None:
    assert TOUR.stat().st_size < 300 * 1024
    cells = json.loads(TOUR.read_text())["cells"]
    kept = [output for cell in cells for output in cell.get("outputs", ())]
    pictures = [picture for output in kept for picture in output["data"].values()]
    assert all(Image.open(BytesIO(b64decode(picture))).size[0] > 300 for picture in pictures)
    assert len(kept) == len(pictures) == 2
    assert {cell.get("execution_count") for cell in cells} == {None}


def test_variants_are_the_epochs_that_a_student_sees_in_one_call(core: Coreset) -> None:
    calls: list[tuple[int, ...]] = []
    expander = core._opened[0]
    denoise = expander.backend.denoise

    def watched(x_BCHW, *others):
        calls.append(tuple(len(each) for each in (x_BCHW, *others)))
        return denoise(x_BCHW, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expander.backend, "denoise", watched)
        images = core.expand("star", 2, variants=5, epoch=3)
        few = core.expand("star", 2, variants=2, epoch=3, rho=0.4)
        assert calls == [(5, 1, 1, 1)] * 4 + [(2, 1, 1, 1)] * 2
        core.expand("star", 0, variants=expander.spec.batch + 1)
        half = expander.spec.batch // 2 + 1
        assert calls[6:] == [(half, 1, 1, 1)] * 8
    row = core.class_ids.index("star") * 4 + 2
    for number, image in enumerate(images):
        (expected,) = expander.expand([row], 3 + number)
        shown = (expected.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
        difference = np.abs(np.asarray(image).astype(float) - shown.numpy())
        assert difference.max() < 0.51  # 8-bit rounding, and that of another batch
    assert ImageChops.difference(images[0], images[1]).getbbox()
    assert ImageChops.difference(images[0], few[0]).getbbox()
    assert len(core.expand("star", 2)) == 1


def test_a_static_engine_pads_the_variants_and_makes_the_same(core: Coreset) -> None:
    expander = core._opened[0]
    eager = expander.variants(7, [4, 0, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expander.backend, "name", "static")
        padded = expander.variants(7, [4, 0, 9])
    torch.testing.assert_close(padded, eager, rtol=0, atol=1e-4)


def test_the_model_is_opened_once_and_freed(folder: Path, monkeypatch) -> None:
    closed: list[Expander] = []
    close = Expander.close
    monkeypatch.setattr(Expander, "close", lambda self: (closed.append(self), close(self)))
    with patchbloom.open(folder / "runs/demo/coreset", device="cpu") as core:
        before = core.expand("disc", 1)[0].tobytes()
        first = core._opened[0]
        assert core._opened[0] is first
    assert closed == [first]
    assert core.expand("disc", 1)[0].tobytes() == before  # opened again
    gone = weakref.ref(core)
    del core
    gc.collect()
    assert gone() is None
    assert len(closed) == 2


def test_a_coreset_is_a_mapping_of_patches(core: Coreset) -> None:
    stored = open_coreset(core.folder)
    patches_NHWC = stored.patches()[stored.labels_N == 3].numpy()
    name = list(core)[3]
    assert all(
        np.array_equal(np.asarray(patch), pixels)
        for patch, pixels in zip(core[name], patches_NHWC, strict=True)
    )
    assert "nothing" not in core
    assert isinstance(core.show(2), Image.Image)
    assert len(repr(core)) < 200
    assert patchbloom.open(core.folder.parent).folder == core.folder


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda core: core["sta"], "class 'sta' is unknown: perhaps star"),
        (lambda core: core.expand("star", 4), "patch 4: expected 0 to 3, the patches of a class"),
        (lambda core: core.expand("star", -1), "patch -1: expected 0 to 3"),
        (lambda core: core.expand("star", 0, variants=0), "variants 0, epoch 0: expected 1 or"),
        (lambda core: core.expand("star", 0, roh=0.4), "option 'roh' is unknown: perhaps rho"),
        (lambda core: core.expand("star", 0, rho=0.1), "rho"),
        (lambda core: core.loader(batch_size=4), "option 'batch_size' is unknown: perhaps batch"),
        (lambda core: core.loader(), "ExpandedLoader needs batch, the images per step"),
        (lambda core: core.loader(batch=4), "holds no soft labels"),
        (lambda core: patchbloom.open("hf:mine"), "hf:mine: expected hf:USER/NAME"),
        (lambda core: patchbloom.open("nowhere"), "nowhere is not a coreset: no such folder"),
        (lambda core: patchbloom.open(core.folder, devise="cpu"), "unknown: perhaps device"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(core: Coreset, call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        call(core)
    assert "\n" not in str(error.value)


def test_a_rule_with_a_teacher_sees_its_features_and_losses(shapes: Path, tmp_path: Path) -> None:
    seen_by: list[tuple[Any, ...]] = []

    def rule(features_CD, losses_C, count):
        seen_by.append((features_CD.shape, features_CD.dtype, (np.diff(losses_C) >= 0).all()))
        return [5, 0, 3, 1][:count]

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, 10)).train()
    core = patchbloom.select(
        shapes, ipc=1, rule=rule, teacher=teacher, model=None, size_px=64, out=tmp_path / "mine"
    )
    assert seen_by == [((6, 192), np.float32, True)] * 10
    assert core.manifest["teacher"]["architecture"] == "Sequential"
    assert core.settings["selection"].endswith("rule")
    assert (core.settings["method"], core.manifest["model"]) == ("upsample", None)
    assert teacher.training
    assert next(teacher.parameters()).requires_grad
    losses = [each["loss"] for each in core.manifest["provenance"]["patches"]][:4]
    assert losses[1] <= losses[3] <= losses[2] <= losses[0]
    with core.loader(batch=20, teacher=teacher, device="cpu") as loader:
        images, labels = next(iter(loader))
    assert images.shape == (20, 3, 64, 64)
    torch.testing.assert_close(labels.sum(1), torch.ones(20))
    with pytest.raises(CoresetError, match="expected a coreset that a model expands, got one of"):
        core.expand("star", 0)


@pytest.mark.parametrize(
    "picks", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 3], [0, 1, 2, 6], [0.0, 1.0, 2.0, 3.0], 4]
)
def test_a_rule_that_returns_something_else_is_refused(
    picks: Any, shapes: Path, tmp_path: Path
) -> None:
    def mine(*_):
        return picks

    with pytest.raises(ValueError, match=r"mine: expected 4 different indices from 0 to 5, got"):
        patchbloom.select(shapes, ipc=1, rule=mine, out=tmp_path / "mine", device="cpu")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rule": "k-center"}, "rule 'k-center' needs a teacher"),
        ({"rule": "k-centre"}, "rule 'k-centre' is unknown: perhaps k-center"),
        ({"factor": 3}, "factor 3: expected a divisor of the image size, 64 px"),
        ({"ipc": 2}, "expected at least 8 images in every class"),
        ({"out": "."}, "is not empty"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(
    options: dict[str, Any], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=told):
        patchbloom.select("data", **{"ipc": 1, "out": "new", "device": "cpu", **options})
    assert not (folder / "new").exists()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return new_sets(tmp_path_factory.mktemp("sets") / "s")


def test_evaluate_gives_the_accuracy_of_the_run(sets: Sets, tmp_path: Path) -> None:
    from patchbloom.train.labels.targets import OnlineLabels

    labels = OnlineLabels(untrained_teacher(sets), 4.0)
    (result,) = train(upsampled(sets), labels, sets, tmp_path, seeds=[0])
    data = sets[1].root.parent
    assert patchbloom.evaluate(result.path, data, device="cpu") == result.accuracy
    network = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 32 * 32, 9))
    with pytest.raises(ValueError, match=r"expected logits \[20, 10\] for the classes of"):
        patchbloom.evaluate(network, data, size_px=32)
    assert network.training
    with pytest.raises(ValueError, match="evaluate needs size_px"):
        patchbloom.evaluate(network, data)
    with pytest.raises(FileNotFoundError, match="no such file; give one of RUN/students"):
        patchbloom.evaluate("nothing", data)
    (tmp_path / "x").mkdir()
    untrained_teacher(sets).save(tmp_path / "x" / "teacher.safetensors")
    with pytest.raises(ValueError, match="is no student of a run"):
        patchbloom.evaluate(tmp_path / "x" / "teacher.safetensors", data)
    (data / "val" / "disc").rename(data / "val" / "disk")
    with pytest.raises(ValueError, match=r"expected its 10 classes \(bars, …\) in"):
        patchbloom.evaluate(result.path, data)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "patchbloom", *words], capture_output=True, text=True
    )


def test_the_command_is_the_two_short_ones() -> None:
    for word, begins in (
        (["--version"], f"{patchbloom.__version__}\n"),
        ([], "usage: patchbloom {train,engine}"),
        (["train", "student", "--help"], "usage: train student"),
        (["engine", "--help"], "usage: engine"),
    ):
        done = run(*word)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(begins)
    done = run("engine", "info", "any", "--bundles", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("engine: error: no engine in none")
    done = run("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "patchbloom: error: unrecognized: trian: perhaps you meant train\n"
