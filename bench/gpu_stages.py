"""What `make gpu` runs: each stage's command, time limit and needs, in three forms.

    quick       full-size networks with random weights, few rounds; 8 minutes whatever hangs: a
                stage gets no more than what is left of them
    full        more rounds, and the backends that first build an engine or compile, which takes
                longer than the quick form has
    rehearsal   the same programs on the CPU, with sdxl-tiny and small shapes; what compiles for
                minutes is left out there too

A stage is one process, so that one that runs out of memory does not take the others with it.
Standard library only: the table is read before it is known what else is here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Literal

Form = Literal["quick", "full", "rehearsal"]

FULL_S, REHEARSAL_S = 900.0, 300.0
"""Limit of a stage in these forms, seconds."""
TOTAL_S: dict[Form, float] = {"quick": 480.0, "full": inf, "rehearsal": inf}
"""What all stages of a form may take, with the runner's own start and the deaths of hung ones."""

_TESTS = ("torch", "triton", "pytest", "pytest-timeout")
_BENCH = ("torch", "triton", "tyro", "diffusers", "transformers", "safetensors")
_ONNX = ("onnx", "onnxscript")
_LOADER = ("torch", "triton", "tyro", "torchvision", "nvidia-dali-cuda130")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process, of the interpreter that runs the stages."""

    name: str
    words: tuple[str, ...]
    """What follows the interpreter; paths are relative to the checkout or absolute."""
    limit_s: float
    """After so many seconds it is killed, with all its processes."""
    needs: tuple[str, ...]
    """Names as pip knows them, see `missing`."""
    prints_row: bool = True
    """Its last line of JSON is a row."""


def make_stages(form: Form, data: Path | None, images: Path) -> list[Stage]:
    """All stages of a form. Without `data` an image set is generated in `images`, a new folder."""
    return [
        *_tests(form),
        _kernels(form),
        *_expand(form),
        _epoch(form),
        *_score(form, data, images),
    ]


def _limit_s(form: Form, quick_s: float) -> float:
    return {"quick": quick_s, "full": FULL_S, "rehearsal": REHEARSAL_S}[form]


def _device(form: Form) -> tuple[str, ...]:
    return ("--device", "cpu" if form == "rehearsal" else "cuda", "--json", "--no-record")


def _tests(form: Form) -> list[Stage]:
    """Every file with tests marked gpu; on the CPU they are collected and skipped."""
    words = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    words += () if form == "rehearsal" else ("--require-gpu",)
    files = {
        "kernels": (
            "tests/test_kernels_triton.py",
            "tests/test_softlabel_triton.py",
            "tests/test_bench_measure.py",
        ),
        "overlap": ("tests/test_overlap.py",),
        "decode": ("tests/test_images.py",),
        "ort": ("tests/test_export.py",),
        "models": ("tests/test_prior.py", "tests/test_prompt_bank.py"),
    }
    needs = {
        "decode": ("torchvision", "nvidia-dali-cuda130"),
        "ort": ("diffusers", "transformers", *_ONNX, _ort(form)),
        "models": ("diffusers", "transformers"),
    }
    quick_s = {"kernels": 55.0, "overlap": 15.0, "decode": 15.0, "ort": 20.0, "models": 20.0}
    return [
        Stage(
            name=f"tests-{name}",
            words=(*words, *files[name]),
            limit_s=_limit_s(form, quick_s[name]),
            needs=(*_TESTS, *needs.get(name, ())),
            prints_row=False,
        )
        for name in files
    ]


def _ort(form: Form) -> str:
    return "onnxruntime" if form == "rehearsal" else "onnxruntime-gpu"


def _kernels(form: Form) -> Stage:
    compiled = () if form == "full" else ("--no-compiled",)
    return Stage(
        name="kernels",
        words=("bench/bench_kernels.py", *_device(form), *compiled),
        limit_s=_limit_s(form, 45),
        needs=_BENCH,
    )


def _expand(form: Form) -> list[Stage]:
    """Each backend beside diffusers' pipeline, one process per size, batch and backend.

    Once also beside the pipeline with SDXL's own VAE, which runs in fp32.
    """
    cases: Sequence[tuple[int, int, str, float]] = {
        "rehearsal": [(32, 8, "eager", 0), (32, 8, "ort", 0)],
        "quick": [
            *[(224, 32, "eager", 50), (224, 64, "eager", 35), (512, 32, "eager", 50)],
            (224, 32, "diffusers-upcast", 25),
        ],
        "full": [
            (size, batch, backend, 0)
            for size, batch in ((224, 32), (224, 64), (512, 32))
            for backend in ("eager", "ort", "inductor", "diffusers-compiled", "diffusers-upcast")
        ],
    }[form]
    needs = {"ort": (*_ONNX, _ort(form)), "inductor": ("a C++ compiler",)}
    return [
        Stage(
            name=f"expand-{size}px-{batch}-{backend}",
            words=(
                *("bench/bench_expand.py", *_device(form), *_model(form)),
                *("--size", str(size), "--batch", str(batch), "--backends", "diffusers", backend),
                *_expand_passes(form),
            ),
            limit_s=_limit_s(form, quick_s),
            needs=(*_BENCH, *needs.get(backend, ())),
        )
        for size, batch, backend, quick_s in cases
    ]


def _model(form: Form) -> tuple[str, ...]:
    """Random weights: they decide neither speed nor memory, and nothing is downloaded."""
    return () if form == "rehearsal" else ("--model", "sdxl-turbo", "--weights", "random")


def _expand_passes(form: Form) -> tuple[str, ...]:
    """How much is expanded how often; of a class 40 patches, which decides how engines group."""
    options = {
        "rehearsal": "--images 8 --rounds 1 --classes 2 --patches-per-class 8 --threads 1",
        "quick": "--images 64 --rounds 3 --classes 2 --patches-per-class 40",
        "full": "--images 128 --rounds 3 --classes 10 --patches-per-class 40",
    }[form]
    return tuple(options.split())


def _epoch(form: Form) -> Stage:
    """In the quick form the last row of the paper's table alone: 640 images."""
    shape = {
        "rehearsal": "--size 32 --factors 2 --epochs 1 --rounds 1 --batch 8",
        "quick": "--size 224 --factors 8 --epochs 1 --rounds 1",
        "full": "--size 224",
    }[form].split()
    return Stage(
        name="epoch",
        words=("bench/bench_epoch.py", *_device(form), *_model(form), "--backend", "eager", *shape),
        limit_s=_limit_s(form, 60),
        needs=(*_BENCH, "rich"),
    )


def _score(form: Form, data: Path | None, images: Path) -> list[Stage]:
    """Decoding by each kind of device; before it, without data, the images to decode."""
    count, rounds = {"rehearsal": (40, 1), "quick": (1000, 3), "full": (2000, 5)}[form]
    write = Stage(
        name="score-images",
        words=("bench/score_images.py", str(images), str(count)),
        limit_s=_limit_s(form, 15),
        needs=("numpy", "pillow"),
        prints_row=False,
    )
    options = ("--images", str(count), "--rounds", str(rounds), "--peers", "torchvision")
    options += ("--threads", str(min(16, len(os.sched_getaffinity(0)))))
    if form == "rehearsal":
        options += ("--size", "64", "--batch", "8")
    decode = [
        Stage(
            name=f"score-{device}",
            words=(
                *("bench/bench_score.py", "--data", str(data or images), "--device", device),
                *("--json", "--no-record", *options),
            ),
            limit_s=_limit_s(form, 25),
            needs=_LOADER,
        )
        for device in (("cpu",) if form == "rehearsal" else ("cpu", "cuda"))
    ]
    return decode if data else [write, *decode]


def missing(needs: tuple[str, ...]) -> list[str]:
    """Those of a stage's needs that are not here."""
    return [name for name in needs if not _SEARCHES.get(name, lambda n=name: _is_module(n))()]


def _is_module(name: str) -> bool:
    name = {"pillow": "PIL"}.get(name, name.replace("-", "_"))
    return find_spec(name) is not None


def _is_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _is_ort_for_gpus() -> bool:
    """Of the module: onnxruntime and onnxruntime-gpu have one name."""
    if not _is_module("onnxruntime"):
        return False
    return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()


def _is_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


_SEARCHES: dict[str, Callable[[], bool]] = {
    "nvidia-dali-cuda130": _is_dali,
    "onnxruntime-gpu": _is_ort_for_gpus,
    "a C++ compiler": _is_compiler,
}
