"""`train prior`: image folder → model folder for --model.

It keeps all training images (uint8) and their latents (fp16) in memory: at most MOST_GIB.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ...engine.data.crops import stream_center
from ...engine.data.images import ImageSet, check_no_class_emptied
from ...engine.data.names import display_names, doubtful_names
from ...engine.expand.backends import resolve_device
from ...engine.expand.prompts import class_prompts
from ...export.documents import read_json
from ...export.durable import differences, full_disk_explained, replace_json
from ...export.models import ModelSource, weights_sha256
from ..config import PriorConfig
from ..data.folder import check_content, images_sha256
from ..data.forms import open_data
from ..options import TrainDecoder, TrainPrior
from ..prior.training import PriorTraining
from ..run.folder import RunError
from ..run.progress import Report
from ..teacher.given import load_teacher

MOST_GIB = 4.0
UNET_BYTES, VAE_BYTES = 430 * 2**20, 20 * 2**20
"""On disk at the default widths: weights, checkpoints, their averages, optimiser states."""
PARTS = 4
"""Version of the initial modules: a begun training goes on only with its own."""
WORK, SETTINGS, CARD = ".work", "settings.json", "model_card.json"


def run_prior(command: TrainPrior, line: str) -> dict[str, Any]:
    """Train the model and describe it; `line` is the command for its card."""
    with Report() as report:
        given = (command.where, command.shapes_per_class)
        (images,) = open_data(command.data, ("train",), report, *given)
        names = display_names(images.class_ids, command.class_names)
        for warning in doubtful_names(images.class_ids, names, class_prompts(names)):
            report.say(warning)
        device, teacher = resolve_device(command.device), None
        if command.teacher is not None:
            size_px = command.prior.image_size
            teacher = load_teacher(
                command.teacher, images.class_ids, size_px=size_px, device=device
            )
        check_memory(len(images), _image_bytes(command.prior), "--image-size or --crops")
        settings = command.prior.as_dict()
        settings |= {"data": images_sha256(images), "classes": list(names), "parts": PARTS}
        with full_disk_explained(command.out, _needed_bytes(command.prior)):
            check_out(command, settings)
            size_px, skip = command.prior.image_size, command.skip_corrupt
            pixels_NHWC, labels_N, skipped = load_images(images, size_px, skip, report)
            start(command, settings)
            check_content(command.out / WORK, (images,), report, begun=True)
            training = PriorTraining(
                *(command.prior, pixels_NHWC, labels_N, names, command.out),
                report=report.say,
                device=device,
            )
            folder = training.run(data=_data_name(command), command=line, teacher=teacher)
    source = ModelSource(folder.name, folder, folder / "vae")
    return {
        "model": str(folder),
        "weights_sha256": weights_sha256(source),
        "images": len(labels_N),
        "skipped": skipped,
        "classes": len(names),
        "card": read_json(folder / CARD, RunError, "give --overwrite to replace the model"),
    }


def _needed_bytes(config: PriorConfig) -> int:
    default = PriorConfig()
    unet = UNET_BYTES * config.width**2 // default.width**2
    return unet + VAE_BYTES * config.vae_width**2 // default.vae_width**2


def _data_name(command: TrainPrior) -> str:
    """Name of the data for the card, without a path of this machine."""
    if command.data == "shapes":
        return f"shapes, {command.shapes_per_class} images per class"
    return Path(command.data).expanduser().resolve().name


def _image_bytes(config: PriorConfig) -> int:
    """Memory of an image and the latents of its views."""
    views = (2 + config.crops) * (1 if config.patch_factor == 1 else 2)
    latents = views * config.latent_channels * (config.image_size // config.vae_factor) ** 2
    return config.image_size**2 * 3 + 2 * latents


def check_memory(images: int, each: int, options: str) -> None:
    """Raise ValueError when so many images, of `each` bytes, exceed MOST_GIB."""
    if images * each > MOST_GIB * 2**30:
        raise ValueError(
            f"{images} images, with all that is kept of them, take {images * each / 2**30:.1f} "
            f"GiB, at most {MOST_GIB:g} are kept in memory: give a folder of at most "
            f"{int(MOST_GIB * 2**30 / each)} images, or a smaller {options}"
        )


def check_out(command: TrainPrior | TrainDecoder, settings: dict[str, Any]) -> None:
    """Raises RunError unless the folder is empty, or --resume or --overwrite applies to it."""
    out, record = command.out, command.out / WORK / SETTINGS
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} exists and is not a folder: choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    begun = record.is_file()
    if not begun and not (out / CARD).is_file():
        raise RunError(f"--out {out} is not empty: choose another --out")
    if not command.resume and not command.overwrite:
        what = "--resume or --overwrite" if begun else "--overwrite"
        raise RunError(f"--out {out} is not empty: {what} the model there, or choose another --out")
    if command.overwrite:
        return
    if not begun:
        raise RunError(
            f"--out {out} holds a model without the training that --resume would go on with (no "
            f"{WORK}/{SETTINGS}): give --overwrite to replace it, or choose another --out"
        )
    before = read_json(record, RunError, "give --overwrite to begin anew", dict[str, Any])
    unsaid = {
        "data": "other images in --data",
        "classes": "other --class-names",
        "model": "other weights of --model",
        "parts": "the model parts of an older version",
    }
    # What no option mends comes first.
    found = sorted(differences(before, settings), key=lambda each: each[0] not in unsaid)
    for key, was, now in found:
        option = f"--{key.replace('_', '-')} {was}, now {now}"
        raise RunError(
            f"{out} was begun with {unsaid.get(key, option)}: "
            "give the same options to --resume, or choose another --out"
        )
    if any(record.parent.glob("*.pt")):
        raise RunError(
            f"{out} was begun by an older version, whose checkpoints ({WORK}/*.pt) are not read: "
            "give --overwrite to begin anew, choose another --out, or go on with that version"
        )


def start(command: TrainPrior | TrainDecoder, settings: dict[str, Any]) -> None:
    """Write the settings. A model to be overwritten stays until the new one is complete."""
    record = command.out / WORK / SETTINGS
    if command.overwrite and record.parent.is_dir():
        record.unlink(missing_ok=True)  # first, so that a partly removed training is not resumed
        shutil.rmtree(record.parent)
    record.parent.mkdir(parents=True, exist_ok=True)
    replace_json(record, settings)


def load_images(
    images: ImageSet, size_px: int, skip_corrupt: bool, report: Report
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All images, centre-cropped: uint8 [N, H, W, 3], their classes, and how many were skipped.

    Raises InputError when skipping leaves a class without an image.
    """
    stream = stream_center(images, size_px=size_px, skip_corrupt=skip_corrupt)
    pixels_NHWC = torch.empty(len(images), size_px, size_px, 3, dtype=torch.uint8)
    labels_N = torch.empty(len(images), dtype=torch.int64)
    count = 0
    for batch in stream:
        end = count + len(batch.labels_B)
        pixels_NHWC[count:end] = batch.pixels_BPHWC[:, 0]
        labels_N[count:end] = batch.labels_B
        count = end
        report.progress("decode", end, len(images), "images")
    check_no_class_emptied(images, labels_N[:count].numpy())
    return pixels_NHWC[:count], labels_N[:count], len(images) - count
