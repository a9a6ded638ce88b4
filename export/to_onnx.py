"""Torch modules → ONNX graphs with static shapes or a range of batches, checked after writing.

Uses the dynamo exporter and opset 21 or 23. Weights are initialisers, in a separate file above
1.5 GB. GroupNormalization is native in opset 21, but ONNX Runtime has no kernel for it, neither on
the CPU nor on a GPU, and expands it to seven passes over the tensor. For ONNX Runtime it is
therefore written as InstanceNormalization over the groups and one affine step, the same arithmetic
(decoder of sdxl-tiny at batch 32, one thread: 7.1 → 5.8 ms per image).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .config import DEFAULT_OPSET, OnnxOpset
from .eight_bits import translations
from .graphs import Graph, Port


def export_onnx(
    graph: Graph, path: Path, *, opset: OnnxOpset = DEFAULT_OPSET, native_group_norm: bool
) -> None:
    """Write one graph to `path` and check it: onnx.checker, names, shapes, element types.

    Raises RuntimeError when the written graph differs from its specification.
    """
    import onnx

    replaced = dict(translations())
    if not native_group_norm:
        replaced[torch.ops.aten.group_norm.default] = _group_norm_by_instances
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            tuple(graph.random_inputs(seed=0)),
            input_names=[port.name for port in graph.inputs],
            output_names=[graph.output.name],
            opset_version=opset,
            custom_translation_table=replaced,
            dynamic_shapes=_dynamic_shapes(graph),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    onnx.checker.check_model(path)
    written = onnx.load(path, load_external_data=False)
    versions = [entry.version for entry in written.opset_import if entry.domain == ""]
    if versions != [opset]:
        raise RuntimeError(f"{path.name}: expected opset {opset}, got {versions}")
    ranged = graph.min_prompts is not None
    _check_ports(path.name, list(written.graph.input), graph.inputs, ranged)
    _check_ports(path.name, list(written.graph.output), (graph.output,), ranged)


def _dynamic_shapes(graph: Graph) -> tuple[dict[int, Any], ...] | None:
    """For each input, the dimension that grows with the batch; None when the batch is static."""
    if graph.min_prompts is None:
        return None
    first = graph.inputs[0]
    most = first.shape[0] // first.per_prompt
    prompts = torch.export.Dim("prompts", min=graph.min_prompts, max=most)
    return tuple(
        {0: port.per_prompt * prompts if port.per_prompt > 1 else prompts}
        if port.per_prompt
        else {}
        for port in graph.inputs
    )


def _check_ports(file: str, written: list[Any], specified: tuple[Port, ...], ranged: bool) -> None:
    """Raise RuntimeError unless names, shapes and types match; a range is written in prompts."""
    import onnx

    element_types = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
    }
    expected = []
    for port in specified:
        rows: int | str = port.shape[0]
        if ranged and port.per_prompt:
            rows = "prompts" if port.per_prompt == 1 else f"{port.per_prompt}*prompts"
        expected.append((port.name, (rows, *port.shape[1:]), element_types[port.dtype]))
    found = []
    for value in written:
        tensor = value.type.tensor_type
        shape = tuple(side.dim_param or side.dim_value for side in tensor.shape.dim)
        found.append((value.name, shape, tensor.elem_type))
    if found != expected:
        raise RuntimeError(f"the exporter wrote {found} into {file}, expected {expected}")


def _group_norm_by_instances(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """aten::group_norm as InstanceNormalization over [B, groups, rest], then weight and bias."""
    import onnxscript

    op: Any = onnxscript.opset21

    sides = [int(size) for size in input.shape[1:]]
    groups = (
        op.Constant(value_floats=[1.0] * num_groups),
        op.Constant(value_floats=[0.0] * num_groups),
    )
    rest = math.prod(sides) // num_groups
    # 0 keeps the batch dimension, which may be a range.
    grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, rest]))
    normal = op.InstanceNormalization(
        grouped, *(op.CastLike(value, input) for value in groups), epsilon=eps
    )
    normal = op.Reshape(normal, op.Constant(value_ints=[0, *sides]))
    per_channel = op.Constant(value_ints=[sides[0]] + [1] * (len(sides) - 1))
    scaled = op.Mul(normal, op.Reshape(weight, per_channel))
    return op.Add(scaled, op.Reshape(bias, per_channel))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages on its progress and on operators that we do not use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
