"""How cost grows with the batch, classes, images, epochs and processes.

    python bench/bench_scale.py --data DIR --json
    python bench/bench_scale.py --parts scoring --size 224 --data DIR

expansion   images/s against the engine's batch
coreset     generated classes, IPC 1: write, verify, read, open, expand; the key/value cache holds
            few prompts
scoring     images scored by a small untrained teacher: memory must stay flat (± 10 %)
labels      dense soft labels against epochs: seconds and bytes
ranks       `torchrun N train labels`, from an existing teacher: the whole command, start-up
            included, on the CPU with gloo; the gate: the same content_sha256 at any N

Every point runs in its own process (scale_points.py), whose peak memory is reported. Each part
publishes its row, `scale-PART`, as soon as it ends. When a part fails, its row has the points
before the failure and no rate, and the other parts still run.

Exit status: 1 when a part failed or memory was not flat; 2 when the options are invalid.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Rate, environment, publish, run_program
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.expand.backends import resolve_device
from pictures import default_precision
from scale_parts import AXES, Options, Point, points_of, settings_of

FLAT = 0.1
"""Largest growth that counts as flat; free heap kept by glibc added 5.6 % from 1,000 to 9,000
images."""
SLOPES = {"scoring": "score_images_per_s", "labels": "labels_per_s"}
"""Parts whose rate is the slope between their two largest points, with the name of that rate."""
POINTS = Path(__file__).with_name("scale_points.py")


def run_points(options: Options, part: str, device: str) -> Iterator[Point]:
    """Run the part's children in turn; yield what each measured, with its value on the part's axis.

    Raises RuntimeError when a child fails; stderr has the reason.
    """
    axis = AXES[part]
    for asked in points_of(options, part, device):
        words = [sys.executable, str(POINTS), part, str(options.threads), json.dumps(asked)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{axis} {asked[axis]}: the child ended with {done.returncode}")
        yield {axis: asked[axis], **json.loads(done.stdout.splitlines()[-1])}


def run_ranks(options: Options) -> Iterator[Point]:
    """Train one teacher, then label with every world size, each from a copy of that run.

    Raises RuntimeError when a command fails or a coreset differs from the first.
    """
    with tempfile.TemporaryDirectory() as name:
        prepared, first = Path(name) / "prepared", None
        asked = ["--data", "shapes", "--model", options.model, "--backend", "eager"]
        asked += ["--teacher", options.teacher, "--image-size", str(options.size)]
        asked += ["--device", "cpu", "--epochs", str(options.epochs[-1]), "--engine-batch", "8"]
        asked += ["--teacher-epochs", "1", "--shapes-per-class", str(options.shapes_per_class)]
        _train([_script("train")], "teacher", prepared, asked)
        for size in options.worlds:
            out = Path(name) / f"world{size}"
            shutil.copytree(prepared, out)
            launch = [_script("torchrun"), "--standalone", "--nproc-per-node", str(size)]
            began = time.perf_counter()
            _train([*launch, _script("train")], "labels", out, asked)
            seconds = round(time.perf_counter() - began, 2)
            content = open_coreset(out / "coreset").content_sha256
            first = first or content
            if content != first:
                raise RuntimeError(f"world {size}: expected coreset {first}, got {content}")
            yield {"world": size, "seconds": seconds, "content_sha256": content}


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _train(launch: list[str], stage: str, out: Path, asked: list[str]) -> None:
    words = [*launch, stage, "--out", str(out), *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads would compete for cores
    done = subprocess.run(words, stdout=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:5])} … ended with {done.returncode}")


def growth(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Growth of peak memory on the host, and on the GPU if any: largest over smallest, minus 1.

    Libraries take some 0.9 GB per process, which would hide a slow leak, so bytes per additional
    image from the first to the last point are reported too. The verdict is `flat`, `NOT flat`, or
    `one point`, which decides nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in ("peak_bytes", "peak_gpu_bytes"):
        peaks = [point[key] for point in points]
        if not all(peaks):
            continue
        if len(peaks) == 1:
            found[key] = {"verdict": "one point"}
            continue
        grown, more = max(peaks) / min(peaks) - 1, points[-1]["images"] - points[0]["images"]
        found[key] = {
            "verdict": "flat" if grown <= FLAT else "NOT flat",
            "growth": round(grown, 4),
            "bytes_per_image": round((peaks[-1] - peaks[0]) / more) if more else None,
        }
    return found


def slopes(points: Sequence[Point]) -> Rate | None:
    """Items per second between the two largest points, round by round; start-up cancels.

    None: a single point, or the larger one took no longer.
    """
    if len(points) < 2:
        return None
    (fewer, more), items = points[-2:], points[-1]["items"] - points[-2]["items"]
    taken_s = [
        long - short for short, long in zip(fewer["rounds_s"], more["rounds_s"], strict=True)
    ]
    if items <= 0 or min(taken_s) <= 0:
        return None
    return Rate(tuple(items / seconds for seconds in taken_s))


def rates_of(part: str, points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """`rates` of scoring and labels, with their spread: slopes, which exclude start-up."""
    slope = slopes(points) if part in SLOPES else None
    if slope is None:
        return {"rates": {}}
    name = SLOPES[part]
    return {"rates": {name: round(slope.p50, 1)}, "rates_spread": {name: slope.row()}}


def show(part: str, points: Sequence[Point], memory: dict[str, dict[str, Any]]) -> None:
    """Print a line of JSON per point, and a line per memory verdict."""
    print(f"\n{part}")
    for point in points:
        print(f"  {json.dumps(point)}")
    for key, found in memory.items():
        measured = ""
        if "growth" in found:
            measured = f", within {100 * found['growth']:.1f} % (limit {100 * FLAT:.0f} %)"
        print(f"  {key.replace('_bytes', '')} memory: {found['verdict']}{measured}")


def run_part(options: Options, part: str, device: str) -> dict[str, Any] | None:
    """Measure, print and publish one part; its row, where `failed` says why it ended early.

    None: it failed before its first point.
    """
    points, failed = [], None
    try:
        every = run_ranks(options) if part == "ranks" else run_points(options, part, device)
        for point in every:
            points.append(point)
    except (ValueError, OSError, RuntimeError) as error:
        failed = f"{part}: {error}"
        print(f"failed: {failed}", file=sys.stderr, flush=True)
    if not points:
        return None
    memory = growth(points) if part == "scoring" else {}
    show(part, points, memory)
    row = environment("cpu" if part == "ranks" else device) | {
        "benchmark": f"scale-{part}",
        **settings_of(options, part),
        "evals": points[-1].get("evals"),
        "quick": options.quick,
        "points": points,
        "memory": memory,
        **({"rates": {}} if failed else rates_of(part, points)),
        "failed": failed,
    }
    publish(row, record=options.record, as_json=options.json)
    return row


def main(options: Options) -> int:
    """Run the parts in turn and report; the exit status."""
    device = resolve_device(options.device)
    backend, _, precision = options.backend.partition("-")
    named = f"{backend}-{precision or default_precision(device)}"
    options = replace(options.sized(), backend=named)
    measured = [run_part(options, part, device) for part in options.parts]
    done = [row for row in measured if row is not None]
    verdicts = {found["verdict"] for row in done for found in row["memory"].values()}
    complete = len(done) == len(measured) and not any(row["failed"] for row in done)
    return 0 if complete and "NOT flat" not in verdicts else 1


if __name__ == "__main__":
    run_program(main, Options, wrong=2)
