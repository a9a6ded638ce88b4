"""Models by name and folder: refusals, and the download of SDXL-Turbo from a failing hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from patchbloom.engine.expand.prompts import class_prompts, unseen_classes
from patchbloom.export import hub
from patchbloom.export.models import ModelError, find_model, load_parts, weights_sha256
from patchbloom.train.prior.model import new_parts, save_parts


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts = new_parts(32, folder / "spelling", unet_channels=(16, 16, 16), vae_channels=(8, 8))
    save_parts(parts, folder / "model")
    return folder / "model"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ModelError, match=r"unknown model 'sdxl-turbi'.*sdxl-turbo, sdxl-tiny"):
        find_model("sdxl-turbi")


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_part_is_named(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"{missing} is missing"):
        find_model(folder)


def test_pickled_weights_are_refused(folder: Path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"unet holds no weights.*\.bin weights are refused"):
        find_model(folder)


def test_weights_of_the_fp16_variant_are_found(folder: Path):
    plain = load_parts(find_model(folder), precision="fp32", device="cpu")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = folder / part / f"{stem}.safetensors"
        weights.rename(weights.with_name(f"{stem}.fp16.safetensors"))
    half = load_parts(find_model(folder), precision="fp32", device="cpu")
    assert torch.equal(plain.unet.conv_in.weight, half.unet.conv_in.weight)


def test_a_vae_that_overflows_stays_in_fp32(folder: Path):
    config = folder / "vae" / "config.json"
    assert load_parts(find_model(folder), precision="fp16", device="cpu").vae.dtype == torch.float16
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))
    model = find_model(folder)
    assert load_parts(model, precision="fp16", device="cpu").vae.dtype == torch.float32
    assert load_parts(model, precision="bf16", device="cpu").vae.dtype == torch.bfloat16


def test_identity_is_the_weights(saved: Path, folder: Path):
    assert weights_sha256(find_model(folder)) == weights_sha256(find_model(saved))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_sha256(find_model(folder)) != weights_sha256(find_model(saved))


def test_unseen_classes_come_from_the_card(folder: Path):
    model = find_model(folder)
    assert unseen_classes(model, ["disc", "tench"]) == ()
    (folder / "model_card.json").write_text(json.dumps({"class_names": ["disc", "star"]}))
    assert unseen_classes(model, ["disc", "tench"]) == ("tench",)
    assert class_prompts(["disc"]) == ("A photo of a disc",)
    with pytest.raises(ValueError, match=r"must hold \{name\}"):
        class_prompts(["disc"], "A photo")


UNET_BYTES, CUT_BYTES = 24_000_000, 15_000_000  # huggingface_hub keeps whole chunks of 10 MB


class Hub(ThreadingHTTPServer):
    """A fake hub with both repositories; it can cut the UNet's transfer.

    `listed` overrides the listing's entry of a file.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.cut, self.ranges = False, []
        self.files = {
            hub.MODEL_ID: dict.fromkeys(
                [*hub.MODEL_FILES, "tokenizer/special_tokens_map.json"], b"{}"
            ),
            hub.VAE_ID: {name: name.encode() for name in hub.VAE_FILES},
        }
        self.listed: dict[str, dict] = {}
        self.files[hub.MODEL_ID]["unet/diffusion_pytorch_model.fp16.safetensors"] = bytes(
            UNET_BYTES
        )
        self.files[hub.MODEL_ID]["unet/diffusion_pytorch_model.bin"] = b"never wanted"
        self.files[hub.MODEL_ID]["tokenizer/merges.pkl"] = b"never wanted"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        for repository, files in self.server.files.items():
            if path.startswith(f"api/models/{repository}/tree/"):
                self._answer_listing(files)
                return
            if path.startswith(f"{repository}/resolve/"):
                self._answer_file(files[path.split("/", 4)[4]], path)
                return
        self.send_error(404)

    def _answer_listing(self, files: dict[str, bytes]) -> None:
        entries = []
        for name, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 1}
            entries.append(entry | self.server.listed.get(name, {}))
        listing = json.dumps(entries).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(listing)))
        self.end_headers()
        self.wfile.write(listing)

    def _answer_file(self, content: bytes, path: str) -> None:
        cut, start = self.server.cut and len(content) > CUT_BYTES, 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.server.ranges.append((path.rsplit("/", 1)[1], start))
            if cut:
                self.send_error(503)
                return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", path.split("/")[3])
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(content[:CUT_BYTES])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])


@pytest.fixture
def server() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server: Hub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the download in its own process: the hub's address is read at import."""
    script = (
        "from patchbloom.export.hub import DownloadError, fetch_sdxl_turbo\n"
        "try:\n"
        "    print(fetch_sdxl_turbo()[0])\n"
        "except DownloadError as error:\n"
        "    raise SystemExit(str(error))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_an_interrupted_download_says_so_and_goes_on(server: Hub, tmp_path: Path):
    server.cut = True
    stopped = fetch(server, tmp_path)
    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert f"download of {hub.MODEL_ID} did not finish" in last
    assert "run the same command again" in last
    told = stopped.stderr
    assert told.index(hub.LICENCE_NOTE) < told.index(f"downloading 0.02 GB of {hub.MODEL_ID}")

    server.cut = False
    done = fetch(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(name.endswith("fp16.safetensors") and start > 0 for name, start in server.ranges)
    folder = Path(done.stdout.strip())
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").stat().st_size == UNET_BYTES
    assert not (folder / "unet/diffusion_pytorch_model.bin").exists()
    assert not (folder / "tokenizer/merges.pkl").exists()
    assert (folder / "tokenizer/special_tokens_map.json").is_file()

    server.shutdown()
    cached = fetch(server, tmp_path, HF_HUB_OFFLINE="1")
    assert cached.stdout == done.stdout, cached.stderr
    assert hub.LICENCE_NOTE not in cached.stderr


@pytest.mark.parametrize(
    "missing", ["tokenizer_2/tokenizer_config.json", "unet/config.json", "dangling"]
)
def test_a_cache_that_lacks_a_file_is_not_complete(tmp_path: Path, missing: str):
    for name in hub.MODEL_FILES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert hub._is_complete(tmp_path, hub.MODEL_FILES)
    weights = tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors"
    if missing == "dangling":  # left by a file with a wrong sha256
        weights.unlink()
        weights.symlink_to(tmp_path / "blob")
    else:
        (tmp_path / missing).unlink()
    assert not hub._is_complete(tmp_path, hub.MODEL_FILES)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("unet/diffusion_pytorch_model.fp16.safetensors", {"lfs": {"oid": "0" * 64}}),
        ("unet/config.json", {"oid": "0" * 40}),
        ("unet/config.json", {"size": 3}),
    ],
)
def test_a_file_that_is_not_the_hubs_is_removed(
    server: Hub, tmp_path: Path, name: str, wrong: dict
):
    content = server.files[hub.MODEL_ID][name]
    if "lfs" in wrong:
        wrong = {"lfs": {"size": len(content), "pointerSize": 1, **wrong["lfs"]}}
    server.listed[name] = wrong
    refused = fetch(server, tmp_path)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert f"{name} arrived with {len(content)} bytes" in last
    server.listed.clear()
    assert fetch(server, tmp_path).returncode == 0


def test_a_file_that_the_hub_lacks_is_named_before_the_download(server: Hub, tmp_path: Path):
    del server.files[hub.MODEL_ID]["tokenizer_2/vocab.json"]
    refused = fetch(server, tmp_path)
    assert refused.returncode == 1
    assert "the hub has no tokenizer_2/vocab.json at revision" in refused.stderr
    assert "downloading" not in refused.stderr


def test_no_network_is_one_line(server: Hub, tmp_path: Path):
    refused = fetch(server, tmp_path, HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert "did not finish" in last
    assert "give --model a folder with unet/, vae/, text_encoder/, text_encoder_2/" in last
    assert f"cache into {tmp_path / 'hub'} (HF_HOME moves it)" in last
    assert "Traceback" not in refused.stderr
