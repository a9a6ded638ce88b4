"""The engines of a run, found or built before its teacher: a build that fails costs no hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...engine.builds.build import describe, prepare_engine
from ...engine.expand.backends import bundles_of, plan_engine, say_built
from ...export.config import EIGHT_BITS, UNBUILT
from ...export.eight_bits import require_modelopt
from ...export.terminal import say
from ..methods.registry import METHODS
from ..options import RunOptions, TrainCoreset, TrainTeacher
from ..plan import Plan


def methods_with_engines(options: RunOptions) -> list[str]:
    """The methods for which this command runs the model."""
    if isinstance(options, TrainTeacher):
        return []
    kinds = ("made",) if isinstance(options, TrainCoreset) else ("made", "rendered")
    return [method for method in options.methods if METHODS[method].model in kinds]


def find_or_build_engines(plan: Plan, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find or build the engine of each method; {method: {"backend", "trt_library", "engine"}}.

    "engine" describes it; None for a backend without.
    """
    assert plan.model is not None
    counts_K = np.full(len(plan.class_names), plan.samples_per_class)
    found = {}
    for method in methods:
        use, engine = plan.use[method], None
        if use.precision in EIGHT_BITS:
            require_modelopt()
            say(f"the engine in {use.precision} is calibrated on the coreset, and built after it")
            found[method] = {"backend": use.backend, "trt_library": use.trt_library, "engine": None}
            continue
        name, spec = plan_engine(plan.model, use, counts_K, plan.targets)
        if name not in UNBUILT:
            bundle = prepare_engine(name, plan.model, spec, bundles_of(use))
            say_built(bundle)
            engine = describe(bundle) | {"built": bundle.built}
        library = spec.trt_library or use.trt_library
        found[method] = {"backend": name, "trt_library": library, "engine": engine}
    return found


def build_only(plan: Plan, options: RunOptions) -> dict[str, Any]:
    """`train --build-only`. Raises ValueError when the command opens no engine."""
    methods = methods_with_engines(options)
    found = find_or_build_engines(plan, methods) if methods else {}
    engines = {method: each["engine"] for method, each in found.items() if each["engine"]}
    if not engines:
        raise ValueError(
            "--build-only: this command opens no engine, since no method runs a model in it, the "
            "backend is torch itself, or eight bits wait for a coreset (engine build --calibrate): "
            "give --method dace and --backend trt, inductor or ort, without --precision int8 or fp8"
        )
    return {"engines": engines}
