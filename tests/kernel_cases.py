"""Runs a file's cases on poisoned memory, in Triton's interpreter or on a GPU.

The interpreter must be chosen before ``import triton``, so a file with such cases is also the
program that runs them: its ``__main__`` calls ``interpret``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from patchbloom.kernels.launch import runs_kernel

Case = Callable[[str], None]


def run_case(case: Case, device: str) -> None:
    """Run one case on memory that torch's own debugging switch poisons."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN or the maximum
    try:
        case(device)
    finally:
        torch.use_deterministic_algorithms(before)


def interpret(cases: Mapping[str, Case]) -> None:
    """Run every case on the CPU and print {case: traceback or null} as one JSON line."""
    assert runs_kernel(torch.empty(0)), "TRITON_INTERPRET is not set: this would test the reference"
    results: dict[str, str | None] = {}
    for name, case in cases.items():
        try:
            run_case(case, "cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def interpreted_by(program: str) -> dict[str, str | None]:
    """Results of ``interpret`` in a subprocess with TRITON_INTERPRET=1."""
    process = subprocess.run(
        [sys.executable, str(Path(program))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
