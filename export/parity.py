"""The parity gate: torch's output for random inputs, and an engine's greatest allowed difference.

An engine passes when it yields no NaN or infinity, and its max abs error is at most its precision's
PARITY_TOLERANCE times the largest value (or 1, if that is larger).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .bundle import BundleError
from .config import Precision
from .graphs import Graph
from .models import PRECISIONS

PARITY_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""bf16 keeps 8 bits: sdxl-tiny's compiled denoiser differs from its eager run by 3e-2."""
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
    """Compute fp32 in fp32: cuDNN's default is TF32, whose 10 bits miss PARITY_TOLERANCE."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


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
    ports, values = (*graph.inputs, graph.output), (*whole.inputs, whole.expected)
    rows = [port.per_prompt * graph.min_prompts or port.shape[0] for port in ports]
    *inputs, expected = (value[:count] for value, count in zip(values, rows, strict=True))
    smallest = replace(whole, inputs=inputs, expected=expected)
    return {graph.name: whole, f"{graph.name}, smallest batch": smallest}


def _remedy(graph: str) -> str:
    if graph == "denoiser":
        return "--precision bf16 or fp32"
    return "--vae-precision bf16 or fp32, or a VAE made for fp16 (sdxl-vae-fp16-fix)"


@torch.no_grad()
def check_parity(reference: Reference, run: Callable[..., Tensor]) -> dict[str, Any]:
    """Compare an engine's output with torch's: max_abs, relative_l2, psnr_db (decoder) and limit.

    Raises BundleError beyond the tolerance, or for NaN or infinity.
    """
    found = run(*reference.inputs).float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise BundleError(
            f"the engine's {reference.graph} makes NaN or infinite values in "
            f"{reference.precision}, torch does not: use {_remedy(reference.graph)}"
        )
    difference = found - reference.expected
    error = float(difference.abs().max())
    limit = PARITY_TOLERANCE[reference.precision] * max(1.0, float(reference.expected.abs().max()))
    if not error <= limit:
        raise BundleError(
            f"the engine's {reference.graph} differs from torch by {error:.2e}, more than "
            f"{limit:.2e}: report the versions that `pip list` shows"
        )
    measured = {
        "max_abs": error,
        "relative_l2": float(difference.norm() / reference.expected.norm()),
        "limit": limit,
    }
    if reference.graph == "decoder":
        squared = max(float(difference.square().mean()), 1e-20)
        measured["psnr_db"] = 10 * float(
            torch.tensor(4.0 / squared, dtype=torch.float32).log10()
        )  # images in [-1, 1]
    return measured
