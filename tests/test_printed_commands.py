"""Commands that our messages print: each reaches the engine that its message is about."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from bundle_cases import KEY, fill
from patchbloom.engine import cli
from patchbloom.engine.builds.needs import Needs, check_room
from patchbloom.export.bundle import (
    Bundle,
    BundleError,
    default_bundles_folder,
    find_bundles,
    find_or_build,
    open_bundle,
)


def store(bundles: Path) -> Bundle:
    return find_or_build(bundles, KEY, fill)


def commands(message: object) -> list[str]:
    """Its parts between backticks."""
    return re.findall("`(.*?)`", str(message))


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name needs quotes; the default one is in this test's folder too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Path("my cb; x")


@pytest.mark.parametrize(
    "damage", ["graph.onnx cut", "graph.onnx changed", "graph.onnx gone", "manifest.json gone"]
)
def test_a_damaged_engines_hint_spares_its_namesake(bundles: Path, damage: str) -> None:
    healthy, damaged = store(default_bundles_folder()), store(bundles)
    assert healthy.folder.name == damaged.folder.name
    name, how = damage.split()
    path = damaged.folder / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"012" if how == "cut" else b"9876543210")
    with pytest.raises(BundleError) as error:
        open_bundle(damaged.folder)
    (hint,) = commands(error.value)
    assert cli.main(shlex.split(hint)[1:]) == 0
    assert find_bundles(bundles) == []
    assert open_bundle(healthy.folder)
    assert store(bundles).built


def test_names_of_folders_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile = tmp_path / "b\x1b]0;owned\x07"
    store(hostile)
    told = [capfd.readouterr().err]
    for arguments in (["list"], ["remove", "--all"]):
        assert cli.main([*arguments, "--bundles", str(hostile)]) == 0
        told.append(capfd.readouterr().out)
    for each in told:
        assert "\\x1b]0;owned\\x07" in each
        assert "\x1b" not in each


def test_the_default_folder_needs_no_option(bundles: Path) -> None:
    engine = store(default_bundles_folder())
    (engine.folder / "graph.onnx").unlink()
    with pytest.raises(BundleError, match=f"`engine remove {engine.folder.name}`"):
        open_bundle(engine.folder)


def test_a_build_is_repeated_in_its_own_folder(
    bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = store(bundles)
    (printed,) = commands(capsys.readouterr().err)
    with pytest.raises(BundleError) as error:
        open_bundle(engine.folder, {**KEY, "batch": 64})
    for command in (printed, *commands(error.value)):
        words = shlex.split(command)
        assert words[:2] == ["engine", "build"]
        assert words[words.index("--bundles") + 1] == str(bundles.absolute())


def test_room_is_made_where_it_is_missing(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchbloom.engine.builds.needs.free_disk_bytes", lambda _: 0)
    needs = Needs(
        unet_parameters=1,
        vae_parameters=1,
        weights_bytes=99,
        layer_bytes=0,
        memory_bytes=99,
        image_bytes=0,
        deep_tokens=1,
        deep_columns=1,
    )
    engine = store(bundles)
    with pytest.raises(OSError, match="are free there") as error:
        check_room(needs, "cpu", bundles)
    (hint,) = commands(error.value)
    assert cli.main(shlex.split(hint.replace("NAME", engine.folder.name))[1:]) == 0
    assert find_bundles(bundles) == []


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("which", [".", "NAME", "NAME/graph.onnx"])
def test_a_folder_that_others_write_to_is_refused(bundles: Path, mode: int, which: str) -> None:
    """Opening an engine runs its code."""
    engine = store(bundles)
    (bundles / which.replace("NAME", engine.folder.name)).chmod(mode)
    with pytest.raises(BundleError, match="can be written to by others") as error:
        store(bundles)
    subprocess.run(shlex.split(commands(error.value)[0]), check=True)
    assert not store(bundles).built
    bundles.chmod(0o1777)  # as /tmp: nobody replaces another's folder
    assert not store(bundles).built


def test_a_build_is_closed_to_others_whatever_the_umask(bundles: Path) -> None:
    before = os.umask(0)
    try:
        store(bundles)
    finally:
        os.umask(before)
    assert not store(bundles).built


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("which", ["bundles", "engine"])
def test_a_folder_of_another_user_is_refused(bundles: Path, which: str) -> None:
    engine = store(bundles)
    os.chown(bundles if which == "bundles" else engine.folder, 4242, -1)
    with pytest.raises(BundleError, match=r"belongs to user 4242, .*choose another folder"):
        store(bundles)


def test_nothing_is_built_where_others_write(bundles: Path) -> None:
    bundles.mkdir()
    bundles.chmod(0o777)
    with pytest.raises(BundleError, match="can be written to by others"):
        store(bundles)
    assert not list(bundles.iterdir())
