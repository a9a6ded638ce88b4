"""`train decoder`, and models whose images a tiny decoder makes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import write_small_model, write_small_set
from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline
from patchbloom.export.config import EngineSpec
from patchbloom.export.graphs import make_graphs
from patchbloom.export.models import (
    TINY_DECODER,
    ModelError,
    find_model,
    load_parts,
    weights_bytes,
    weights_sha256,
)
from patchbloom.export.modules import TinyLatentDecoder
from patchbloom.export.parity import check_parity, make_reference
from patchbloom.export.to_onnx import export_onnx
from patchbloom.export.to_ort import OrtSession
from patchbloom.train.commands.decoder import run_decoder
from patchbloom.train.config import DecoderConfig
from patchbloom.train.options import TrainDecoder
from patchbloom.train.run.folder import RunError

SPEC = EngineSpec(size_px=32, batch=2)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> TrainDecoder:
    """A decoder trained for 120 steps."""
    folder = tmp_path_factory.mktemp("decoder")
    write_small_model(folder)
    (folder / "model" / "model_card.json").write_text(json.dumps({"class_names": ["disc"]}))
    command = TrainDecoder(
        model=str(folder / "model"),
        data=str(write_small_set(folder)),
        out=folder / "fast",
        decoder=DecoderConfig(steps=120, batch=4, width=8),
        device="cpu",
    )
    run_decoder(command, "train decoder")
    return command


def decoded(folder: Path | str) -> torch.Tensor:
    parts = load_parts(find_model(folder), precision="fp32", device="cpu")
    *_, decoder = make_graphs(parts, SPEC, tokens=77)
    assert isinstance(decoder.module, TinyLatentDecoder) == (Path(folder).name != "model")
    with torch.no_grad():
        return decoder.module(0.5 * decoder.random_inputs(0)[0])


def test_it_learns_what_the_own_decoder_makes(command: TrainDecoder, tmp_path: Path) -> None:
    card = json.loads((command.out / TINY_DECODER / "card.json").read_text())
    assert card["made_by"] == "train decoder"
    assert decoded(command.model).shape == decoded(command.out).shape == (2, 3, 32, 32)
    once = replace(command, out=tmp_path / "once", decoder=replace(command.decoder, steps=1))
    untrained = run_decoder(once, "train decoder")["card"]["psnr_db_to_own_decoder"]
    assert card["psnr_db_to_own_decoder"] > untrained + 6


def test_the_folder_is_a_model_of_its_own(command: TrainDecoder, tmp_path: Path) -> None:
    own, fast = find_model(command.model), find_model(command.out)
    assert weights_sha256(fast) != weights_sha256(own)
    assert weights_bytes(fast) > weights_bytes(own)
    random = [find_model(each, "random") for each in (command.model, command.out)]
    assert weights_sha256(random[0]) != weights_sha256(random[1])
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert json.loads((command.out / "model_card.json").read_text()) == {"class_names": ["disc"]}
    assert (command.out / unet).samefile(Path(command.model) / unet), "no second copy"
    StableDiffusionXLImg2ImgPipeline.from_pretrained(command.out)
    AutoencoderTiny.from_pretrained(command.out / TINY_DECODER)
    for weights in ("random", "pretrained"):
        parts = load_parts(find_model(command.out, weights), precision="fp32", device="cpu")
        *_, decoder = make_graphs(parts, SPEC, tokens=77)
        assert isinstance(decoder.module, TinyLatentDecoder)
    export_onnx(decoder, tmp_path / "decoder.onnx", native_group_norm=False)
    check_parity(make_reference(decoder), OrtSession(tmp_path / "decoder.onnx", "cpu").run)


def test_what_would_harm_a_model_is_refused(command: TrainDecoder) -> None:
    def told(**changes: Any) -> str:
        with pytest.raises((RunError, ValueError)) as caught:
            run_decoder(replace(command, **changes), "train decoder")
        return str(caught.value)

    assert "give the model without it" in told(model=str(command.out))
    assert "is the model's own folder" in told(out=Path(command.model))
    assert "--resume or --overwrite" in told()
    other = DecoderConfig(steps=121, batch=4, width=8)
    assert "--steps 120, now 121" in told(decoder=other, resume=True)
    assert "expected a multiple of 4" in told(image_size=30, resume=True)
    before = (command.out / TINY_DECODER / "card.json").read_bytes()
    run_decoder(replace(command, resume=True), "again")
    after = json.loads((command.out / TINY_DECODER / "card.json").read_bytes())
    assert {**after, "made_by": "train decoder"} == json.loads(before)


def test_a_decoder_of_other_latents_is_named(command: TrainDecoder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(command.out, folder)
    config = folder / TINY_DECODER / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 16}))
    with pytest.raises(ModelError, match=r"tiny_decoder/config.json: expected .* \(16, 4, 1.0\)"):
        find_model(folder)
    next((folder / TINY_DECODER).glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        find_model(folder)
