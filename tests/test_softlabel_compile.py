"""The soft-label kernels compile for sm_80, sm_86 and sm_90 without spills; needs no GPU.

Like test_kernels_compile.py, whose `resources` it uses, this file is also the program that compiles
(``python tests/test_softlabel_compile.py 90``).
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from patchbloom.kernels.softlabel_dense import (
    softlabel_dense_grad_kernel,
    softlabel_dense_kernel,
)
from patchbloom.kernels.softlabel_topk import softlabel_topk_grad_kernel, softlabel_topk_kernel
from test_kernels_compile import check_no_spills, resources

INPUTS = {"normalisers_ptr": "*fp32", "labels_ptr": "*fp16", "inverse_t": "fp32"}
MIX = {"rows_ptr": "*i64", "weight_ptr": "*fp32", "MIXED": True}
PURE = {"rows_ptr": None, "weight_ptr": None, "MIXED": False}
FORWARD = {"loss_ptr": "*fp32", **INPUTS}
BACKWARD = {"grad_ptr": "*fp32", "grad_stride": "i32", **INPUTS}
SMALL = {"CLASSES": 1000, "BLOCK": 1024, "num_warps": 4}
LARGE = {"CLASSES": 21841, "BLOCK": 4096, "num_warps": 8}
FEW = {"classes_ptr": "*i16", "KEPT": 10, "CODES": 16}
MANY = {"classes_ptr": "*i32", "KEPT": 300, "CODES": 128}
PAIRS = {
    "dense": (softlabel_dense_kernel, softlabel_dense_grad_kernel, {}, {}),
    "top-k": (softlabel_topk_kernel, softlabel_topk_grad_kernel, FEW, MANY),
}


def kernels() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every kernel at K = 1000 and 21,841, mixed or not, for each dtype of student logits."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for kind, (forward, backward, few, many) in PAIRS.items():
        for mix in (PURE, MIX):
            for dtype in ("fp32", "fp16", "bf16"):
                for size in ({**SMALL, **few}, {**LARGE, **many}):
                    student = {"student_ptr": f"*{dtype}", **mix, **size}
                    mixed = ", mixed" if mix is MIX else ""
                    name = f"{kind}, K = {size['CLASSES']}, {dtype}{mixed}"
                    found[name] = (forward, {**FORWARD, **student})
                    out = {"out_ptr": f"*{dtype}"}
                    found[f"{name}, grad"] = (backward, {**BACKWARD, **student, **out})
    return found


def compile_all(capability: int) -> None:
    """Print {kernel: resources} as one JSON line; a starved kernel is the negative control."""
    report, starved = {}, {}
    for name, (kernel, arguments) in kernels().items():
        given = {key: value for key, value in arguments.items() if key != "num_warps"}
        warps = arguments["num_warps"]
        report[name] = resources(kernel, given, capability, num_warps=warps)
        if name == "dense, K = 21841, fp32, mixed":
            starved = resources(kernel, given, capability, num_warps=warps, maxnreg=24)
    print(json.dumps({"kernels": report, "starved": starved}))


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_softlabel_compiles_and_spills_nothing(capability: int, tmp_path: Path) -> None:
    check_no_spills(__file__, capability, tmp_path, kernels())


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
