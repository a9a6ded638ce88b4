"""Layers in eight bits: int8 convolutions and linear layers, or fp8 (E4M3) linear layers.

A weight is stored in eight bits, int8 with a scale per output channel, fp8 with one scale. An input
is rounded with one scale per layer, which modelopt computes from calibration inputs. torch then
multiplies the rounded values in the precision of the other layers, which simulates a unit for eight
bits; on a GPU with one, fp8 products run there. A compiled graph holds QuantizeLinear and
DequantizeLinear, as int8 units and TensorRT expect them.

eight_bits.toml in a model's folder lists the layers that stay as they are, with reasons; a model
without one takes SDXL-Turbo's.
"""

from __future__ import annotations

import hashlib
import logging
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .bundle import BundleError
from .config import EIGHT_BITS, EightBits, Precision
from .documents import check_document
from .durable import json_sha256
from .graphs import Graph, first_prompts, layers_in_fp32
from .models import TURBO_CONFIGURATION, ModelError, ModelSource, Unavailable
from .modules import TinyLatentDecoder

RECIPE = "eight_bits.toml"
_Part = Literal["denoiser", "decoder"]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PERCENTILES: dict[EightBits, float] = {"int8": 99.99, "fp8": 100.0}
"""Share of a layer's inputs that its scale spans. sdxl-tiny, 100 images: int8 43.0 dB with 99.99,
42.0 with all; fp8 41.2 and 41.5."""
_DTYPES: dict[EightBits, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FP8_CAPABILITY = 89
"""Compute capability from which GPUs have units for fp8: Ada, Hopper, Blackwell."""
Inputs = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Calibration:
    """Inputs and recipe, which decide the scales of an engine's layers."""

    described: Mapping[str, Any]
    """Everything that `inputs` depends on besides the model, as plain JSON."""
    inputs: Callable[[], Mapping[str, Inputs]]
    """Runs the model in its own precision: inputs of denoiser and decoder, on the CPU. A graph
    without any gets its own random ones."""
    left_out: Mapping[str, Mapping[str, str]]
    """The recipe: for each graph, patterns of layers that stay as they are, with reasons."""

    @property
    def sha256(self) -> str:
        """Hash for the engine's key; covers this file too."""
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return json_sha256({"on": self.described, "left_out": self.left_out, "code": code})


def read_recipe(model: ModelSource) -> dict[str, dict[str, str]]:
    """The model's recipe. Raises ModelError for a file that is none."""
    path = model.folder / RECIPE
    if not path.is_file():
        path = TURBO_CONFIGURATION / RECIPE
    remedy = "write lines 'pattern = reason' under [denoiser] and [decoder]"
    try:
        recipe = tomllib.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: {error}: {remedy}") from error
    check_document(recipe, str(path), ModelError, remedy, dict[_Part, dict[str, str]])
    return {"denoiser": {}, "decoder": {}} | recipe


def random_calibration(model: ModelSource) -> Calibration:
    """For random weights, whose images mean nothing."""
    return Calibration({"inputs": "random"}, dict, read_recipe(model))


@torch.no_grad()
def quantise_graph(
    graph: Graph, precision: Precision, vae_precision: Precision, calibration: Calibration
) -> None:
    """Put a denoiser's or decoder's layers into eight bits, if that is its precision, but for those
    that the recipe leaves out. The encoder, which sees a patch once, and a tiny decoder stay.

    Raises Unavailable without modelopt, and BundleError when a layer's inputs or weights are NaN or
    infinite.
    """
    asked = {"denoiser": precision, "decoder": vae_precision}.get(graph.name)
    if asked not in EIGHT_BITS or isinstance(graph.module, TinyLatentDecoder):
        return
    precision = cast(EightBits, asked)
    layers = _chosen(graph.module, precision, calibration.left_out[graph.name])
    inputs = calibration.inputs().get(graph.name) or [
        tuple(first_prompts(graph.inputs, graph.random_inputs(seed=2), 1))
    ]
    largest = _largest_inputs(graph, layers, inputs, PERCENTILES[precision])
    for name, most in largest.items():
        parent, _, own = name.rpartition(".")
        made = EightBitLayer(layers.pop(name), most, _DTYPES[precision])
        setattr(graph.module.get_submodule(parent), own, made)


def _chosen(
    module: nn.Module, precision: EightBits, left_out: Mapping[str, str]
) -> dict[str, nn.Conv2d | nn.Linear]:
    kinds = (nn.Linear, nn.Conv2d) if precision == "int8" else (nn.Linear,)
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and not any(fnmatchcase(name, each) for each in left_out)
    }


def _largest_inputs(
    graph: Graph, layers: Mapping[str, nn.Module], inputs: Inputs, percentile: float
) -> dict[str, Tensor]:
    """The absolute value from which on a layer's input is cut off; for layers that get any."""
    calib, calibrators = require_modelopt(), {}

    def watch(name: str, _: nn.Module, values: tuple[Tensor, ...]) -> None:
        if not bool(torch.isfinite(values[0]).all()):
            raise BundleError(
                f"the calibration inputs of the {graph.name} are NaN or infinite at {name}: check "
                "the model's weights and the coreset's patches"
            )
        if name not in calibrators:
            calibrators[name] = calib.HistogramCalibrator(8, None, False)
        calibrators[name].collect(values[0].float())

    hooks = [
        layer.register_forward_pre_hook(partial(watch, name)) for name, layer in layers.items()
    ]
    like = next(graph.module.parameters())
    slow = like.dtype == torch.float16 and like.device.type == "cpu"  # few CPUs compute in it
    try:
        with layers_in_fp32(graph.module) if slow else nullcontext():
            for values in inputs:
                dtypes = (torch.float32 if slow else port.dtype for port in graph.inputs)
                graph.module(
                    *(v.to(like.device, dtype) for v, dtype in zip(values, dtypes, strict=True))
                )
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: calibrator.compute_amax("percentile", percentile=percentile)
        for name, calibrator in calibrators.items()
    }


def require_modelopt() -> Any:
    """modelopt's calibrators. Raises Unavailable without it."""
    told = logging.getLogger("torch.utils.cpp_extension")
    level = told.level
    told.setLevel(logging.ERROR)  # it misses a GPU, and modelopt other libraries
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from modelopt.torch.quantization import calib
    except ImportError as error:
        raise Unavailable(
            f"int8 and fp8 need nvidia-modelopt ({error}): pip install 'patchbloom[eight-bits]', "
            "or use another --precision"
        ) from error
    finally:
        told.setLevel(level)
    return calib


class EightBitLayer(nn.Module):
    """A convolution or linear layer with its weight in eight bits and its input rounded to them."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, largest_input: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = layer.weight.detach()
        if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
            raise BundleError("a weight is NaN or infinite: check the model's weights")
        by_channel = weight.flatten(1).abs().amax(1)
        largest = by_channel if dtype == torch.int8 else by_channel.amax()
        own = weight.dtype
        self.register_buffer("weight_scale", _scale(largest, dtype, own))
        self.register_buffer("input_scale", _scale(largest_input, dtype, own))
        self.register_buffer("weight", _quantised(weight, self.weight_scale, dtype == torch.int8))
        self.bias = layer.bias
        self._fp8_unit = dtype == torch.float8_e4m3fn and _has_fp8_unit(weight.device)
        self._product: Callable[..., Tensor] = F.linear
        if isinstance(layer, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self._product = partial(F.conv2d, **{name: getattr(layer, name) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        exporting = torch.compiler.is_exporting()  # as operators, which ONNX has names for
        if self._fp8_unit and not exporting:
            return fp8_product(x, self.weight, self.input_scale, self.weight_scale, self.bias)
        to_eight, back = (quantised, dequantised) if exporting else (_quantised, _dequantised)
        int8 = self.weight.dtype == torch.int8
        x = back(to_eight(x, self.input_scale, int8), self.input_scale)
        weight = back(self.weight, self.weight_scale)
        return self._product(x, weight, self.bias)


def fp8_product(
    x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """A linear layer on a unit for fp8: x [..., D] in 16 bits, weight [E, D] in fp8, two scales.

    D and E are multiples of 16.
    """
    rows = _quantised(x, input_scale, False).flatten(0, -2)
    out = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=input_scale.float(),
        scale_b=weight_scale.float(),
        bias=bias,
        out_dtype=x.dtype,
    )
    return out.unflatten(0, x.shape[:-1])


def _has_fp8_unit(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= FP8_CAPABILITY


def _scale(largest: Tensor, dtype: torch.dtype, own: torch.dtype) -> Tensor:
    """Value of 1 in eight bits: a normal number in the layer's own dtype."""
    return (largest.float() / LARGEST[dtype]).clamp(min=torch.finfo(own).smallest_normal).to(own)


def _along(scale: Tensor, values: Tensor) -> Tensor:
    """A scale per output channel, or one for all, shaped for `values`."""
    return scale.float().reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale.float()


def _quantised(values: Tensor, scale: Tensor, int8: bool) -> Tensor:
    """values / scale in int8 or fp8; a scale for each row, or a single one."""
    scaled = values.float() / _along(scale, values)
    if int8:
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)


def _dequantised(values: Tensor, scale: Tensor) -> Tensor:
    """values · scale in the scale's dtype."""
    return (values.float() * _along(scale, values)).to(scale.dtype)


quantised = torch.library.custom_op("patchbloom::quantised", _quantised, mutates_args=())
dequantised = torch.library.custom_op("patchbloom::dequantised", _dequantised, mutates_args=())


@quantised.register_fake
def _(values: Tensor, scale: Tensor, int8: bool) -> Tensor:
    return torch.empty_like(values, dtype=torch.int8 if int8 else torch.float8_e4m3fn)


@dequantised.register_fake
def _(values: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=scale.dtype)


@cache
def translations() -> dict[Callable, Callable]:
    """The two operators in ONNX."""
    import onnx
    import onnxscript

    op: Any = onnxscript.opset21

    def quantise_linear(values: Any, scale: Any, int8: bool) -> Any:
        # With the zero point left out, ONNX Runtime takes uint8.
        kind = onnx.TensorProto.INT8 if int8 else onnx.TensorProto.FLOAT8E4M3FN
        zero = op.Constant(value=onnx.helper.make_tensor("zero", kind, [], [0]))
        return op.QuantizeLinear(values, scale, zero)

    def dequantise_linear(values: Any, scale: Any) -> Any:
        return op.DequantizeLinear(values, scale, **({"axis": 0} if len(scale.shape) else {}))

    return {
        torch.ops.patchbloom.quantised.default: quantise_linear,
        torch.ops.patchbloom.dequantised.default: dequantise_linear,
    }
