"""Publications on the Hugging Face hub: uploaded in one commit, opened at one, refused in a line.

The hub is loopback_hub.py, which answers the hub's own client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import patchbloom
import pytest
from cli_cases import SMALL, Command
from huggingface_hub import constants
from loopback_hub import TOKEN, Hub, serve
from patchbloom.engine import cli as engine
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.hub import fetched
from patchbloom.engine.errors import CoresetError
from patchbloom.export.hub import DownloadError
from patchbloom.train import cli
from patchbloom.train.commands import publication

NAME = "hf:me/demo"
RDED = f"{NAME}/coreset-rded"
LICENCE = ("--data-licence", "CC-BY-4.0")


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two methods."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ("--data", str(shapes), "--out", str(out), *SMALL, "--no-ceiling", "--factor", "1")
    assert cli.main([*words, "--method", "random", "rded"]) == 0
    return out


@pytest.fixture(scope="module")
def published(run: Path) -> dict[str, bytes]:
    """The files of its publication."""
    to = run.with_name("published")
    assert cli.main(["publish", str(run), "--to", str(to)]) == 0
    return contents(to)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, with its client's cache and ours."""
    hub = Hub()
    with serve(hub) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
        yield hub
        server.shutdown()


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, endpoint: str) -> None:
    """Sets the constants that huggingface_hub reads from the environment as it loads."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "client"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_run_goes_to_the_hub_and_comes_back(
    hub: Hub, train: Command, run: Path, shapes: Path, tmp_path: Path
) -> None:
    outcome = train("publish", run, "--to", NAME, *LICENCE, "--private")
    pinned = outcome.result["publication"]
    _, (commit, files) = hub.repositories["me/demo"]
    assert pinned == f"{NAME}@{commit}"
    assert hub.private == {"me/demo"}
    assert f'it opens with patchbloom.open("{pinned}/coreset-random")' in outcome.err
    with patchbloom.open(RDED) as core:
        assert str(core.folder).endswith(f"/{pinned}/coreset-rded")
        assert pinned in repr(core)
        given = open_coreset(run / "coreset-rded")
        assert core.content_sha256 == given.content_sha256
        assert [image.tobytes() for image in core["star"]]
    assert not any("teacher" in to for to in contents(tmp_path / "client"))
    told = train("check", pinned, "--data", shapes).result
    assert told["rded"]["bit_for_bit"]
    del files[".gitattributes"]
    assert contents(fetched(Path(pinned), whole=True)) == files
    options = ("--coreset", f"{pinned}/coreset-random", "--out", tmp_path / "out", "--seeds", "1")
    summary = json.loads((run / "summary.json").read_text())
    assert train("student", *options).result["coreset"] == summary["content_sha256"]["random"]


def test_the_card_says_to_the_hub_what_the_user_said(
    train: Command, run: Path, tmp_path: Path
) -> None:
    import datasets
    import yaml

    train("publish", run, "--to", tmp_path / "said", *LICENCE).result  # noqa: B018
    train("publish", run, "--to", tmp_path / "silent", "--method", "rded").result  # noqa: B018
    told, silent = (
        yaml.safe_load((tmp_path / name / "README.md").read_text().split("---\n")[1])
        for name in ("said", "silent")
    )
    assert told["license"] == "cc-by-4.0"
    assert silent == {"tags": ["patchbloom"], "configs": told["configs"][1:]}
    cache = str(tmp_path / "datasets")
    rows = datasets.load_dataset(str(tmp_path / "said"), "rded", cache_dir=cache)["train"]
    coreset = open_coreset(tmp_path / "said" / "coreset-rded")
    assert rows["label"] == coreset.labels_N.tolist()
    assert np.array_equal(np.stack([*map(np.array, rows["image"])]), coreset.patches())
    assert rows.features["label"].names == list(coreset.class_ids)


def test_another_upload_replaces_a_publication_and_nothing_else(
    hub: Hub, train: Command, run: Path
) -> None:
    give = ("publish", run, "--to", NAME, *LICENCE, "--method")
    old = train(*give, "random").result["publication"]
    assert f"{NAME} is not empty: choose another --to, or --overwrite" in train(*give, "rded").error
    new = train(*give, "rded", "--overwrite").result["publication"]
    assert not any("coreset-random" in to for to in hub.repositories["me/demo"][-1][1])
    assert new == f"{NAME}@{hub.repositories['me/demo'][-1][0]}"
    for name, method in ((old, "random"), (NAME, "rded")):
        assert patchbloom.open(name).folder.name == f"coreset-{method}"
    commit = hub.commit("me/demo", {**hub.repositories["me/demo"][-1][1], "thesis.tex": b"mine"})
    error = train(*give, "rded", "--overwrite").error
    assert "thesis.tex is not part of a publication, and --overwrite replaces nothing else" in error
    hub.commit("me/demo", {"thesis.tex": b"mine"})
    error = train(*give, "rded", "--overwrite").error
    assert f"{NAME}: it has no manifest.json: expected a coreset, or what `train publish" in error
    assert patchbloom.open(f"{NAME}@{commit}").folder.parent.name == f"demo@{commit}"


def test_a_repository_that_changes_meanwhile_is_kept(
    hub: Hub, train: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("me/demo", {})
    write = publication.write_card
    changed = {"theirs": b""}
    monkeypatch.setattr(
        publication, "write_card", lambda *a: (write(*a), hub.commit("me/demo", changed))
    )
    error = train("publish", run, "--to", NAME, *LICENCE).error
    assert f"{NAME}: it was changed meanwhile: look at it, and publish again" in error
    assert hub.repositories["me/demo"][-1][1] == changed


def test_without_a_network_the_last_download_is_opened(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch, capsys
) -> None:
    commit = hub.commit("me/demo", published)
    first = patchbloom.open(RDED)
    kept = hub.repositories.pop("me/demo")
    with pytest.raises(DownloadError, match=r"no such data set, or not for you \(404\)"):
        patchbloom.open(RDED)  # it was downloaded, but the hub does answer
    hub.repositories["me/demo"] = kept
    use(monkeypatch, tmp_path, "http://127.0.0.1:1")
    capsys.readouterr()
    assert patchbloom.open(RDED).folder == first.folder
    told = capsys.readouterr().err
    assert f"{RDED}: the hub at http://127.0.0.1:1 did not answer as expected" in told
    assert "taken as it was downloaded before" in told
    assert patchbloom.open(f"{NAME}@{commit}/coreset-rded").folder == first.folder
    assert not capsys.readouterr().err
    with pytest.raises(DownloadError, match=r"hf:me/other: the hub at .* did not answer as"):
        patchbloom.open("hf:me/other")


def test_the_engine_takes_names_of_the_hub(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch, capsys
) -> None:
    hub.commit("me/demo", published)
    monkeypatch.chdir(tmp_path)
    export = ["export", "--to", "imagefolder", "--out", "out"]
    for verb, *options in (["info"], ["verify"], ["show"], export):
        assert engine.main(["coreset", verb, RDED, *options]) == 0
    assert (tmp_path / "coreset-rded.png").is_file()
    assert len([*Path("out/train/star").iterdir()]) == 1
    capsys.readouterr()
    assert engine.main(["coreset", "info", NAME]) == 2
    error = f"engine: error: {NAME} holds coreset-random, coreset-rded: name one, as {RDED[:-5]}"
    assert capsys.readouterr().err.startswith(error)


def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit("me/demo", published)
    hub.damaged = "coreset-rded/patches/star/000000.png"
    told = r"star/000000.png: expected sha256 .*, got .*: try again; if that does not help"
    with pytest.raises(CoresetError, match=told):
        patchbloom.open(RDED)
    assert not contents(tmp_path / "cache")
    hub.damaged = None
    assert patchbloom.open(RDED).folder.name == "coreset-rded"


def test_the_licence_of_a_generator_is_asked_for_too(
    hub: Hub, train: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publication._content

    def with_generator(*given: Any) -> tuple[dict[str, Any], list[Path]]:
        content, teacher = made(*given)
        return content | {"generator": {"name": "m", "weights_sha256": "0"}}, teacher

    monkeypatch.setattr(publication, "_content", with_generator)
    error = train("publish", run, "--to", NAME, *LICENCE).error
    assert f"--to {NAME} needs --generator-licence, for those who will use it" in error
    assert not hub.repositories
    told = train("publish", run, "--to", NAME, *LICENCE, "--generator-licence", "theirs").result
    assert told["publication"].startswith(f"{NAME}@")


def shorten(files: dict[str, bytes]) -> None:
    del files["coreset-rded/labels.safetensors"]


def climb(files: dict[str, bytes]) -> None:
    path = "coreset-rded/manifest.json"
    files[path] = files[path].replace(b'"labels.safetensors"', b'"../labels.safetensors"')


def rewrite(files: dict[str, bytes]) -> None:
    files["manifest.json"] = b'{"schema": "app/1", "files": {}}'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shorten, r"lacks labels.safetensors, which its manifest.json names"),
        (climb, r"manifest.json: files.*expected a path inside the folder"),
        (rewrite, r"hf:me/demo, manifest.json: schema: .* found 'app/1': expected a coreset, or"),
    ],
)
def test_other_content_is_refused_and_nothing_is_written(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, change: Any, told: str
) -> None:
    files = dict(published)
    change(files)
    hub.commit("me/demo", files)
    with pytest.raises(CoresetError, match=told) as error:
        patchbloom.open(NAME if change is rewrite else RDED)
    assert "\n" not in str(error.value)
    assert not contents(tmp_path / "cache")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["info", "hf:me/none"], "{} has no such data set, or not for you (404): check the name"),
        (["info", "hf:me/demo@v2"], "hf:me/demo@v2: the hub at {} has no such revision: give one"),
        (["info", "hf:me"], "hf:me: expected hf:USER/NAME[@REVISION][/coreset-METHOD]"),
        (["publish", "hf:them/demo"], "hf:them/demo: the hub at {} has no such data set, or not"),
        (["publish", "hf:me/demo@main"], "--to hf:me/demo@main: expected hf:USER/NAME alone"),
        (["wrong token"], "hf:me/demo: the hub at {} has no such data set, or not for you (401)"),
        (
            ["no hub"],
            "hf:me/demo: the hub at {} did not answer as expected ([Errno 111] C",
        ),
        (["no token"], "--to hf:me/new needs a token that may write: log in with `hf auth login`"),
        (["no licence"], "--to hf:me/new needs --data-licence, for those who will use it"),
        (["licence"], '"license" must be one of: give --data-licence another identifier, or'),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    hub: Hub, train: Command, run: Path, words: list[str], told: str, monkeypatch, capsys
) -> None:
    hub.commit("me/demo", {"manifest.json": b"{}"})
    match words:
        case ["info", name]:
            assert engine.main(["coreset", "info", name]) == 2
            error = capsys.readouterr().err
        case ["publish", name]:
            error = train("publish", run, "--to", name, *LICENCE).error
        case ["wrong token"]:
            monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
            assert engine.main(["coreset", "info", NAME]) == 2
            error = capsys.readouterr().err
        case ["no hub"]:
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
            error = train("publish", run, "--to", NAME).error
        case ["no token"]:
            monkeypatch.delenv("HF_TOKEN")
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
            error = train("publish", run, "--to", "hf:me/new", *LICENCE).error
        case ["no licence"]:
            error = train("publish", run, "--to", "hf:me/new").error
        case ["licence"]:
            error = train("publish", run, "--to", "hf:me/new", "--data-licence", "mine").error
    assert told.format(constants.ENDPOINT) in error
    assert [*hub.repositories["me/demo"][-1][1]] == ["manifest.json"]
    assert len(hub.repositories.get("me/new", "1")) == 1  # created, and empty


def test_the_endpoint_is_the_one_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "patchbloom", "engine", "coreset", "info", "hf:me/none"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert f"the hub at {constants.ENDPOINT} has no such data set" in done.stderr
    assert "GET /api/datasets/me/none" in hub.requests
