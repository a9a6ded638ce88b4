"""The scoreboard: its cells, a killed board that resumes, and the page made from rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scoreboard
import tyro
from patchbloom.export.models import TINY_FOLDER, find_model, weights_sha256
from patchbloom.train.coreset_options import StudentElsewhere
from patchbloom.train.data.shapes import write_shapes
from patchbloom.train.teacher.given import teacher_id
from PIL import Image
from run_processes import write_inputs

BENCH = Path(__file__).parents[1] / "bench"
STUDENT = ("--student", "convnet-d3-w8", "--device", "cpu")
DOPED = (*STUDENT, "--dope", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("set") / "data", train_per_class=5, val_per_class=2)


def board_of(data: Path, out: Path, *common: str, **options: Any) -> Any:
    given = {"recipe": "small", "image_size": 32, "ipc": (1,), **options}
    asked = scoreboard.Options(data=str(data), out=out, **given)
    return scoreboard.Board(options=asked, common=common)


def test_a_board_of_more_methods_has_the_cells_of_fewer(data: Path) -> None:
    def names(*methods: str) -> set[str]:
        board = board_of(data, Path("out"), methods=methods, parts=("methods",))
        return {cell.name for cell in board.cells()}

    assert names("upsample") < names("random", "upsample")
    assert not any("ceiling" in name for name in names("upsample"))


def test_one_table_shows_a_method_under_two_recipes(data: Path) -> None:
    methods = ("rded", "rded --recipe rd3")
    board = board_of(data, Path("out"), recipe="rded", methods=methods, parts=("methods",))
    one, other = board.lines()
    assert (one.label, other.label) == methods
    assert one.group == other.group
    assert one.cell.name != other.cell.name
    sizes = [board.size(line.cell) for line in (one, other)]
    assert [size.epochs for size in sizes] == [300, 400]
    assert sizes[0].samples == sizes[1].samples


def test_cells_are_shared_and_say_what_they_are(data: Path) -> None:
    common = ("--model", "prior", "--backend", "ort")
    options = {"hard": True, "students": ("alexnet",), "variant": ("plain=--model 'a b'",)}
    board = board_of(data, Path("out"), *common, factors=(1, 2, 3, 4), **options)
    cells = {cell.name: cell for cell in board.cells()}
    assert len(cells) == len(board.cells())
    assert next(iter(cells)) == "teacher"
    lines = {(line.part, line.group, line.label): line for line in board.lines()}

    dace = lines["methods", "IPC 1", "dace"]
    assert dace.cell.words[-1] == "--no-ceiling"
    assert dace.hard.words[-2:] == ("--targets", "hard")
    assert lines["methods", "IPC 1", "random"].cell.words[-1] == "--ceiling"
    shared = [("ablation", "IPC 1", "rho 0.8, mixup"), ("patches", "dace", "r = 2 (16 px)")]
    shared += [("students", "dace", "convnet-d4-w24to96"), ("codecs", "10 classes", "dense")]
    assert all(lines[key].cell == dace.cell for key in (*shared, ("gain", "IPC 1", "dace")))
    assert lines["gain", "IPC 1", "plain"].cell.words[-2:] == ("--model", "a b")
    assert lines["ablation", "IPC 1", "rho 0.4"].cell.words[-3:] == ("--rho", "0.4", "--no-mixup")
    assert lines["ablation", "IPC 1", "text only"].cell.words[-2:] == ("--start", "noise")
    assert board.size(lines["patches", "rded", "r = 1 (32 px)"].cell).samples == 10
    assert board.left_out() == (3, 4)  # 32 px is no multiple of 3; a class has 5 images

    elsewhere = lines["students", "dace", "alexnet"].cell
    assert elsewhere.base == dace.cell
    words = scoreboard.command(elsewhere, board)
    assert words[0] == "student"
    for option, value in (
        *zip(common[::2], common[1::2], strict=True),
        ("--learning-rate", "0.0001"),
        ("--coreset", "out/cells/dace-ipc1/coreset"),
    ):
        assert words[words.index(option) + 1] == value
    assert [line.label for line in board.lines() if line.group == "1000 classes"] == [
        *("dense", "top-3", "top-10", "top-50", "pca-9", "pca-20", "pca-36", "pca-40", "pca-80")
    ]
    dense = lines["codecs", "1000 classes", "dense"].cell
    words = scoreboard.command(dense, board)
    made = "out/cells/thousand-teacher/teacher/teacher.safetensors"
    for option, value in (("--data", "out/thousand-classes"), ("--teacher", made), ("--ipc", "1")):
        assert words[words.index(option) + 1] == value
    order = [cell.name for cell in board.cells()]
    assert order.index("thousand-teacher") < order.index(dense.name)
    teacher = next(cell for cell in board.cells() if cell.name == "thousand-teacher")
    assert scoreboard.command(teacher, board)[0] == "teacher"
    assert board.size(teacher).samples == 10_000
    assert "--model" not in words
    with pytest.raises(ValueError, match="--students resnet1"):
        board_of(data, Path("out"), students=("resnet1",)).cells()


def test_cells_take_what_is_given_for_every_cell(data: Path) -> None:
    def elsewhere(*common: str) -> tuple[Any, StudentElsewhere]:
        board = board_of(
            *(data, Path("out"), "--device", "cpu", *common),
            **{"parts": ("students", "codecs"), "students": ("vit-s",)},
        )
        cell = next(cell for cell in board.cells() if cell.base is not None)
        words = scoreboard.command(cell, board)[1:]
        return board, tyro.cli(StudentElsewhere, args=words)

    _, soft = elsewhere()
    assert (soft.targets, soft.coreset.name, soft.recipe) == ("soft", "coreset", None)
    assert soft.learning_rate == 1e-4  # RDED's for a ViT
    board, doped = elsewhere("--dope", "2", "--learning-rate", "0.1")
    assert (doped.targets, doped.coreset.name) == ("soft", "coreset-doped")
    assert doped.learning_rate == 0.1
    assert {board.size(cell).samples for cell in board.cells() if cell.base} == {10 * (1 + 2) * 4}
    _, hard = elsewhere("--targets", "hard", "--batch", "5", "--student-precision", "bf16")
    assert (hard.targets, hard.recipe, hard.batch) == ("hard", "small", 5)
    assert hard.student_precision == "bf16"
    with pytest.raises(ValueError, match="--labels online stores no labels, and the part students"):
        elsewhere("--labels", "online")

    board, _ = elsewhere("--accumulate", "2", "--student-compile", "--model", "prior")
    thousand = board.thousand().words
    assert thousand[-6:] == (
        *("--no-ceiling", "--device", "cpu"),
        *("--student-compile", "--accumulate", "2"),
    )
    assert board.thousand_teacher.words[-3:] == thousand[-3:]
    sizes = {32: 1, 64: 1, 96: 2}
    boards = (board_of(data, Path("out"), recipe="rded", image_size=px) for px in sizes)
    assert [board.factor for board in boards] == list(sizes.values())


def test_rows_of_other_teachers_or_images_are_refused(data: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"one")
    board = board_of(
        *(data, tmp_path, *STUDENT),
        **{"teacher": str(teacher), "parts": ("students",), "students": ("alexnet",)},
    )
    cells = board.cells()
    base, other = (next(cell for cell in cells if bool(cell.base) is has) for has in (False, True))
    of_base = {
        "data": {"sha256": board.data_sha256},
        "teacher": {"sha256": "weights", "source": teacher_id(str(teacher))},
        "content_sha256": "patches",
    }
    of_other = {
        "data": {"validation_sha256": board.validation_sha256},
        "content_sha256": "patches",
    }
    (tmp_path / "rows").mkdir()

    def read(**changes: Any) -> Any:
        told = {base: of_base, other: {**of_other, **changes}}
        for cell, row in told.items():
            row = {"words": list(cell.words), **row}
            (tmp_path / "rows" / f"{cell.name}.json").write_text(json.dumps(row))
        return scoreboard.read_rows(board, cells)

    assert read().keys() == {base.name, other.name}
    assert read(data=None, content_sha256=None)  # older rows lack these
    for changes, told in (
        ({"teacher": {"sha256": "others"}}, f"the teacher's weights of cell {base.name} .weights"),
        ({"data": {"validation_sha256": "x"}}, "the validation images of what is given now"),
        ({"content_sha256": "x"}, f"the coreset of cell {base.name} .patches., found x"),
    ):
        with pytest.raises(ValueError, match=f"cell {other.name} of .*: expected {told}"):
            read(**changes)
    teacher.write_bytes(b"another")
    with pytest.raises(ValueError, match=f"cell {base.name} .* the teacher of what is given now"):
        read()


def test_rows_of_a_model_that_was_trained_again_are_refused(data: Path, tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    shutil.copytree(TINY_FOLDER, prior)
    board = board_of(
        *(data, tmp_path, "--model", str(prior)),
        **{"methods": ("upsample", "dace"), "parts": ("methods",)},
    )
    cells = board.cells()
    first, second = (cell for cell in cells if cell.kind != "teacher")
    made = {
        "name": "prior",
        "given": board.model_spec(second),
        "sha256": weights_sha256(find_model(prior)),
    }
    rows = {first.name: {"model": None}, second.name: {"model": made}}
    scoreboard.check_alike(board, cells, rows)
    card = prior / "unet" / "config.json"
    card.write_text(card.read_text() + " ")
    told = f"cell {second.name} .*: expected the weights of --model of what is given now"
    with pytest.raises(ValueError, match=told):
        scoreboard.check_alike(board, cells, rows)
    shutil.rmtree(prior)
    scoreboard.check_alike(board, cells, rows)  # cells need the folder, rows do not
    rows[first.name] = {"model": {**made, "sha256": "other"}}
    with pytest.raises(ValueError, match=f"the weights of --model of cell {first.name} .other"):
        scoreboard.check_alike(board, cells, rows)


def test_time_is_told_from_the_nearest_cell(data: Path) -> None:
    board = board_of(data, Path("out"), ipc=(1, 2), epochs=100)
    cells = {cell.name: cell for cell in board.cells()}
    cell = cells["rded-ipc2"]
    size = board.size(cell)
    assert (size.samples, size.epochs, size.seeds) == (80, 100, 3)
    alike = {"method": "rded", "student": size.student, "image_size": 32, "epochs": 5}
    near = {**alike, "cell": "rded-ipc1", "samples": 40, "seeds": 3}
    near |= {"seconds_per_epoch": 0.5, "total_s": 12.5}
    fewer = {**near, "cell": "rded-ipc3", "seeds": 1, "seconds_per_epoch": 9.0}
    assert scoreboard.estimate_s(cell, size, [fewer, near]) == 10 + 100 * 2 * 0.5
    other = {**near, "student": "vgg11"}
    assert scoreboard.estimate_s(cell, size, [other, {**near, "method": "dace"}]) is None


def kill_when(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_killed_board_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "board"
    shown: dict[str, Any] = {"methods": ("random", "upsample"), "parts": ("methods",)}
    given: dict[str, Any] = {**shown, "seeds": 2, "epochs": 2, "teacher_epochs": 1}
    words = ["--data", str(data), "--out", str(out), "--recipe", "small", "--image-size", "32"]
    words += ["--ipc", "1", "--no-record", "--parts", "methods", "--methods", "random", "upsample"]
    words += ["--seeds", "2", "--epochs", "2", "--teacher-epochs", "1", "--", *DOPED]
    process = subprocess.Popen([sys.executable, str(BENCH / "scoreboard.py"), *words])
    kill_when(process, out / "cells" / "upsample-ipc1" / "run.json")
    assert sorted(path.stem for path in (out / "rows").iterdir()) == [
        "random-ipc1-ceiling",
        "teacher",
    ]
    first = (out / "cells" / "random-ipc1-ceiling" / "summary.json").stat()

    def go_on(**changes: Any) -> int:
        board = board_of(data, out, record=False, json=True, **{**given, **changes})
        return scoreboard.main(board.options, DOPED)

    assert go_on(ipc=(1, 99)) == 1  # cells of 99 images per class fail; the other is done
    board = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(board["failed"]) == ["random-ipc99-ceiling", "upsample-ipc99"]
    assert "has 5 training images" in board["failed"]["upsample-ipc99"]
    assert (out / "cells" / "random-ipc1-ceiling" / "summary.json").stat() == first
    for name, method in (("random-ipc1-ceiling", "random"), ("upsample-ipc1", "upsample")):
        summary = json.loads((out / "cells" / name / "summary.json").read_text())
        row = board["rows"][name]
        assert row["accuracy"] == summary["accuracy"][method]
        assert row["teacher"]["accuracy"] == board["rows"]["teacher"]["accuracy"][0]
        assert row["teacher"]["sha256"] == board["rows"]["teacher"]["teacher"]["sha256"]
        assert row["total_s"] >= 2 * row["seconds_per_epoch"] > 0
        assert 20 < row["label_bytes"] < 22
        assert 0 < row["recognised"] < 100
        assert (row["samples"], row["epochs"], row["seeds"]) == (80, 2, 2)
    page = (out / "scoreboard.md").read_text()
    assert page.count("| fresh real images (ceiling) |") == 1
    assert Image.open(out / "plots" / "methods.png").width > 400

    assert go_on() == 0
    assert go_on(dry_run=True) == 0
    assert "3 cells, 3 done, 0 s left" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cell teacher of .* was run with .*another --out"):
        go_on(teacher_epochs=2)
    lines = "".join(path.read_text() for path in sorted((out / "rows").iterdir())).splitlines()
    assert [json.loads(line)["cell"] for line in lines] == sorted(board["rows"])
    (out / "cells" / "teacher" / "teacher" / "teacher.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"cell random-.* the teacher of what is given now"):
        go_on()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs(tmp_path: Path) -> None:
    data, model = write_inputs(tmp_path)[1::2]
    common = (*DOPED, "--model", model, "--backend", "eager", "--bundles", str(tmp_path / "b"))
    board = board_of(
        *(Path(data), tmp_path / "board", *common),
        **{"epochs": 3, "teacher_epochs": 1, "seeds": 2, "record": False},
        **{"factors": (1, 2), "students": ("alexnet",), "variant": ("rho 1=--rho 1",)},
    )
    assert scoreboard.main(board.options, common) == 0
    rows = scoreboard.read_rows(board, board.cells())
    lines = {(line.part, line.group, line.label): line.cell.name for line in board.lines()}
    row = {key: rows[name] for key, name in lines.items()}
    assert rows.keys() - set(lines.values()) == {"teacher", "thousand-teacher"}

    dace = row["methods", "IPC 1", "dace"]
    assert [row["ablation", "IPC 1", f"rho {rho}"]["evals"] for rho in (0.4, 0.8)] == [2, 4]
    assert row["ablation", "IPC 1", "text only"]["evals"] == 5
    assert row["gain", "IPC 1", "rho 1"]["evals"] == 5
    assert row["patches", "dace", "r = 1 (32 px)"]["samples"] == dace["samples"] / 4 == 20
    other = row["students", "dace", "alexnet"]
    assert (other["bytes"], other["student"]) == (dace["bytes"], "alexnet")
    assert other["content_sha256"] == dace["content_sha256"]  # soft labels and doped images too
    assert other["accuracy"] != dace["accuracy"]
    assert other["seconds_per_epoch"] > 0
    for group, label, bytes_each in (
        *(("10 classes", "dense", 20), ("10 classes", "top-3", 12)),
        *(("1000 classes", "dense", 2000), ("1000 classes", "top-10", 40)),
    ):
        assert bytes_each <= row["codecs", group, label]["label_bytes"] < bytes_each + 1.5
    plots = sorted(path.stem for path in (board.options.out / "plots").iterdir())
    assert plots == sorted(board.options.parts)


def test_the_page_says_who_wins(data: Path, tmp_path: Path) -> None:
    parts = ("methods", "codecs", "gain")
    board = board_of(data, Path("out"), hard=True, parts=parts, variant=("plain=--x 1",))
    sizes = {"without_labels": 1024, "with_labels": 2048, "with_generator": 3 * 2**20}

    def row(cell: Any, accuracy: list[float | None], **more: Any) -> dict[str, Any]:
        alike = {"student": "net", "image_size": 32, "classes": 10, "samples": 40, "epochs": 5}
        alike["seeds"] = 3
        told = {"accuracy": accuracy, "bytes": sizes, "label_bytes": 20.0, "evals": 4}
        time = {"seconds_per_epoch": None, "total_s": 300.0, "ceiling": None, "recognised": 61.4}
        return {**alike, **told, **time, "cell": cell.name, **more}

    accuracies = {
        "random": [30.0, 3.0],
        "upsample": [40.0, 1.0],
        "dace": [42.0, 1.0],
        "text only": [35.0, 1.0],
        "top-3": [41.5, 1.0],
        "plain": [None, None],
    }
    lines = board.lines()
    rows = {
        line.cell.name: row(line.cell, accuracies[line.label])
        for line in lines
        if line.label in accuracies and line.label != "plain" and not line.cell.generated
    }
    rows["random-ipc1-ceiling"]["ceiling"] = [60.0, 2.0]
    counts = {"training_images": 50, "validation_images": 20, "classes": 10}
    rows["random-ipc1-ceiling"] |= {
        **{"commit": "abc", "dirty": True, "device": "cpu", "recipe": "small"},
        **{"data": {"name": "set", **counts}, "teacher": {"architecture": "net", "accuracy": 9.0}},
    }
    rows["dace-ipc1"]["commit"] = "def"
    top_3 = next(line.cell for line in lines if line.label == "top-3")
    rows[top_3.name]["label_bytes"] = 12.0
    hard = next(line.hard for line in lines if line.label == "dace" and line.hard)
    rows[hard.name] = row(hard, [20.0, 0.5])
    rows["top-2"] = rows["random-ipc1-ceiling"] | {"recipe": "rd3", "epochs": 400}
    del rows["top-2"]["commit"]
    page = scoreboard.render(lines, rows, {"rded-ipc1": "it broke"})

    assert "classes; recipe small, 5 epochs and recipe rd3, 400 epochs, 32 px; students net" in page
    methods, codecs, gain = page.split("## ")[1:4]
    assert "| 42.0 ± 1.0 | 20.0 ± 0.5 | best | 70 % | 61 % | 4 | 1.0 KiB | 2.0 KiB |" in methods
    assert "| IPC 1 | random | 30.0 ± 3.0 | – | -5.4 | 50 % |" in methods
    assert "| IPC 1 | fresh real images (ceiling) | 60.0 ± 2.0 | – |" in methods
    assert "| IPC 1 | rded | – |" in methods
    assert "**dace** (42.0 ± 1.0) is first, above upsample (40.0 ± 1.0) by 2.0 standard" in methods
    assert methods.count("(not told apart), over students of one coreset and one") == 1
    assert "measured at 2 commits: abc-dirty (1), def (1); a gap" in page
    widths = {line.count("|") for line in methods.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "top-3: 1.7 times smaller than dense; -0.5 points, -0.5 standard deviations" in codecs
    assert "hard labels" not in codecs
    assert "(text only against upsample): -5.0 points, -5.0 standard deviations." in gain
    assert "- mixup" not in gain  # its cell is not done
    assert "- rded-ipc1: it broke" in page

    scoreboard.write_plots(lines, rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{p}.png" for p in sorted(parts)]
    assert scoreboard.render(lines, {}, {}).startswith("# Scoreboard\n\nNo cell is done.")
