"""Speed of the loader that feeds patch scoring: one decode and P random resized crops per image.

    python bench/bench_score.py --data DIR --peers torchvision --images 1600 --json
    python bench/bench_score.py --data DIR --teacher resnet18 --device cuda --json

The loaders are timed first, without a teacher. Every peer reads the same files, decodes each once,
cuts ``crops`` square crops of 8 to 100 % of the area, resizes them to size // 2 px with
antialiasing and returns uint8 batches. ``threads`` counts torchvision's worker processes; for us it
counts the decoding threads and, separately, the resizing threads, so that we run more at once where
there are more than 2 cores. Building our pipelines is inside the clock of every pass; torchvision's
workers start before it.

Peers: ``torchvision`` is the usual ImageFolder + DataLoader with Pillow images;
``torchvision-tensor`` crops uint8 tensors instead, which is faster.

``--teacher`` then finds the bottleneck: our loader alone, the teacher alone on resident crops, and
both, as scoring runs them. The slower half bounds: on a GPU both together come close to it, and on
a CPU they share its cores. The teacher has random weights, which do not affect speed, and sees
padded patches, as scoring does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measure import Rate, environment, measure_rates, publish, ratios, run_program
from patchbloom.engine.data.boxes import RandomResizedCrops
from patchbloom.engine.data.crops import CropStream, stream_crops
from patchbloom.engine.data.images import ImageSet, open_image_set
from patchbloom.engine.select.scores import IMAGENET_MEAN_RGB, PatchScorer
from patchbloom.kernels.noise import Draw
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SCALE, RATIO = (0.08, 1.0), (1.0, 1.0)
MOST_DIFFERENCE = {"cpu": (2, 1.0), "cuda": (255, 3.0)}
"""Allowed difference from Pillow's crops, of 255: largest and mean. A GPU decodes JPEG colours
differently, so only the mean counts there."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decode + random resized crops, images per second."""

    data: Path
    """An ImageFolder with train/, or a plain one."""
    peers: tuple[Literal["torchvision", "torchvision-tensor"], ...] = ()
    """Loaders to compare with."""
    images: int = 1600
    """Files per pass, spread evenly over the set."""
    crops: int = 5
    size: int = 224
    """Image size in px; crops are half as large."""
    batch: int = 64
    threads: int = 2
    rounds: int = 5
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of DALI's decoding and of the teacher: cpu or cuda."""
    teacher: str | None = None
    """Architecture of a teacher to time too, such as resnet18. Default: none."""
    teacher_images: int = 256
    """Files per teacher pass: 5 canvases each."""
    seed: int = 0
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def open_stream(options: Options, images: ImageSet, order: np.ndarray) -> CropStream:
    """Our loader's crops of these images."""
    boxes = RandomResizedCrops(
        crops=options.crops, seed=options.seed, draw=Draw.SCORING_CROP, scale=SCALE, ratio=RATIO
    )
    return stream_crops(
        images,
        order,
        boxes,
        crops=options.crops,
        size_px=options.size // 2,
        batch=options.batch,
        device=options.device,
        threads=options.threads,
    )


def dali_pass(options: Options, images: ImageSet, order: np.ndarray) -> Callable[[], int]:
    """One pass of our loader."""
    return lambda: sum(len(batch.pixels_BPHWC) for batch in open_stream(options, images, order))


def measure_teacher(options: Options, name: str, images: ImageSet) -> dict[str, Any]:
    """Time the loader alone, the teacher alone and both, on the same files; name the bottleneck."""
    from patchbloom.train.networks import build_network  # Imported here: these need diffusers,
    from patchbloom.train.teacher.teacher import Teacher  # which the loaders alone do not.

    count = min(options.teacher_images, len(images))
    order = np.linspace(0, len(images) - 1, count).astype(np.int64)
    teacher = Teacher(
        build_network(name, len(images.class_ids), options.size),
        architecture=name,
        class_ids=images.class_ids,
        size_px=options.size,
        device=options.device,
    )
    scorer = PatchScorer(
        teacher.logits_from_uint8,
        len(images.class_ids),
        options.size,
        options.batch * options.crops,
        IMAGENET_MEAN_RGB,
    )
    resident = list(open_stream(options, images, order))

    def score(batches: Any) -> int:
        return sum(len(scorer(each.pixels_BPHWC, each.labels_B)[0]) for each in batches)

    passes = {
        "loader": dali_pass(options, images, order),
        "teacher": lambda: score(resident),
        "both": lambda: score(open_stream(options, images, order)),
    }
    rates = measure_rates(passes, rounds=options.rounds)
    bottleneck = min(("loader", "teacher"), key=lambda half: rates[half].p50)
    print_rates(rates)
    reached = rates["both"].p50 / rates[bottleneck].p50
    print(f"the {bottleneck} bounds; both together reach {100 * reached:.0f} % of it alone")
    return {
        "teacher": name,
        "teacher_images": count,
        "teacher_spread": {half: rate.row() for half, rate in rates.items()},
        "bottleneck": bottleneck,
        "both_over_bottleneck": round(reached, 3),
    }


class ManyCrops:
    """Transform: Pillow image → uint8 [P, 3, H, W]; a class, so that workers can unpickle it."""

    def __init__(self, crops: int, size_px: int, on_tensor: bool) -> None:
        self.crops, self.on_tensor = crops, on_tensor
        self.crop = v2.RandomResizedCrop(size_px, scale=SCALE, ratio=RATIO, antialias=True)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self.on_tensor:
            pixels = v2.functional.pil_to_tensor(image)
            return torch.stack([self.crop(pixels) for _ in range(self.crops)])
        crops = [v2.functional.pil_to_tensor(self.crop(image)) for _ in range(self.crops)]
        return torch.stack(crops)


def torchvision_pass(
    options: Options, images: ImageSet, order: np.ndarray, *, on_tensor: bool
) -> Callable[[], int]:
    """One pass of torchvision's loader over the same files."""
    transform = ManyCrops(options.crops, options.size // 2, on_tensor)
    folder = ImageFolder(str(images.root), transform)
    if [sample[0] for sample in folder.samples] != [str(images.root / p) for p in images.paths]:
        raise RuntimeError(f"{images.root}: torchvision lists other files than we do")
    loader = DataLoader(
        Subset(folder, order.tolist()),
        batch_size=options.batch,
        num_workers=options.threads,
        persistent_workers=True,
    )
    return lambda: sum(len(pixels) for pixels, _ in loader)


def check_crops(options: Options, images: ImageSet, order: np.ndarray) -> dict[str, float]:
    """Compare our crops of a few images with Pillow's of the same boxes, before timing.

    They are decoded and cut on the device that is timed. Mirrored crops are the negative control.
    Returns, of 255, the largest and the mean difference, and the control's mean. Raises
    RuntimeError when ours are too far from Pillow's, or the control is not.
    """
    size_px = options.size // 2
    same, mirrored = [], []
    for batch in open_stream(options, images, order[:8]):
        for b, index in enumerate(batch.index_B.tolist()):
            path = images.root / images.paths[index]
            upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            for p, (top, left, height, width) in enumerate(batch.boxes_BP4[b].tolist()):
                crop = upright.crop((left, top, left + width, top + height))
                expected = np.asarray(crop.resize((size_px, size_px), Image.Resampling.BILINEAR))
                ours = batch.pixels_BPHWC[b, p].cpu().numpy().astype(int)
                same.append(np.abs(ours - expected))
                mirrored.append(np.abs(ours[:, ::-1] - expected))
    found = {
        "max": float(np.max(same)),
        "mean": round(float(np.mean(same)), 3),
        "mirrored_mean": round(float(np.mean(mirrored)), 3),
    }
    most, mean = MOST_DIFFERENCE[options.device]
    if found["max"] > most or found["mean"] > mean:
        raise RuntimeError(
            f"our crops differ from Pillow's by {found['max']:.0f} of 255 at most, {found['mean']} "
            f"on average; expected {most} and {mean}; no speed is reported"
        )
    if found["mirrored_mean"] <= mean:
        raise RuntimeError(
            f"the gate cannot tell crops from mirrored ones (they differ by "
            f"{found['mirrored_mean']} of 255): the images of {options.data} show too little; no "
            "speed is reported"
        )
    return found


def print_rates(rates: dict[str, Rate]) -> None:
    """Print one line per rate."""
    for name, rate in rates.items():
        row = rate.row()
        quantiles = f"p20 {row['p20']:.0f}  p80 {row['p80']:.0f}  n {row['n']}"
        print(f"{name:20} {row['p50']:8.0f} images/s   {quantiles}")


def main(options: Options) -> None:
    """Gate, measure, report."""
    images = open_image_set(options.data, "train")
    count = min(options.images, len(images))
    order = np.linspace(0, len(images) - 1, count).astype(np.int64)
    difference = check_crops(options, images, order)
    passes = {"dali": dali_pass(options, images, order)}
    for peer in options.peers:
        passes[peer] = torchvision_pass(
            options, images, order, on_tensor=peer == "torchvision-tensor"
        )
    rates = measure_rates(passes, rounds=options.rounds)
    speedups = {name: ratios(rates["dali"], rates[name]) for name in options.peers}
    print_rates(rates)
    scored = measure_teacher(options, options.teacher, images) if options.teacher else {}
    row = environment(options.device) | {
        "benchmark": "score",
        "images_per_s": {name: round(rate.p50, 1) for name, rate in rates.items()},
        "spread": {name: rate.row() for name, rate in rates.items()},
        "speedup": {name: round(speedup.p50, 2) for name, speedup in speedups.items()},
        "speedup_spread": {name: speedup.row() for name, speedup in speedups.items()},
        "images": count,
        "crops": options.crops,
        "crop_px": options.size // 2,
        "batch": options.batch,
        "threads": options.threads,
        "data": options.data.resolve().name,
        "decoder": options.device,
        "difference_from_pillow": difference,
        **scored,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
