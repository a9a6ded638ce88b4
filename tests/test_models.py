"""Models by name and folder: refusals, and the download of SDXL-Turbo from a failing hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from patchbloom.engine.expand.prompts import class_prompts, unseen_classes
from patchbloom.export import hub
from patchbloom.export.models import (
    ModelError,
    find_model,
    load_parts,
    load_text_encoder,
    weights_sha256,
)
from patchbloom.train.prior.model import new_parts, save_parts
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode


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


class RandomNumbers(TorchDispatchMode):
    """Fails on random numbers that are drawn off the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__.rstrip("_")
        drawn = name in ("normal", "uniform", "randn", "rand", "trunc_normal")
        assert not (drawn and getattr(args[0], "is_meta", False) is False), name
        return func(*args, **(kwargs or {}))


def test_loading_draws_no_random_weights():
    """SDXL has 2.6 billion: 40 s of a CPU, and all are overwritten."""
    model = find_model("sdxl-tiny")
    with RandomNumbers():
        load_parts(model, precision="fp32", device="cpu")
        load_text_encoder(model, "text_encoder", device="cpu")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ModelError, match=r"unknown model 'sdxl-turbi'.*sdxl-turbo, sdxl-tiny"):
        find_model("sdxl-turbi")


@pytest.mark.parametrize(
    "missing",
    [
        *("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
        *("tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json"),
    ],
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


STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the four networks, as they are loaded."""
    model = find_model(folder)
    networks = vars(load_parts(model, precision="fp32", device="cpu"))
    for part in ("text_encoder", "text_encoder_2"):
        networks[part] = load_text_encoder(model, part, device="cpu")[1]
    return {
        f"{part}.{name}": value
        for part, network in networks.items()
        if network is not None  # no tiny decoder
        for name, value in network.state_dict().items()
    }


def split_weights(folder: Path, part: str, *, variant: str = "") -> Path:
    """Replace the part's weights by two shards and their index, which is returned."""
    weights = folder / part / f"{STEMS[part]}.safetensors"
    tensors = load_file(weights)
    names, listed = sorted(tensors), {}
    for number, kept in enumerate((names[::2], names[1::2]), 1):
        shard = f"{STEMS[part]}{variant}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in kept}, weights.with_name(shard))
        listed |= dict.fromkeys(kept, shard)
    weights.unlink()
    index = weights.with_name(f"{STEMS[part]}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_loaded_and_hashed(saved: Path, folder: Path, variant: str):
    indices = [split_weights(folder, part, variant=variant) for part in STEMS]
    expected, loaded = load_all(saved), load_all(folder)
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    hashes = {weights_sha256(find_model(folder))}
    for index in indices:
        shard = index.with_name(f"{index.name.split('.')[0]}{variant}-00002-of-00002.safetensors")
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        hashes.add(weights_sha256(find_model(folder)))
        index.write_text(index.read_text() + " ")
        hashes.add(weights_sha256(find_model(folder)))
    assert len(hashes) == 1 + 2 * len(indices)


@pytest.mark.parametrize("part", STEMS)
def test_an_index_beside_a_plain_file_is_refused(folder: Path, part: str):
    """It would decide what is loaded, and the hash would be that of the plain file."""
    weights = folder / part / f"{STEMS[part]}.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: value + 1 for name, value in tensors.items()}, weights.with_name("other.safetensors")
    )
    index = weights.with_name(f"{weights.name}.index.json")
    listed = dict.fromkeys(tensors, "other.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    with pytest.raises(
        ModelError, match=f"{part}: expected {weights.name} or {index.name}, got both"
    ):
        find_model(folder)


@pytest.mark.parametrize(
    "name",
    ["evil.bin", "../../stolen.safetensors", "/stolen.safetensors", "a/b.safetensors", 7, {}],
)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_names_safetensors_beside_it(folder: Path, part: str, name: object):
    index = split_weights(folder, part)
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"{index.name}: expected names of \.safetensors files"):
        find_model(folder)


def test_a_shard_that_is_missing_or_holds_a_tensor_twice_is_named(folder: Path):
    index = split_weights(folder, "unet")
    first, second = sorted(index.parent.glob("*.safetensors"))
    tensors = load_file(second)
    save_file(load_file(first) | tensors, first)
    with pytest.raises(ModelError, match=f"{second}: .* is in another file of {index.parent} too"):
        load_parts(find_model(folder), precision="fp32", device="cpu")
    second.unlink()
    with pytest.raises(ModelError, match=f"{second} is missing, but {index.name} names it"):
        find_model(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match=f"{index}: expected a weight_map"):
        find_model(folder)


def test_weights_may_be_links_as_in_the_hubs_cache(saved: Path, folder: Path):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert weights_sha256(find_model(folder)) == weights_sha256(find_model(saved))
    assert load_all(folder).keys() == load_all(saved).keys()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize("part", STEMS)
def test_weights_that_do_not_fit_are_refused(folder: Path, part: str, fault: str):
    """Missing ones would be random, and other ones with every start."""
    weights = folder / part / f"{STEMS[part]}.safetensors"
    tensors = load_file(weights)
    first = max(name for name in tensors if name.endswith(".weight"))
    if fault == "missing":
        del tensors[first]
    else:
        tensors[f"x.{first}" if fault == "unexpected" else first] = torch.ones(3)
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=rf"{folder / part}: expected .* got {fault} tensors: "):
        load_all(folder)


def test_damaged_weights_are_named(folder: Path):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"{weights} is damaged"):
        load_all(folder)


def test_clip_weights_as_published_are_loaded(saved: Path, folder: Path):
    """SDXL's first encoder prefixes its names; older checkpoints hold position_ids as well."""
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": value for name, value in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, weights, metadata={"format": "pt"})
    expected, loaded = load_all(saved), load_all(folder)
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The names that were looked up; none of them is found."""
    asked: list[object] = []

    def look_up(name: object, *_: object, **__: object) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_folder_without_a_tokenizer_is_named(folder: Path, no_network: list[object]):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match=r"tokenizer/tokenizer_config\.json is missing"):
        find_model(folder)
    assert not no_network


@pytest.mark.parametrize("text", ["[]", '{"version": "1.0"', "[" * 100_000, "\0"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(folder: Path, no_network: list[object], file: str, text: str):
    (folder / "tokenizer_2" / file).write_text(text)
    with pytest.raises(ModelError, match=f"{folder / 'tokenizer_2' / file}(: | is not)") as refused:
        find_model(folder)
    assert "\n" not in str(refused.value)
    assert not no_network


WILD = {
    "empty": "{}",
    "quantised": '{"quantization_config": {"quant_method": "bitsandbytes"}}',
    "huge": " " * (1 << 23),
    "a huge number": '{"sample_size": %s}' % ("9" * 5000),
    "many layers": '{"layers_per_block": 1000000000}',
    "nested": '{"a": ' * 100_000 + "0" + "}" * 100_000,
    "a list": "[]",
    "cut": '{"sample_size": 8',
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", WILD.values(), ids=WILD.keys())
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_wild_configuration_is_named(folder: Path, part: str, text: str):
    config = folder / part / "config.json"
    config.write_text(text, errors="surrogateescape")
    with pytest.raises(ModelError, match=str(config.parent)) as refused:
        load_all(folder)
    assert len(str(refused.value)) < 600
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"sample_size": "64"}),
        ("unet", {"cross_attention_dim": [64, 64]}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"down_block_types": ["Zed"]}),
        ("unet", {"block_out_channels": [-4, 8, 8]}),
        ("vae", {"block_out_channels": [8] * 100}),
        ("vae", {"block_out_channels": None}),
        ("vae", {"act_fn": 3}),
        ("text_encoder", {"hidden_size": -4}),
        ("text_encoder", {"hidden_act": "zed"}),
        ("text_encoder_2", {"num_attention_heads": 0}),
        ("text_encoder_2", {"hidden_size": "wide"}),
    ],
)
def test_a_wrong_value_of_a_configuration_is_named(folder: Path, part: str, changes: dict):
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError, match=str(config)) as refused:
        load_all(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": 65_536}),
        ("unet", {"transformer_layers_per_block": 65_536}),
        ("vae", {"layers_per_block": 65_536}),
        ("text_encoder", {"num_hidden_layers": 65_536}),
        ("text_encoder", {"intermediate_size": 65_536}),
        ("text_encoder_2", {"vocab_size": 65_536, "max_position_embeddings": 65_536}),
    ],
)
def test_a_huge_configuration_is_refused_while_it_is_built(folder: Path, part: str, changes: dict):
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    started_s = time.perf_counter()
    with pytest.raises(ModelError, match=f"{config} .*expected at most .* got more"):
        load_all(folder)
    assert time.perf_counter() - started_s < 30


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "hidden_size"),
        ("text_encoder_2", "hidden_size"),
        ("text_encoder_2", "projection_dim"),
        ("unet", "cross_attention_dim"),
        ("unet", "projection_class_embeddings_input_dim"),
    ],
)
def test_text_encoders_of_another_unet_are_refused(folder: Path, part: str, name: str):
    config = folder / part / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {name: 2 * values[name]}))
    with pytest.raises(ModelError, match=r"expected a UNet for embeddings of widths") as refused:
        find_model(folder)
    for named in ("unet", "text_encoder", "text_encoder_2"):
        assert str(folder / named / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_configuration_cannot_name_a_hubs_code(folder: Path, no_network: list[object]):
    config = folder / "text_encoder" / "config.json"
    named = {"attn_implementation": "kernels-community/flash-attn2"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    encoder = load_text_encoder(find_model(folder), "text_encoder", device="cpu")[1]
    assert encoder.config._attn_implementation == "sdpa"
    assert not no_network


@pytest.mark.parametrize("card", ["{}", '{"class_names": 7}', '{"class_names": [1]}', "[]", "{"])
def test_a_card_without_class_names_is_named(folder: Path, card: str):
    path = folder / "model_card.json"
    path.write_text(card)
    with pytest.raises(ModelError, match=f"^{path}(: expected| is not valid JSON)"):
        unseen_classes(find_model(folder), ["disc"])


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
