"""Stages of `make gpu`: each stage's command, time limit and needs, in three forms.

    quick       full-size networks with random weights, few rounds; 8 minutes whatever hangs: a
                stage gets its limit, but leaves the later ones the least that they need
    full        more rounds, and the backends that first build an engine or compile, which takes
                longer than the quick form has
    rehearsal   the same programs on the CPU, with sdxl-tiny and small shapes, and without anything
                that compiles for minutes

Stages come in order of worth, the GPU tests last, so that what is cut off is worth least.

A stage is one process, so that one that runs out of memory does not take the others with it.
Standard library only: anything else may be missing when the table is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

Form = Literal["quick", "full", "rehearsal"]

FULL_S, REHEARSAL_S = 900.0, 300.0
"""Seconds that a stage may take in these forms."""
TOTAL_S: dict[Form, float] = {"quick": 480.0, "full": inf, "rehearsal": inf}
"""Seconds for all stages of a form, including the runner's start and the kills of hung stages."""

_DATA = ("pydantic", "platformdirs", "filelock")
_TESTS = ("torch", "triton", "pytest", "pytest-timeout", "platformdirs")
_BENCH = ("torch", "triton", "tyro", "diffusers", "transformers", "safetensors", *_DATA)
_ONNX = ("onnx", "onnxscript")
_LOADER = ("torch", "triton", "tyro", "torchvision", "nvidia-dali-cuda130", *_DATA)
_IMPORTS = """
import sys
sys.path.insert(0, "bench")
import bench_epoch, bench_kernels, diffusers, diffusers_peer, profile_expand, torch, transformers
print(diffusers_peer.StableDiffusionXLImg2ImgPipeline.__name__, end=": ")
print(*(f"{each.__name__} {each.__version__}" for each in (torch, diffusers, transformers)))
"""
"""Imports what the benchmarks do: `import diffusers` alone passes where its pipelines do not."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of the interpreter that runs the stages."""

    name: str
    words: tuple[str, ...]
    """Arguments of the interpreter; paths are relative to the checkout or absolute."""
    limit_s: float
    """Seconds after which its process group is killed."""
    needs: tuple[str, ...]
    """Pip names, see gpu_needs.py."""
    least_s: float = 0.0
    """Seconds that earlier stages leave for it."""
    prints_row: bool = True
    """A benchmark: its last line of JSON is a row."""


def make_stages(form: Form, data: Path | None, images: Path) -> list[Stage]:
    """All stages of a form. Without `data` an image set is generated in `images`, a new folder."""
    *first, at_512_px = _expand(form)
    return [
        _imports(form),
        *first,
        _kernels(form),
        *_epoch(form),
        at_512_px,
        _profile(form),
        *_score(form, data, images),
        *_tests(form),
    ]


def _limits(form: Form, least_s: float, most_s: float) -> dict[str, Any]:
    """Least and most seconds of a stage in the quick form; other forms have one limit."""
    if form == "quick":
        return {"least_s": least_s, "limit_s": most_s}
    return {"limit_s": FULL_S if form == "full" else REHEARSAL_S}


def _device(form: Form) -> tuple[str, ...]:
    return ("--device", "cpu" if form == "rehearsal" else "cuda", "--json", "--no-record")


def _imports(form: Form) -> Stage:
    """A broken library ends this stage in the first seconds."""
    return Stage(
        name="imports",
        words=("-c", _IMPORTS),
        **_limits(form, 15, 90),
        needs=_BENCH,
        prints_row=False,
    )


def _tests(form: Form) -> list[Stage]:
    """Stages for every file with tests marked gpu; on the CPU these are collected and skipped."""
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
        "models": (
            "tests/test_group_norm.py",
            "tests/test_prior.py",
            "tests/test_prompt_bank.py",
        ),
    }
    needs = {
        "decode": ("torchvision", "nvidia-dali-cuda130"),
        "ort": ("diffusers", "transformers", *_ONNX, _ort(form)),
        "models": ("diffusers", "transformers"),
    }
    quick_s = {
        "kernels": (15, 80),
        "overlap": (5, 40),
        "decode": (8, 40),
        "ort": (8, 50),
        "models": (5, 50),
    }
    return [
        Stage(
            name=f"tests-{name}",
            words=(*words, *files[name]),
            **_limits(form, *quick_s[name]),
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
        **_limits(form, 25, 90),
        needs=_BENCH,
    )


def _expand(form: Form) -> list[Stage]:
    """Each backend beside diffusers' pipeline, one process per size, batch and peers.

    Also with CUDA graphs off, and the pipeline with SDXL's VAE in fp32, which only fp16 pipelines
    can have. The quick form has what compiles for minutes last in its process: until then a cut
    leaves the row so far.
    """
    compiled, upcast = ("diffusers-compiled", "compile"), ("diffusers-upcast", "compile")
    torch_own = ("eager", "compile", "eager-launched", "compile-launched")
    cases: list[tuple[int, int, tuple[str, ...], float, float]] = {
        "rehearsal": [(32, 8, ("eager", "eager-launched"), 0, 0)],
        "quick": [
            (224, 64, (*torch_own, "diffusers-compiled"), 120, 260),
            (224, 64, upcast, 40, 100),
            (512, 32, ("eager", "compile"), 40, 130),
        ],
        "full": [
            (size, batch, names, 0, 0)
            for size, batch in ((224, 32), (224, 64), (512, 32))
            for names in (("ort",), ("inductor",), compiled, upcast, torch_own)
        ],
    }[form]
    compiler = ("a C++ compiler",)
    needs = {"ort": (*_ONNX, _ort(form)), "inductor": compiler, "compile": compiler}
    return [
        Stage(
            name=f"expand-{size}px-{batch}-{names[0]}",
            words=(
                *("bench/bench_expand.py", *_device(form), *_model(form)),
                *("--size", str(size), "--batch", str(batch), "--backends", "diffusers", *names),
                *_expand_passes(form),
            ),
            **_limits(form, *quick_s),
            needs=(*_BENCH, *(need for name in names for need in needs.get(name, ()))),
        )
        for size, batch, names, *quick_s in cases
    ]


def _profile(form: Form) -> Stage:
    """Where the time of an expansion goes."""
    small, large = "--size 32 --batch 8 --images 8", "--size 224 --batch 64 --images 64"
    shape = small if form == "rehearsal" else f"{large} --patches-per-class 64"
    return Stage(
        name="profile-expand",
        words=(
            *("bench/profile_expand.py", *_device(form), *_model(form), *shape.split()),
            *("--backend", "eager" if form == "rehearsal" else "compile"),
        ),
        **_limits(form, 15, 70),
        needs=_BENCH,
    )


def _model(form: Form) -> tuple[str, ...]:
    """Random weights: they decide neither speed nor memory, and nothing is downloaded."""
    model = "sdxl-tiny" if form == "rehearsal" else "sdxl-turbo"
    return ("--model", model, "--weights", "random")


def _expand_passes(form: Form) -> tuple[str, ...]:
    """Images, rounds and classes; patches per class decide how engines group samples: 64 in the
    quick form, as in its epoch, which then finds its blocks compiled."""
    options = {
        "rehearsal": "--images 8 --rounds 1 --classes 2 --patches-per-class 8 --threads 1",
        "quick": "--images 64 --rounds 3 --classes 2 --patches-per-class 64",
        "full": "--images 128 --rounds 5 --classes 10 --patches-per-class 40",
    }[form]
    return tuple(options.split())


def _epoch(form: Form) -> list[Stage]:
    """The quick form has only the last row of the paper's table, overlapped: 640 images."""
    gpu = "--size 224 --batch 64 --epochs 3 --rounds 3"
    cases = {
        "rehearsal": [("eager", "--size 32 --factors 2 --epochs 1 --rounds 1 --batch 10")],
        "quick": [("compile", f"{gpu} --factors 8 --runs overlapped")],
        "full": [
            ("eager", f"{gpu} --factors 2 3 4 5 7 8"),
            ("compile", f"{gpu} --factors 8"),
            ("inductor", f"{gpu} --factors 8"),
        ],
    }[form]
    return [
        Stage(
            name=f"epoch-{backend}",
            words=(
                *("bench/bench_epoch.py", *_device(form), *_model(form)),
                *("--backend", backend, *shape.split()),
            ),
            **_limits(form, 45, 130),
            needs=(*_BENCH, "rich", *(("a C++ compiler",) if backend != "eager" else ())),
        )
        for backend, shape in cases
    ]


def _score(form: Form, data: Path | None, images: Path) -> list[Stage]:
    """Decoding on each device, and on the last with a teacher; without data, images come first."""
    count, rounds = {"rehearsal": (40, 1), "quick": (1000, 3), "full": (2000, 5)}[form]
    write = Stage(
        name="score-images",
        words=("bench/score_images.py", str(images), str(count)),
        **_limits(form, 8, 30),
        needs=(*_LOADER, "numpy", "pillow"),
        prints_row=False,
    )
    options = ("--images", str(count), "--rounds", str(rounds))
    options += ("--threads", str(min(16, len(os.sched_getaffinity(0)))))
    if form == "rehearsal":
        options += ("--size", "64", "--batch", "8", "--teacher-images", "8")
    peers, teacher = ("--peers", "torchvision", "torchvision-tensor"), ("--teacher", "resnet18")
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("score-cpu", "cpu", peers),
        ("score-cuda", "cuda", peers),
        ("score-teacher", "cuda", teacher),
    ]
    if form == "rehearsal":  # in one process, as imports take most of the time
        cases = [("score-cpu", "cpu", (*peers, *teacher))]
    decode = [
        Stage(
            name=name,
            words=(
                *("bench/bench_score.py", "--data", str(data or images), "--device", device),
                *("--json", "--no-record", *options, *words),
            ),
            **_limits(form, 12, 70),
            needs=(*_LOADER, *(("diffusers", "transformers") if "--teacher" in words else ())),
        )
        for name, device, words in cases
    ]
    return decode if data else [write, *decode]
