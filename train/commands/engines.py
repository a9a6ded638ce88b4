"""The engines of a run, found or built before its teacher: a build that fails costs no hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...engine.builds.build import describe, prepare_engine
from ...engine.expand.backends import bundles_of, plan_engine, say_built
from ...export.trt_library import parse_targets
from ..options import RunOptions
from ..plan import Plan


def prepare_engines(
    plan: Plan, methods: Sequence[str], targets: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Find or build the engine of each method that runs the model; {method: its description}.

    Methods that run eagerly have none. `targets`: cards elsewhere (EngineSpec.targets).
    """
    counts_K = np.full(len(plan.class_names), plan.samples_per_class)
    engines = {}
    for method in methods:
        use = plan.use.get(method)
        if use is None or plan.model is None:
            continue
        name, spec = plan_engine(plan.model, use, counts_K, targets)
        if name != "eager":
            bundle = prepare_engine(name, plan.model, spec, bundles_of(use))
            say_built(bundle)
            engines[method] = describe(bundle) | {"built": bundle.built}
    return engines


def build_only(plan: Plan, options: RunOptions) -> dict[str, Any]:
    """`train --build-only`. Raises ValueError when the run has no engine."""
    engines = prepare_engines(plan, plan.methods, parse_targets(options.build_only or ()))
    if not engines:
        raise ValueError(
            "--build-only: this run has no engine, since no method runs a model or the backend is "
            "eager: give --method dace and --backend trt, inductor or ort"
        )
    return {"engines": engines}
