"""The parity gate: torch's output for random inputs, and an engine's greatest allowed difference.

An engine passes when it yields no NaN or infinity, its relative L2 error is at most its precision's
RELATIVE_TOLERANCE, and the absolute error of all but 0.01 % of its values at most PARITY_TOLERANCE
times the largest value (or 1, if it is below). The greatest of millions of errors says little of an
engine in half precision, so it is only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bundle import BundleError, ParityError
from .config import EIGHT_BITS, Precision
from .graphs import Graph, first_prompts, layers_in_fp32
from .models import PRECISIONS
from .ort_reference import run_on_cpu

PARITY_TOLERANCE: dict[Precision, float] = {
    **{"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1},
    **{"int8": 5e-1, "fp8": 5e-1},
}
"""bf16 keeps 8 bits: sdxl-tiny's compiled denoiser differs from its eager run by 3e-2. Eight bits
are held against torch without them, so this is also what they lose."""
RELATIVE_TOLERANCE: dict[Precision, float] = {
    **{"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2},
    **{"int8": 2e-1, "fp8": 2e-1},
}
QUANTILE = 0.9999
SEED = 1


@dataclass(frozen=True)
class Reference:
    """A graph's inputs, on its device, and torch's output, fp32 on the CPU."""

    graph: str
    precision: Precision
    """Precision of the graph: the VAE's may differ from the UNet's."""
    inputs: list[Tensor]
    expected: Tensor


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute fp32 in fp32: cuDNN's default is TF32, whose 10 bits miss PARITY_TOLERANCE.

    The flag is the process's: a thread that needs the same bits every time must be inside too.
    """
    cudnn: Any = torch.backends.cudnn
    owners, flag = [cudnn], "allow_tf32"
    try:
        before = [cudnn.allow_tf32]
    except RuntimeError:  # the process uses torch's newer flags, and then the older is not readable
        owners, flag = [cudnn.conv, cudnn.rnn], "fp32_precision"
        before = [owner.fp32_precision for owner in owners]
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, flag, value)


@torch.no_grad()
def make_reference(graph: Graph) -> Reference:
    """Run the module on its random inputs. Raises BundleError when torch's output is not finite."""
    inputs = graph.random_inputs(SEED)
    with without_tf32():
        expected = graph.module(*inputs).float().cpu()
    precision = PRECISIONS[graph.output.dtype]
    if not bool(torch.isfinite(expected).all()):
        raise BundleError(
            f"torch's own {graph.name} makes NaN or infinite values in {precision}: check its "
            f"weights, or use {_remedy(graph.name)}"
        )
    return Reference(graph.name, precision, inputs, expected)


def make_references(graph: Graph) -> dict[str, Reference]:
    """By name: the graph's reference and, for a range of batches, one of its smallest batch."""
    whole = make_reference(graph)
    if graph.min_prompts is None:
        return {graph.name: whole}
    inputs = first_prompts(graph.inputs, whole.inputs, graph.min_prompts)
    (expected,) = first_prompts((graph.output,), [whole.expected], graph.min_prompts)
    smallest = replace(whole, inputs=inputs, expected=expected)
    return {graph.name: whole, f"{graph.name}, smallest batch": smallest}


def in_precision(
    references: Mapping[str, Reference],
    precision: Precision,
    vae_precision: Precision,
    *,
    tiny_decoder: bool,
) -> dict[str, Reference]:
    """The references with the tolerance of their graphs' precision, which may be eight bits.

    An encoder and a tiny decoder are never in eight bits; beside them OpenVINO runs both in bf16.
    """

    def own(reference: Reference) -> Precision:
        graph = reference.graph
        asked = precision if graph == "denoiser" else vae_precision
        if asked not in EIGHT_BITS:
            return reference.precision
        if graph == "encoder" or (graph == "decoder" and tiny_decoder):
            return "bf16" if reference.precision == "fp32" else reference.precision
        return asked

    return {name: replace(each, precision=own(each)) for name, each in references.items()}


@torch.no_grad()
def make_host_reference(graph: Graph) -> Reference:
    """Run a half-precision module in fp32 on the CPU, on its fewest prompts; 1 for a static batch.

    Few CPUs compute in half precision. Raises BundleError when the output is not finite.
    """
    inputs = first_prompts(graph.inputs, graph.random_inputs(SEED), graph.min_prompts or 1)
    with layers_in_fp32(graph.module):
        expected = graph.module(*(value.float() for value in inputs))
    precision = PRECISIONS[graph.output.dtype]
    if not bool(torch.isfinite(expected).all()):
        raise BundleError(
            f"torch's own {graph.name} makes NaN or infinite values: check its weights"
        )
    return Reference(graph.name, precision, inputs, expected)


def check_graphs(folder: Path, references: Mapping[str, Reference]) -> dict[str, Any]:
    """Hold the ONNX graphs of a folder against torch, run by ONNX Runtime on the CPU.

    It computes half precision in fp32. Raises ParityError beyond the tolerance.
    """
    return {
        name: check_parity(reference, partial(run_on_cpu, folder / f"{name}.onnx"))
        for name, reference in references.items()
    }


def _remedy(graph: str) -> str:
    if graph == "denoiser":
        return "--precision bf16 or fp32"
    return "--vae-precision bf16 or fp32, or a VAE made for fp16 (sdxl-vae-fp16-fix)"


@torch.no_grad()
def check_parity(reference: Reference, run: Callable[..., Tensor]) -> dict[str, Any]:
    """Compare an engine's output with torch's.

    Returns max_abs, high_abs (the error at QUANTILE) and its limit, relative_l2, and for a decoder
    psnr_db. Raises ParityError beyond a tolerance, or for NaN or infinity.
    """
    found = run(*reference.inputs).float().cpu()
    if wrong := found.numel() - int(torch.isfinite(found).sum()):
        raise ParityError(
            f"the engine's {reference.graph} makes NaN or infinite values in "
            f"{reference.precision}, torch does not: use {_remedy(reference.graph)}",
            {"refused": {"graph": reference.graph, "not_finite": wrong}},
        )
    difference = found - reference.expected
    errors = difference.abs().flatten()
    measured = {
        "max_abs": float(errors.max()),
        "high_abs": float(errors.kthvalue(math.ceil(QUANTILE * len(errors))).values),
        "relative_l2": float(difference.norm() / reference.expected.norm()),
        "limit": PARITY_TOLERANCE[reference.precision]
        * max(1.0, float(reference.expected.abs().max())),
    }
    most = RELATIVE_TOLERANCE[reference.precision]
    if not (measured["high_abs"] <= measured["limit"] and measured["relative_l2"] <= most):
        raise ParityError(
            f"the engine's {reference.graph} differs from torch by {measured['high_abs']:.2e}, "
            f"expected at most {measured['limit']:.2e}, and in relative L2 by "
            f"{measured['relative_l2']:.2e}, expected at most {most:.0e}: report the versions that "
            "`pip list` shows",
            {"refused": {"graph": reference.graph, **measured}},
        )
    if reference.graph == "decoder":
        squared = max(float(difference.square().mean()), 1e-20)
        measured["psnr_db"] = 10 * float(
            torch.tensor(4.0 / squared, dtype=torch.float32).log10()
        )  # images in [-1, 1]
    return measured
