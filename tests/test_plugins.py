"""Code of others by name: the READMEs' package, run for real; what is refused; networks of timm."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import patchbloom
import pytest
import torch
from cli_cases import Command
from huggingface_hub import constants
from import_direction import ROOT
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.data.names import imagenet_names
from patchbloom.export.durable import take_lock
from patchbloom.train.commands import labels_of_coreset
from patchbloom.train.commands.checks import check_network
from patchbloom.train.config import RECIPES, StudentConfig
from patchbloom.train.methods.registry import METHODS
from patchbloom.train.networks import build_network, draws_in_training
from patchbloom.train.students.from_manifest import load_recorded_teacher
from patchbloom.train.students.student import Student
from patchbloom.train.teacher.given import load_teacher
from safetensors.torch import save_file

SHOWN = {
    "nets": "train/students",
    "judge": "train/teacher",
    "rules": "engine/select",
    "mirror": "train/methods",
}
"""Modules of the package `petals`, and the README that shows each."""
FAULTY = """
from dataclasses import replace
from petals.mirror import MIRROR
from torch import nn

REAL = replace(MIRROR, name="real")
number = 3
wide = lambda classes, px: nn.Sequential(nn.Flatten(), nn.Linear(3 * px * px, classes + 1))
small = lambda classes, px: nn.Linear(px + 1, classes)
text = lambda classes, px: "network"
def broken(classes, px): raise KeyError("weights.pt\\nnot here")
def crooked(classes, px):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * px * px, classes))
    network.normalisation = (0.5, 0.5, 0.5), (0.0, 0.2, 0.2)
    return network
"""


def shown(folder: str, kind: str = "python") -> str:
    """The only block of this kind in a folder's README."""
    text = (ROOT / folder / "README.md").read_text()
    (block,) = re.findall(rf"```{kind}\n(.*?)```", text, re.S)
    return block


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with `petals` installed as pip would, and its weights.pt."""
    package = tmp_path / "site" / "petals"
    package.mkdir(parents=True)
    for module, folder in SHOWN.items():
        (package / f"{module}.py").write_text(shown(folder))
    (package / "faulty.py").write_text(FAULTY)
    information = tmp_path / "site" / "petals-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: petals\nVersion: 1.0\n")
    _, entry = shown("train/methods", "toml").replace('"', "").splitlines()
    faulty = "bent = petals.gone:X\nodd = petals.faulty:number\nreal = petals.faulty:REAL\n"
    (information / "entry_points.txt").write_text(f"[patchbloom.methods]\n{entry}\n{faulty}")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *filter(None, sys.path)])
    monkeypatch.chdir(tmp_path)
    write_weights(seed=3)
    yield tmp_path
    METHODS.pop("mirror", None)
    for name in [name for name in sys.modules if name.split(".")[0] in ("petals", "lone")]:
        del sys.modules[name]


def write_weights(seed: int) -> None:
    torch.manual_seed(seed)
    torch.save(build_network("petals.nets:student", 10, 32).state_dict(), "weights.pt")


def test_a_package_brings_student_teacher_rule_and_method(
    train: Command, shapes: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, seen = importlib.import_module("petals.rules"), list[int]()
    typical = rules.typical
    monkeypatch.setattr(rules, "typical", lambda *a: (seen.append(len(a[0])), typical(*a))[1])
    student = ("--student", "petals.nets:student")
    run = (
        *("--data", shapes, "--out", "run", "--recipe", "small", "--image-size", "32"),
        *("--seeds", "1", "--epochs", "1", "--no-ceiling", "--method", "mirror", "upsample"),
        *("--teacher", "petals.judge:teacher", "--select", "petals.rules:typical", *student),
        *("--candidates", "1"),
    )
    result = train(*run).result
    assert seen == [6] * 10  # the best crop of every image
    assert result["accuracy"].keys() == {"mirror", "upsample"}
    mirrored, chosen = open_coreset(here / "run/coreset"), open_coreset("run/coreset-upsample")
    assert mirrored.settings["method"] == "mirror"
    assert chosen.settings["selection"] == "petals.rules:typical"
    assert "candidates" not in chosen.settings
    teacher = chosen.manifest["teacher"]
    assert teacher["architecture"] == "petals.judge:teacher"
    assert teacher["normalisation"]["mean"] == [0.5, 0.5, 0.5]
    settings = chosen.manifest["labels"]["settings"]
    assert settings["teacher"] == teacher["sha256"]
    assert settings["student"]["network"] == "petals.nets:student"
    with pytest.raises(ValueError, match="a state dict needs its network"):
        load_recorded_teacher(chosen, "weights.pt", "cpu")
    assert "student-mirror: done before" in train(*run, "--resume").err
    elsewhere = ("student", "--coreset", "run/coreset", "--out", "else", "--seeds", "1")
    assert "give `train student` --student petals.nets:student" in train(*elsewhere).error
    assert train(*elsewhere, *student).result["method"] == "mirror"
    weights = "run/students/mirror-seed0.safetensors"
    with pytest.raises(ValueError, match="its network is a function, petals"):
        patchbloom.evaluate(weights, shapes)
    write_weights(seed=4)
    assert "was run with the teacher's weights = " in train(*run, "--resume").error


def test_labels_for_a_coreset_built_by_hand(
    train: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.save("patches.npy", patches)
    exec(shown("train/labels"), {})
    before = Path("mine/manifest.json").read_bytes()
    label = ("labels", "--coreset", "mine", "--teacher", "lone:teacher", "--epochs", "1")
    label = (*label, "--backend", "eager")
    assert "there is no package 'lone'" in train(*label).error
    Path("lone.py").write_text("from petals.nets import student as teacher\n")
    with take_lock(Path(".mine.lock")):
        assert "another process labels mine: wait" in train(*label).error
    with monkeypatch.context() as patch:
        patch.setattr(labels_of_coreset, "attach_labels", lambda *_, **__: _full_disk())
        assert "No space left" in train(*label).error
    assert Path("mine/manifest.json").read_bytes() == before
    (kept,) = Path().glob(".mine.*.labels.partial")
    answers, unlabelled = kept.read_bytes(), open_coreset("mine")
    other = {**unlabelled.manifest, "settings": {"seed": 1}}
    assert kept == labels_of_coreset._recording(unlabelled).relative_to(here)
    assert kept.name != labels_of_coreset._recording(replace(unlabelled, manifest=other)).name
    with monkeypatch.context() as patch:  # a finished recording asks no teacher again
        patch.setattr(labels_of_coreset, "record_labels", lambda source, labels, *_: None)
        result = train(*label).result
    assert answers[:64] in Path("mine/labels.safetensors").read_bytes()
    assert [*Path().glob(".mine*")] == []
    core = patchbloom.open("mine", device="cpu")
    assert labels_of_coreset._recording(core).name == kept.name
    assert core.content_sha256 == result["coreset"]
    assert core.manifest["labels"]["settings"]["teacher"] == result["teacher"]
    assert core.manifest["provenance"]["labels"]["teacher"]["architecture"] == "lone:teacher"
    assert "holds soft labels already: give --overwrite" in train(*label).error
    trained = train("student", "--coreset", "mine", "--out", "out", "--backend", "eager")
    assert trained.result["targets"] == "soft"
    overwritten = train(*label, "--overwrite", "--codec", "pca", "--cutmix", "on")
    assert overwritten.result["codec"] == "pca"
    assert patchbloom.open("mine").manifest["labels"]["settings"]["views"]["cutmix"]


def _full_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.at:all", "there is no package 'nowhere': install it, put nowhere.py into"),
        ("petals.gone:f", r"cannot be imported \(ModuleNotFoundError: No module named 'petals.g"),
        ("petals.faulty:gone", r"cannot be imported \(AttributeError: module 'petals.faulty' has"),
        ("petals.faulty:number", "expected a function, got 3"),
        ("petals.faulty:broken", r"called with \(10, 32\) it raised KeyError: 'weights.pt"),
        ("petals.faulty:text", "expected a torch.nn.Module from it, got str"),
        ("petals.faulty:wide", r"expected logits \[2, 10\].*got \[2, 11\]"),
        (
            "petals.faulty:small",
            "cannot take images of 32 px .*mat1 and mat2 shapes cannot be multiplied",
        ),
    ],
)
def test_a_function_that_gives_no_network(here: Path, name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        check_network("--student", name, 10, 32)
    assert str(error.value).startswith(f"--student {name}: ")
    with pytest.raises(ValueError, match=told):
        load_teacher(name, [*"abcdefghij"], size_px=32, device="cpu")


def test_what_else_is_refused_in_one_line(train: Command, shapes: Path, here: Path) -> None:
    with pytest.raises(ValueError, match=r"faulty:crooked: expected .mean, std. as its norm"):
        load_teacher("petals.faulty:crooked", [*"abcdefghij"], size_px=32, device="cpu")
    ours = load_teacher("petals.nets:student", [*"abcdefghij"], size_px=32, device="cpu")
    ours.save(Path("teacher.safetensors"))
    with pytest.raises(ValueError, match="its architecture is a function: give that instead"):
        load_teacher("teacher.safetensors", ours.class_ids, device="cpu")
    run = ("--data", shapes, "--out", "run", "--method")
    for name, told in (
        ("bent", "its entry point petals.gone:X is broken (ModuleNotFoundError: No module named"),
        ("odd", "its entry point petals.faulty:number is broken (expected a Method of this name"),
        ("real", "its entry point petals.faulty:REAL is broken (expected a Method of this name in"),
        ("none", "expected one or several of dace, rded, random, upsample, t2i, dsco, herding, be"),
    ):
        assert f"--method {name}: {told}" in train(*run, name).error
    named = (*run, "rded", "--select")
    assert "--select nowhere:f: there is no package" in train(*named, "nowhere:f").error
    assert "--select petals.rules:f: it cannot be" in train(*named, "petals.rules:f").error
    assert not Path("run").exists()


def test_random_numbers_of_a_function(here: Path) -> None:
    before = torch.get_rng_state()
    one = load_teacher("petals.nets:student", "ab", size_px=32)
    check_network("--student", "petals.nets:student", 2, 32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1, dtype=torch.float32)
    assert load_teacher("petals.nets:student", "ab", size_px=32).sha256 == one.sha256
    config = StudentConfig(network="petals.nets:student", size_px=32)
    assert Student(0, config, 2, torch.device("cpu")).draws


def test_a_rule_that_raises_is_told_in_one_line() -> None:
    from patchbloom.engine.select.diversity import _by_rule

    def rule(seen: Any, losses: Any, count: int) -> Any:
        raise RuntimeError("no\nmore")

    with pytest.raises(ValueError, match=r"^rule .*rule raised RuntimeError: no$"):
        _by_rule(rule, np.zeros((2, 3)), np.zeros(2), 1)


def test_networks_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network("timm:test_resnet", 5, 32)
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.float32)).shape == (2, 5)
    check_network("--student", "timm:vit_tiny_patch16_224", 5, 64)
    for name, told in (
        ("timm:nothing", "network timm:nothing is unknown to timm"),
        ("timm:test_vit.nothing", "network timm:test_vit.nothing is unknown: Invalid pretrained"),
    ):
        with pytest.raises(ValueError, match=told):
            build_network(name, 5, 32)
    by_name = RECIPES["dace"].student_for(ipc=1, factor=2, classes=10, network="timm:vgg11")
    assert by_name.learning_rate == 5e-4
    from timm.layers import DropPath

    assert draws_in_training(DropPath(0.1))
    monkeypatch.setattr("patchbloom.train.plugins.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "timm")
    with pytest.raises(ValueError, match=r"no package 'timm': pip install 'patchbloom\[timm\]'"):
        build_network("timm:test_resnet", 5, 32)


def test_a_teacher_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights lie where the hub's client would have put them."""
    import timm

    name, ids = "test_resnet", sorted(imagenet_names())
    chosen = [ids[217], ids[3]]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = "models--timm--test_resnet.r160_in1k"
    with pytest.raises(ValueError, match=f"put {kept}, which `hf .*r160_in1k` makes elsewhere, in"):
        load_teacher(f"timm:{name}", chosen, device="cpu")
    network = timm.create_model(name, pretrained=False).eval()
    snapshot = tmp_path / kept / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    (tmp_path / kept / "refs").mkdir()
    (tmp_path / kept / "refs" / "main").write_text("0" * 40)
    teacher = load_teacher(f"timm:{name}", chosen, device="cpu")
    config = timm.models.get_pretrained_cfg(name)
    assert (teacher.size_px, teacher.normalisation.mean) == (160, config.mean)
    images_BCHW = torch.rand(2, 3, 160, 160, dtype=torch.float32)
    with torch.no_grad():
        expected_BK = network(images_BCHW)[:, [217, 3]]
    found_BK = teacher.logits(images_BCHW, teacher.normalisation)
    torch.testing.assert_close(found_BK, expected_BK, rtol=1e-4, atol=1e-4)
    for refused, ids, told in (
        (name, ["star"], "knows ImageNet-1k's classes by their WordNet ids; 'star' is none"),
        ("vit_tiny_patch16_224.augreg_in21k", chosen, "ImageNet-1k's 1000 classes, got 21843"),
        ("coatnet_0_224", chosen, "ImageNet-1k's 1000 classes, got none"),
    ):
        with pytest.raises(ValueError, match=told):
            load_teacher(f"timm:{refused}", ids, device="cpu")
