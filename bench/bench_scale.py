"""How cost grows: with the batch, classes, images, epochs and processes; and what ImageNet takes.

    python bench/bench_scale.py --data DIR --json
    python bench/bench_scale.py --parts scoring --quick --no-record

expansion   images/s against the engine's batch
coreset     generated classes, IPC 1: write, verify, read, open, expand; with room for few prompts'
            keys and values
scoring     images scored by a small untrained teacher: memory must stay flat (± 5 %)
labels      dense soft labels against epochs: seconds and bytes
ranks       `torchrun N train labels`, from a teacher that is there: the whole command with its
            start, on the CPU with gloo; the gate is one content_sha256 at any N
projection  what ImageNet-1k and -21k would take at these rates, or those of --rates

Every point runs in a process of its own (scale_points.py); its peak memory is that process's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from measure import environment, publish
from patchbloom.engine.backends import resolve_device
from patchbloom.engine.coreset import open_coreset
from patchbloom.export.config import DeviceName, Weights
from projection import missing_rates, project, read_rates, table

Part = Literal["expansion", "coreset", "scoring", "labels", "ranks", "projection"]
Point = dict[str, Any]
PARTS: tuple[Part, ...] = ("expansion", "coreset", "scoring", "labels", "ranks", "projection")
FLAT = 0.05
POINTS = Path(__file__).with_name("scale_points.py")
AXES = {"expansion": "batch", "coreset": "classes", "scoring": "images", "labels": "epochs"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How cost grows."""

    parts: tuple[Part, ...] = PARTS
    """Which of them to run; projection alone needs --rates."""
    quick: bool = False
    """Few and small points, whatever the sizes below say."""
    data: Path | None = None
    """For scoring: an ImageFolder with train/, or a plain one; None: generated images of 64 px.
    Where it has fewer images than a point, they are listed again, and the row says so."""
    model: str = "sdxl-tiny"
    """Name or folder of a model; of labels and ranks too."""
    weights: Weights = "pretrained"
    """`random`, for expansion and coreset: the architecture alone."""
    backend: str = "eager"
    """Of the expander: eager, ort, inductor or trt; eager-bf16 is another precision."""
    device: DeviceName = "auto"
    """`auto` is cuda where there is one; ranks are measured on the CPU."""
    size: int = 64
    """Image size of expansion in px; patches have half of it."""
    coreset_size: int = 32
    """The same for coresets: 10,000 classes are 40,000 patches to write and encode."""
    batches: tuple[int, ...] = (1, 4, 16, 32, 64)
    classes: tuple[int, ...] = (10, 1000, 10_000)
    cached_prompts: int = 64
    """Prompts whose keys and values have room in the part coreset."""
    images: tuple[int, ...] = (1000, 3000, 9000)
    epochs: tuple[int, ...] = (1, 8, 64)
    worlds: tuple[int, ...] = (1, 2)
    score_size: int = 224
    """Image size of scoring in px; crops have half of it."""
    teacher: str = "convnet-d3-w8"
    """Untrained network of the part scoring."""
    expanded: int = 128
    """Images of one timed pass of expansion and coreset."""
    shapes_per_class: int = 100
    """Generated training images of a class, for labels and ranks."""
    rates: Path | None = None
    """For the projection: a results file, whose last row is taken; None: this run's rates."""
    threads: int = 2
    rounds: int = 3
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""

    def sized(self) -> Options:
        """Itself, or its quick form."""
        if not self.quick:
            return self
        return replace(
            self,
            batches=(1, 8),
            classes=(10, 200),
            images=(100, 300),
            epochs=(1, 2),
            worlds=(1, 2),
            score_size=64,
            expanded=32,
            shapes_per_class=20,
            rounds=1,
        )


def points_of(options: Options, part: str, device: str) -> list[Point]:
    """What each child process is asked for."""
    expander = {
        "model": options.model,
        "weights": options.weights,
        "backend": options.backend,
        "device": device,
    }
    shared = {"images": options.expanded, "rounds": options.rounds}
    if part == "expansion":
        sized = {"expander": expander | {"size_px": options.size}, "classes": 10, **shared}
        return [sized | {"batch": batch} for batch in options.batches]
    if part == "coreset":
        sized = {"expander": expander | {"size_px": options.coreset_size}, "batch": 32, **shared}
        room = {"cached_prompts": options.cached_prompts}
        return [sized | room | {"classes": count} for count in options.classes]
    if part == "scoring":
        asked = {
            "data": options.data and str(options.data.expanduser()),
            "size_px": options.score_size,
            "crops": 5,
            "batch": 64,
            "teacher": options.teacher,
            "device": device,
            "threads": options.threads,
        }
        return [asked | {"images": count} for count in options.images]
    asked = {
        "model": options.model,
        "backend": options.backend.partition("-")[0],
        "device": device,
        "shapes_per_class": options.shapes_per_class,
    }
    return [asked | {"epochs": count} for count in options.epochs]


def run_point(part: str, asked: Point, threads: int) -> Point:
    """What a child measured, with the point's place on its axis.

    RuntimeError: a child that failed; it has said why on stderr.
    """
    words = [sys.executable, str(POINTS), part, str(threads), json.dumps(asked)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    axis = AXES[part]
    if done.returncode:
        raise RuntimeError(f"{part}, {axis} {asked[axis]}: the child ended with {done.returncode}")
    return {axis: asked[axis], **json.loads(done.stdout.splitlines()[-1])}


def run_ranks(options: Options) -> list[Point]:
    """One teacher, then labels by worlds of every size, each from a copy of that run.

    RuntimeError: a command that failed, or coresets that differ.
    """
    with tempfile.TemporaryDirectory() as name:
        prepared, points = Path(name) / "prepared", []
        asked = ["--data", "shapes", "--model", options.model, "--backend", "eager"]
        asked += ["--device", "cpu", "--epochs", str(options.epochs[-1]), "--engine-batch", "8"]
        asked += ["--teacher-epochs", "1", "--shapes-per-class", str(options.shapes_per_class)]
        _train([_script("train")], "teacher", prepared, asked)
        for size in options.worlds:
            out = Path(name) / f"world{size}"
            shutil.copytree(prepared, out)
            launch = [_script("torchrun"), "--standalone", "--nproc-per-node", str(size)]
            began = time.perf_counter()
            _train([*launch, _script("train")], "labels", out, asked)
            points.append(
                {
                    "world": size,
                    "seconds": round(time.perf_counter() - began, 2),
                    "content_sha256": open_coreset(out / "coreset").content_sha256,
                }
            )
    if len({point["content_sha256"] for point in points}) != 1:
        raise RuntimeError(f"ranks: expected one coreset at any world size, got {points}")
    return points


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _train(launch: list[str], stage: str, out: Path, asked: list[str]) -> None:
    words = [*launch, stage, "--out", str(out), *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # at more threads, the ranks share cores
    done = subprocess.run(words, stdout=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"ranks: {' '.join(words[:5])} … ended with {done.returncode}")


def growth(points: list[Point]) -> dict[str, dict[str, Any]]:
    """Of the peaks on the host, and on the GPU if there is one: largest over smallest, less 1.

    A process is some 0.9 GB of libraries, beside which a slow leak would look flat: so also what
    every image more has taken between the first and the last point.
    """
    found = {}
    for key in ("peak_bytes", "peak_gpu_bytes"):
        peaks = [point[key] for point in points]
        if not all(peaks):
            continue
        grown, more = max(peaks) / min(peaks) - 1, points[-1]["images"] - points[0]["images"]
        each = (peaks[-1] - peaks[0]) / more if more else 0.0
        found[key] = {
            "growth": round(grown, 4),
            "bytes_per_image": round(each),
            "flat": grown <= FLAT,
        }
    return found


def rates_of(measured: dict[str, list[Point]]) -> dict[str, float]:
    """Rates of the largest points, as a projection wants them; only those that were measured."""
    rates = {}
    if "scoring" in measured:
        rates["score_images_per_s"] = measured["scoring"][-1]["images_per_s"]
    if "labels" in measured:
        rates["labels_per_s"] = measured["labels"][-1]["labels_per_s"]
    if "coreset" in measured:
        largest = measured["coreset"][-1]
        patches = 4 * largest["classes"]
        rates["write_patches_per_s"] = round(patches / largest["write_s"], 1)
        rates["bytes_per_patch"] = round(largest["patch_bytes"] / patches, 1)
        rates["bytes_per_prompt"] = largest["all_keys_values_bytes"] / largest["classes"]
    return rates


def show(part: str, points: list[Point]) -> None:
    """A line per point."""
    print(f"\n{part}")
    for point in points:
        cells = []
        for name, value in point.items():
            if name.endswith("_bytes"):
                cells.append(f"{name.removesuffix('_bytes')} {value / 1e6:,.1f} MB")
            elif isinstance(value, dict):
                cells.append(f"{name} {value['p50']:,.1f}")
            else:
                cells.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}")
        print("  " + "   ".join(cells))


def main(options: Options) -> None:
    """Run the parts, one child after the other, and report."""
    options, device = options.sized(), resolve_device(options.device)
    given = read_rates(options.rates.expanduser()) if options.rates else None
    measured: dict[str, list[Point]] = {}
    for part in options.parts:
        if part == "ranks":
            measured[part] = run_ranks(options)
        elif part != "projection":
            asked = points_of(options, part, device)
            measured[part] = [run_point(part, each, options.threads) for each in asked]
        if part in measured:
            show(part, measured[part])
    row: dict[str, Any] = environment(device) | {
        "benchmark": "scale",
        "model": options.model,
        "weights": options.weights,
        "backend": options.backend,
        "size_px": {"expansion": options.size, "coreset": options.coreset_size},
        "points": measured,
        "rates": rates_of(measured),
        "threads": options.threads,
        "rounds": options.rounds,
        "score_px": options.score_size,
        "teacher": options.teacher,
        "data": "generated" if options.data is None else options.data.name,
        "quick": options.quick,
    }
    if "scoring" in measured:
        row["scoring_memory"] = growth(measured["scoring"])
        for key, found in row["scoring_memory"].items():
            print(
                f"scoring: {key.removesuffix('_bytes')} memory grows by "
                f"{100 * found['growth']:.1f} %, {found['bytes_per_image']} B per image: "
                f"{'flat' if found['flat'] else 'NOT flat'} (limit 5 %)"
            )
    if "projection" in options.parts:
        source = str(options.rates) if given else f"this run: {options.model}"
        row |= report_projection(given or row["rates"], source)
    publish(row, record=options.record, as_json=options.json)


def report_projection(rates: dict[str, float], source: str) -> dict[str, Any]:
    """Print it. ValueError: rates that this run did not measure and no file gave."""
    if missing := missing_rates(rates):
        raise ValueError(
            f"projection: expected {', '.join(missing)}: run the parts coreset, scoring and "
            "labels too, give --rates, or leave projection out of --parts"
        )
    rows = project(rates)
    print(f"\n{table(rows, source)}")
    return {"projection": rows, "projection_rates": rates, "projection_source": source}


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
