"""fused_layers.py: what it replaces at SDXL-Turbo's full size, and that torch.compile takes it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from patchbloom.engine.expand.backends import TorchBackend
from patchbloom.engine.expand.fused_layers import FusedResnet, fuse
from patchbloom.export.config import EngineSpec
from patchbloom.export.models import ModelParts
from patchbloom.export.modules import Denoiser, LatentDecoder, key_value_slots
from small_networks import new_parts
from test_modules import configuration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

SIDE, PROMPTS, IMAGES, TOKENS = 28, 4, 8, 77
TEXT = torch.ones(2, 3, 32)
ATTENTION = "scaled_dot_product_attention"
VIEWS = {
    "view", "_unsafe_view", "t", "expand", "transpose", "slice", "split", "unsqueeze", "permute",
    "unbind", "device",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that compute; views and questions are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = str(operator).split(".")[1]
        if name not in VIEWS:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


def full_size_parts() -> ModelParts:
    """SDXL-Turbo's networks in fp16 on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**configuration("unet")).eval().half()
        return ModelParts(unet, AutoencoderKL(**configuration("vae")).eval().half())


def pretend_cuda(network: nn.Module) -> None:
    """Give it fake weights on a GPU, in the layouts of its own. Needs a FakeTensorMode."""
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    likeness = {"dtype": tensor.dtype, "device": "cuda"}
                    store[name] = torch.empty_strided(tensor.shape, tensor.stride(), **likeness)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """One operator, as on a GPU; fake tensors would take the plain formula."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@torch.no_grad()
def count(part: str, fused: bool) -> Counter[str]:
    """Operators of one evaluation or one decode of 32 images at 224 px, eager on CUDA."""
    parts = full_size_parts()
    if fused:
        fuse(parts)
    width = sum(2 * slot.size for slot in key_value_slots(parts.unet, TOKENS))
    networks = {
        "unet": Denoiser(parts.unet, TOKENS),
        "vae": LatentDecoder(parts.vae).to(memory_format=torch.channels_last),
    }
    half: dict[str, Any] = {"dtype": torch.float16}
    with FakeTensorMode(), torch.device("cuda"), patch.object(F, ATTENTION, flash_attention):
        pretend_cuda(networks[part])
        x_BCHW = torch.empty(PROMPTS * IMAGES, 4, SIDE, SIDE, **half)
        added, kv = torch.empty(PROMPTS, 1280, **half), torch.empty(PROMPTS, width, **half)
        named = (torch.empty(1), added, kv) if part == "unet" else ()
        with Operators() as operators:
            networks[part](x_BCHW, *named)
    return operators.counts


def test_the_unet_runs_213_operators_fewer() -> None:
    """SiLU acts on the time 18 times, and a division makes its frequencies. Copied are the prompts'
    vectors for each image, and eps for the sampler."""
    before, after = count("unet", False), count("unet", True)
    print(f"UNet: {before.total()} operators, then {after.total()}: {dict(after)}")
    assert (before["native_group_norm"], before["gelu"], before["div"]) == (46, 70, 88)
    assert (after["group_norm_silu"], after["geglu"]) == (46, 70)
    assert (after["silu"], after["div"], after["clone"]) == (18, 1, 2)
    assert not after.keys() & {"native_group_norm", "gelu"}
    assert after.total() <= before.total() - 213


def test_the_decoder_runs_47_operators_fewer() -> None:
    """The division that is left scales the latents; nothing is copied."""
    before, after = count("vae", False), count("vae", True)
    print(f"decoder: {before.total()} operators, then {after.total()}: {dict(after)}")
    assert (before["native_group_norm"], before["silu"], before["div"]) == (30, 29, 16)
    assert (after["group_norm_silu"], after["silu"], after["div"]) == (30, 0, 1)
    assert not after.keys() & {"native_group_norm", "clone"}
    assert after.total() <= before.total() - 47


@torch.no_grad()
def test_compile_sees_one_graph() -> None:
    """The decoder's middle has resnets and attention, a transformer of the UNet has the rest."""
    torch.compiler.reset()
    parts = new_parts()
    fuse(parts)
    for block in (parts.vae.decoder.mid_block, parts.unet.mid_block.attentions[0]):
        image = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        text = (
            {}
            if block is parts.vae.decoder.mid_block
            else {"encoder_hidden_states": TEXT, "return_dict": False}
        )
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        expected, found = (run(image, **text) for run in (block, compiled))
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_eager_on_cuda_is_fused(device: Literal["cpu", "cuda"]) -> None:
    spec = EngineSpec(size_px=32, batch=2, images_per_prompt=1, device=device)
    parts = new_parts()
    TorchBackend("eager", parts, spec, tokens=3)
    for network in (parts.unet, parts.vae.encoder, parts.vae.decoder):
        fused = [layer for layer in network.modules() if isinstance(layer, FusedResnet)]
        stock = [layer for layer in network.modules() if isinstance(layer, ResnetBlock2D)]
        assert (bool(fused), bool(stock)) == (device == "cuda", device == "cpu")


def test_other_layers_stay() -> None:
    """A scale of the output, attention to a text, and an activation that is not SiLU."""
    parts = new_parts()
    blocks = [layer for layer in parts.unet.modules() if isinstance(layer, ResnetBlock2D)]
    blocks[0].output_scale_factor, blocks[1].nonlinearity = 2.0, nn.ReLU()
    parts.unet.conv_act = nn.ReLU()
    crossed = parts.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    fuse(parts)
    left = [layer for layer in parts.unet.modules() if isinstance(layer, ResnetBlock2D)]
    assert left == blocks[:2]
    assert isinstance(parts.unet.conv_act, nn.ReLU)
    assert parts.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor is crossed
