"""An ONNX graph run once by ONNX Runtime on the CPU, half precision in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .to_ort import require_ort


def run_on_cpu(path: Path, *inputs: Tensor) -> Tensor:
    """Run the graph; its output, on the CPU.

    ONNX Runtime casts fp16 to fp32 around each operator. It has no bf16 operators: such a graph is
    rewritten to fp32.
    """
    onnxruntime = require_ort("cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Optimised, it would hold every weight in fp32 as well: 15 GB for SDXL-Turbo's UNet, not 5.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model: Any = str(path)
    if any(value.dtype == torch.bfloat16 for value in inputs):
        model, inputs = _in_fp32(path), tuple(value.float() for value in inputs)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
    return torch.from_numpy(output)


def _in_fp32(path: Path) -> bytes:
    """The graph with its bf16 weights, constants, casts and ports in fp32."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    half, single = TensorProto.BFLOAT16, TensorProto.FLOAT
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == half:
                attribute.i = single
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == half:
            values = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    return model.SerializeToString()
