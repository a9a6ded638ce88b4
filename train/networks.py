"""Teachers and students by name, and their optimiser.

convnet-d{D}[-w{W}|-w{A}to{B}][-{norm}]
    the ConvNet of the distillation literature (Gidaris & Komodakis 2018; Zhao et al., ICLR 2021): D
    blocks of 3×3 convolution, norm, ReLU and 2×2 average pooling, then one linear layer. W channels
    in every block (default: 128), or from A to B in equal steps; norm is bn (batch, the default),
    in (instance) or none.
resnet18, resnet50
    torchvision's; at 96 px or less with RDED's stem for small images: 3×3, stride 1, no max-pool.
vgg11, alexnet
    the small-image variants of the same literature: batch norm and one linear layer in VGG, no
    dropout in either; adaptive average pooling makes them fit any size.
vit-s
    ViT-S (Touvron et al. 2021: 12 layers, width 384, 6 heads), patches of 4, 8 or 16 px, so that
    49 to 256 of them cover the image.
torchvision:NAME, timm:NAME
    any classifier of torchvision or of timm, as it is, with random weights.
package.module:function
    what `function(num_classes, image_size)` returns, called by position: an nn.Module with random
    weights from torch's default generator. It is taken to draw random numbers in training.

All take images [B, 3, size_px, size_px] and give logits [B, K].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..engine.errors import reason
from .config import CONVNET, TIMM, TORCHVISION, StudentPrecision, require_network
from .plugins import is_function, load_function

SMALL_IMAGE_PX = 96
"""Largest image whose full resolution a ResNet's stem keeps."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_network(name: str, classes: int, size_px: int) -> nn.Module:
    """A net with random weights from torch's default generator, in channels_last layout.

    Raises ValueError for an unknown name or a size that the net cannot take.
    """
    require_network(name)
    if is_function(name):
        network = call_network(name, classes, size_px)
    elif name.startswith(TORCHVISION):
        network = _torchvision(name, classes, size_px)
    elif name.startswith(TIMM):
        network = _timm(name, classes, size_px)
    elif match := CONVNET.fullmatch(name):
        network = _convnet(match, classes, size_px)
    else:
        network = _BUILDERS[name](classes, size_px)
    return network.to(memory_format=torch.channels_last)


def call_network(name: str, classes: int, size_px: int) -> nn.Module:
    """The network that `package.module:function` returns; ValueError where it is none."""
    function = load_function(name)
    try:
        network = function(classes, size_px)
    except Exception as error:
        raise ValueError(f"called with ({classes}, {size_px}) it raised {reason(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"expected a torch.nn.Module from it, got {type(network).__name__}")
    return network


def autocast(device: torch.device, precision: StudentPrecision) -> torch.autocast:
    """Autocast at `precision`; no effect at fp32."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def draws_in_training(network: nn.Module) -> bool:
    """Whether a training step draws random numbers: dropout or stochastic depth."""
    names = ("p", "dropout", "drop_prob")
    rates = (getattr(m, name, 0.0) for m in network.modules() for name in names)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def adamw(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused, betas 0.9 and 0.999; decoupled weight decay on matrices and filters only."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _convnet(match: re.Match[str], classes: int, size_px: int) -> nn.Module:
    depth, first = int(match[1]), int(match[2] or 128)
    last = int(match[3] or first)
    side = size_px >> depth
    if side < 1 or min(first, last) < 1:
        raise ValueError(
            f"network {match[0]}: expected images of at least {1 << depth} px and a width of at "
            f"least 1, got {size_px} px and {min(first, last)}"
        )
    widths = [round(first + (last - first) * block / (depth - 1)) for block in range(depth)]
    norm = _NORMS[match[4] or "bn"]
    layers: list[nn.Module] = []
    for channels, width in zip([3, *widths], widths, strict=False):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=norm is nn.Identity),
            norm(width),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, classes))


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "in": lambda width: nn.GroupNorm(width, width),
    "none": nn.Identity,
}


def _resnet(name: str, classes: int, size_px: int) -> nn.Module:
    import torchvision

    network = torchvision.models.get_model(name, num_classes=classes)
    if size_px <= SMALL_IMAGE_PX:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _vgg11(classes: int, size_px: int) -> nn.Module:
    if size_px < 32:
        raise ValueError(f"network vgg11: expected images of at least 32 px, got {size_px}")
    layers: list[nn.Module] = []
    channels = 3
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in stage:
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def _alexnet(classes: int, size_px: int) -> nn.Module:
    if size_px < 16:
        raise ValueError(f"network alexnet: expected images of at least 16 px, got {size_px}")
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel, pools in ((128, 5, 1), (192, 5, 1), (256, 3, 0), (192, 3, 0), (192, 3, 1)):
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(True)]
        layers += [nn.MaxPool2d(2)] * pools
        channels = width
    pool = nn.AdaptiveAvgPool2d(4)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(192 * 16, classes))


def _vit_small(classes: int, size_px: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    patch_px = 4 if size_px < 56 else 8 if size_px <= 128 else 16
    if size_px % patch_px:
        raise ValueError(f"network vit-s: expected a multiple of {patch_px} px, got {size_px}")
    return VisionTransformer(size_px, patch_px, 12, 6, 384, 1536, num_classes=classes)


_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": partial(_resnet, "resnet18"),
    "resnet50": partial(_resnet, "resnet50"),
    "vgg11": _vgg11,
    "alexnet": _alexnet,
    "vit-s": _vit_small,
}


def torchvision_name(spec: str, role: str) -> str:
    """NAME of torchvision:NAME; ValueError when torchvision has no such classifier."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    name = spec.removeprefix(TORCHVISION)
    if name not in known:
        raise ValueError(f"{role} {spec} is unknown: expected one of {', '.join(sorted(known))}")
    return name


def _torchvision(spec: str, classes: int, size_px: int) -> nn.Module:
    import torchvision

    name = torchvision_name(spec, "network")
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": size_px}
    elif name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, num_classes=classes, **options)
    except (AssertionError, ValueError) as error:  # vit_*: the size is not a multiple of its patch
        raise ValueError(f"network {spec} at {size_px} px: {error}") from None


def timm_config(spec: str, role: str) -> Any:
    """timm's description of the pretrained weights of timm:NAME; ValueError for an unknown NAME."""
    import timm

    name = spec.removeprefix(TIMM)
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"{role} {spec} is unknown: {error}") from None
    if config is None:
        raise ValueError(
            f"{role} {spec} is unknown to timm {timm.__version__}: timm.list_models() has the names"
        )
    return config


def _timm(spec: str, classes: int, size_px: int) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": classes}
    if timm_config(spec, "network").fixed_input_size:  # its layers are made for one
        options["img_size"] = size_px
    try:
        return timm.create_model(spec.removeprefix(TIMM), **options)
    except Exception as error:  # of many types, where its layers do not fit the size
        raise ValueError(f"network {spec} at {size_px} px: {reason(error)}") from None
