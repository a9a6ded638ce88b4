"""Every Triton kernel compiles for sm_80, sm_86 and sm_90 without spills; needs no GPU.

Compilation runs in its own process, because ``TRITON_INTERPRET`` or a GPU driver changes what
Triton does: this file is also that program (``python tests/test_kernels_compile.py 90``).
cuobjdump, from Triton's wheel, reads registers, stack and shared memory from the cubin.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import triton
from patchbloom.kernels.geglu import geglu_kernel
from patchbloom.kernels.group_norm import (
    group_norm_kernel,
    plan_slabs,
    slab_moments_kernel,
    slab_normalise_kernel,
)
from patchbloom.kernels.latents import start_state_kernel
from patchbloom.kernels.mosaic import mosaic_kernel
from patchbloom.kernels.noise import noise_kernel
from patchbloom.kernels.pixels import upsample_kernel
from patchbloom.kernels.sampler import euler_ancestral_step_kernel
from patchbloom.kernels.student_input import student_input_kernel
from patchbloom.kernels.table_step import euler_ancestral_table_step_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WORDS = {"epoch": "i32", "seed_lo": "i32", "seed_hi": "i32"}
SIDES = {"height": "i32", "width": "i32", "size": "i32"}
INDICES = ("rows_ptr", "samples_ptr", "class_first_ptr", "class_count_ptr")
START = {
    "state_ptr": "*fp32", "input_ptr": "*fp16", "bank_ptr": "*fp16",
    **dict.fromkeys(INDICES, "*i64"), "quantiles_ptr": "*fp32", "numel": "i32", "pixels": "i32",
    "sigma": "fp32", "model_scale": "fp32",
    **WORDS, "START": 0, "PARTNER": 2, "WEIGHT": 3, "INTERVALS": 0, "GROUPS": 128,
}  # fmt: skip
STEP = {
    "next_state_ptr": "*fp32", "next_input_ptr": "*fp16", "state_ptr": "*fp32", "eps_ptr": "*fp16",
    "samples_ptr": "*i64", "numel": "i32", "slope": "fp32", "sigma_up": "fp32",
    "next_scale": "fp32", "draw": "i32", **WORDS, "GROUPS": 128,
}  # fmt: skip
TABLE_STEP = {
    "next_state_ptr": "*fp32", "next_input_ptr": "*fp16", "state_ptr": "*fp32", "eps_ptr": "*fp16",
    "samples_ptr": "*i64", "table_ptr": "*fp32", "step_ptr": "*i64", "epoch_ptr": "*i64",
    "numel": "i32", "seed_lo": "i32", "seed_hi": "i32", "GROUPS": 128,
}  # fmt: skip
NOISE = {
    "out_ptr": "*fp32", "samples_ptr": "*i64", "count": "i32", "draw": "i32", **WORDS,
    "GROUPS": 256, "ROUNDS": 10,
}  # fmt: skip
UPSAMPLE = {
    "out_ptr": "*fp16", "patches_ptr": "*u8", **SIDES, "scale_y": "fp32", "scale_x": "fp32",
    "CHANNELS": 3, "BLOCK": 256,
}  # fmt: skip
STUDENT = {
    "out_ptr": "*fp16", "images_ptr": "*fp16", "boxes_ptr": "*fp32", "flips_ptr": "*i1",
    "scale_ptr": "*fp32", "shift_ptr": "*fp32", "partners_ptr": "*i64", "pasted_ptr": "*i64",
    **SIDES, "CHANNELS": 3, "BLOCK": 256,
}  # fmt: skip
MOSAIC = {
    "out_ptr": "*u8", "patches_ptr": "*u8", "rows_ptr": "*i64",
    "R": 2, "SIDE": 112, "CHANNELS": 3, "BLOCK": 1024,
}  # fmt: skip
NORM = {
    **dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr", "bias_ptr"), "*fp16"), "pixels": "i32",
    "eps": "fp32", "moments_ptr": "*fp32", "slab": "i32", "SLABS": 64, "SILU": True,
}  # fmt: skip
ON_CHIP, SLABS = {**NORM, **plan_slabs(28**2, 30, 32)[0]}, {**NORM, **plan_slabs(224**2, 8, 32)[0]}
"""960 channels in the UNet and 256 in the decoder at 224 px: the most registers."""
GEGLU = {
    "out_ptr": "*fp16", "x_ptr": "*fp16", "rows": "i32", "width": "i32", "ROWS": 4, "COLUMNS": 512,
}  # fmt: skip
HALF_PIXELS = {"out_ptr": "*fp16", "patches_ptr": "*fp16"}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "noise, normals": (noise_kernel, {**NOISE, "NORMAL": True}),
    "noise, half": (noise_kernel, {**NOISE, "out_ptr": "*fp16", "NORMAL": True}),
    "noise, uniforms": (noise_kernel, {**NOISE, "NORMAL": False}),
    "start_state, mixup": (start_state_kernel, {**START, "MIXUP": True, "NHWC": False}),
    "start_state, weights of a table": (
        start_state_kernel,
        {**START, "MIXUP": True, "INTERVALS": 4096, "NHWC": False},
    ),
    "start_state, NHWC": (start_state_kernel, {**START, "MIXUP": True, "NHWC": True}),
    "start_state, fp32": (
        start_state_kernel,
        {**START, "bank_ptr": "*fp32", "input_ptr": "*fp32", "MIXUP": True, "NHWC": False},
    ),
    "start_state": (start_state_kernel, {**START, "MIXUP": False, "NHWC": False}),
    "euler_ancestral_step": (euler_ancestral_step_kernel, STEP),
    "euler_ancestral_table_step": (euler_ancestral_table_step_kernel, TABLE_STEP),
    "upsample": (upsample_kernel, UPSAMPLE),
    "student_input": (student_input_kernel, {**STUDENT, "CUTMIX": False}),
    "student_input, CutMix": (student_input_kernel, {**STUDENT, "CUTMIX": True}),
    "mosaic, uint8": (mosaic_kernel, MOSAIC),
    "mosaic, half": (mosaic_kernel, {**MOSAIC, **HALF_PIXELS}),
    "group_norm on chip": (group_norm_kernel, ON_CHIP),
    "group_norm on chip, few pixels": (group_norm_kernel, {**NORM, **plan_slabs(49, 80, 32)[0]}),
    "group_norm on chip, one pixel": (
        group_norm_kernel,
        {**NORM, **plan_slabs(1, 80, 32)[0], "pixels": 1},
    ),
    "group_norm, moments": (slab_moments_kernel, SLABS),
    "group_norm in slabs": (slab_normalise_kernel, SLABS),
    "group_norm in slabs, fp32": (
        slab_normalise_kernel,
        {**SLABS, "out_ptr": "*fp32", "x_ptr": "*fp32"},
    ),
    "geglu": (geglu_kernel, GEGLU),
}
ALIGNED = ("count", "numel", "pixels")
"""Sizes that are multiples of 16 in use: Triton then vectorises the stores."""


def resources(kernel: Any, arguments: dict[str, Any], capability: int, **options: int) -> dict:
    """Compile one kernel; return its registers and its stack (spills), local and shared bytes."""
    signature = {
        name: arguments[name] if isinstance(arguments[name], str) else "constexpr"
        for name in kernel.arg_names
    }
    constants = {n: arguments[n] for n, kind in signature.items() if kind == "constexpr"}
    aligned = [
        n
        for n, kind in signature.items()
        if kind.startswith("*") or (n in ALIGNED and kind == "i32")
    ]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": arguments.get("num_warps", 4), **options}
    cubin = triton.compile(
        source, target=target, options={**options, "enable_fp_fusion": False}
    ).asm["cubin"]
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return {name: int(number) for name, number in found.items()}


def compile_all(capability: int) -> None:
    """Print {kernel: resources} as one JSON line; a starved kernel is the negative control."""
    report = {
        name: resources(kernel, arguments, capability)
        for name, (kernel, arguments) in KERNELS.items()
    }
    starved = resources(*KERNELS["upsample"], capability, maxnreg=24)
    print(json.dumps({"kernels": report, "starved": starved}))


def check_no_spills(program: str, capability: int, cache: Path, names: Iterable[str]) -> None:
    """Run a file's ``compile_all`` in a new process; assert that nothing spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, program, str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    print(f"sm_{capability}")
    for name, used in result["kernels"].items():
        print(f"  {name:42} {used['REG']:3} registers, {used['SHARED']:5} bytes shared")
    assert list(result["kernels"]) == list(names)
    spilled = {n: used for n, used in result["kernels"].items() if used["STACK"] or used["LOCAL"]}
    assert not spilled
    assert result["starved"]["STACK"] > 0, "cuobjdump must show the spill of 24 registers"


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_kernels_compile_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    check_no_spills(__file__, capability, tmp_path, KERNELS)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
