"""`train decoder`: a model and images → the model with a tiny decoder, as a folder for --model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from ...engine.config import usual_px
from ...engine.expand.backends import resolve_device
from ...export.durable import full_disk_explained
from ...export.models import TINY_DECODER, ModelSource, find_model, load_vae, weights_sha256
from ..data.folder import check_content, images_sha256
from ..data.forms import open_data
from ..options import TrainDecoder
from ..prior.decoder import DecoderTraining
from ..prior.model import move_model
from ..run.folder import RunError
from ..run.progress import Report
from .prior import WORK, check_memory, check_out, load_images, start

NEEDED_BYTES = 20 * 2**20


def run_decoder(command: TrainDecoder, line: str) -> dict[str, Any]:
    """Train the decoder and write the model with it; `line` is the command for its card."""
    model, out = find_model(command.model), command.out
    if model.has_tiny_decoder:
        raise ValueError(f"--model {command.model} has a tiny decoder: give the model without it")
    if out.exists() and out.resolve() == model.folder:
        raise RunError(f"--out {out} is the model's own folder: choose another --out")
    size_px = command.image_size or usual_px(model.trained_px())
    if size_px % model.vae_factor():
        raise ValueError(
            f"--image-size {size_px}: expected a multiple of {model.vae_factor()}, by which the "
            f"VAE of {model.name} shrinks images"
        )
    device = resolve_device(command.device)
    with Report() as report:
        (images,) = open_data(
            command.data, ("train",), report, command.where, command.shapes_per_class
        )
        check_memory(len(images), 3 * size_px**2, "--image-size")
        settings = {
            **vars(command.decoder),
            "image_size": size_px,
            "model": weights_sha256(model),
            "data": images_sha256(images),
        }
        with full_disk_explained(out, NEEDED_BYTES):
            check_out(command, settings)
            pixels_NHWC, _, skipped = load_images(images, size_px, command.skip_corrupt, report)
            start(command, settings)
            check_content(out / WORK, (images,), report, begun=True)
            vae = load_vae(model, torch.float32, device)
            training = DecoderTraining(
                *(command.decoder, pixels_NHWC, vae, out / WORK), report.say, device
            )
            tiny = training.run()
            card = {
                "made_by": line,
                "images": len(pixels_NHWC),
                "skipped": skipped,
                **settings,
                "torch": torch.__version__,
                "seconds": round(training.phase.seconds, 1),
                "psnr_db_to_own_decoder": round(training.psnr_db(tiny), 2),
            }
            report.say(f"{card['psnr_db_to_own_decoder']} dB to the model's own decoder")
            building = out / ".building"
            shutil.rmtree(building, ignore_errors=True)
            _link(model, building)
            _save(tiny, building / TINY_DECODER)
            (building / TINY_DECODER / "card.json").write_text(
                json.dumps(card, indent=1, allow_nan=False) + "\n"
            )
            move_model(building, out)
    source = ModelSource(out.name, out, out / "vae")
    return {"model": str(out), "weights_sha256": weights_sha256(source), "card": card}


def _save(tiny: AutoencoderTiny, folder: Path) -> None:
    tiny.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["block_out_channels"]  # diffusers writes it, and warns of it when it reads it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _link(model: ModelSource, folder: Path) -> None:
    """The model's files in `folder`; the weights are the same ones where the disk allows it."""

    def link(source: str, target: str) -> None:
        try:
            if not source.endswith(".safetensors"):
                raise OSError
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copyfile(source, target)

    ignored = shutil.ignore_patterns(".*", "vae", "samples.png")
    shutil.copytree(model.folder, folder, copy_function=link, ignore=ignored)
    shutil.copytree(model.vae_folder, folder / "vae", copy_function=link)
