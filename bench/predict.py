"""Predicted images per second, from counted work and a card's data sheet. Nothing is measured.

    python bench/predict.py --size 224 512 --batch 32 64

The networks run once on meta tensors at full size; a dispatch mode notes each operator's
floating-point operations, the bytes that it reads and writes, and its region (engine/expand/
regions.py). A batch then takes

    max(launches · host time of a launch, Σ over kernels of max(flops / peak, bytes / bandwidth))

Peak and bandwidth are shares of the data sheet that large products and copies reach. Launches are
those of a batch; views are free. What a backend does with the operators:

    diffusers   one kernel each; also its encoder, and keys and values of every image in every eval
    eager       one kernel each, without what is done once per coreset
    compile     runs between the products of a region become one kernel: an estimate of what
                torch.compile makes, which may split or join them; Q, K and V count as three
    inductor    the same, with each network as one region

On a GPU ours launch one CUDA graph per batch, unless named `-launched`, and eager and compile have
the layers of engine/expand/fused_layers.py, whose kernels stay apart from compiled ones.

A model that can be wrong: it knows no caches, no occupancy, and none of the kernels that a
GroupNorm or a convolution with a bias really takes. bench_expand.py prints measured / predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from measure import run_program
from patchbloom.engine.expand.fused_layers import fuse
from patchbloom.engine.expand.regions import REGIONS
from patchbloom.export.config import EngineSpec, Precision
from patchbloom.export.graphs import make_graphs
from patchbloom.export.models import TOKENS, ModelParts, ModelSource, find_model, load_parts
from patchbloom.export.modules import LatentEncoder
from peer_names import LAUNCHED, split_name
from roofline import Roofline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRODUCT_SHARE, COPY_SHARE = 0.8, 0.9
"""Reached by bf16 products of 8192³ and by copies: 798 of 989 TFLOP/s and 3.0 of 3.35 TB/s on an
H100, 788 and 4.3 of 4.8 on an H200. Assumed for the other cards."""
CARDS = {
    "NVIDIA RTX A6000": (154.8, 768),  # RTX A6000 data sheet: 309.7 with sparsity
    "NVIDIA GeForce RTX 4090": (165.2, 1008),  # Ada GPU architecture, table 2: fp32 accumulate
    "NVIDIA A100-SXM4-80GB": (312, 2039),  # A100 data sheet
    "NVIDIA H100 80GB HBM3": (989.4, 3350),  # H100 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H200": (989.4, 4800),  # H200 data sheet, SXM: 1,979 with sparsity
}
"""Dense fp16 TFLOP/s of the tensor cores, and GB/s, by torch's name of the card."""
HOST_US = {"diffusers": 20.0, "eager": 20.0, "compile": 10.0, "inductor": 10.0}
"""Host time of a launch: an assumption, through torch's modules and through compiled wrappers."""
OWN_KERNELS = ("group_norm_silu", "geglu")
"""Operators of ours, which torch.compile fuses with nothing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predicted images per second of full-size networks on known cards."""

    model: str = "sdxl-turbo"
    """Name or folder of a model; its weights are not read."""
    size: tuple[int, ...] = (224, 512)
    """Image sizes in px."""
    batch: tuple[int, ...] = (32, 64)
    """Images per engine call."""
    evals: int = 4


@dataclass(frozen=True)
class Operator:
    """One operator of a trace; sizes in bytes, by storage."""

    name: str
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    region: int
    """The compiled block that it is in; 0: none."""


@dataclass(frozen=True)
class Kernel:
    """Work of one launch."""

    flops: float
    bytes: float


class Tracer(TorchDispatchMode):
    """Notes the operators that are called in its block, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.region = self.regions = 0
        self._alive: list[Any] = []  # a freed storage's address would be used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = bool(returned) and all(
            each.alias_info and not each.alias_info.is_write for each in returned
        )
        name = func._overloadpacket.__name__
        # Convolutions keep channels_last, but not on meta tensors, where copies bring it back.
        is_copy = name == "clone" and (kwargs or {}).get("memory_format") is torch.channels_last
        is_free = name.startswith(("empty", "new_empty")) or name == "_unsafe_view"
        if not (is_view or is_copy or is_free):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.note(name, flops, (*args, *(kwargs or {}).values()), out)
        return out

    def note(self, name: str, flops: float, given: Sequence[Any], out: Any) -> None:
        """Add one operator."""
        reads, writes = self._sizes(given), self._sizes((out,))
        self.operators.append(Operator(name, flops, reads, writes, self.region))

    def _sizes(self, values: Sequence[Any]) -> dict[int, int]:
        """Bytes by storage, at most its size: an expanded view reads what it has."""
        found: dict[int, int] = {}
        for value in values:
            if isinstance(value, list | tuple):
                found |= self._sizes(value)
            elif isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive.append(storage)
                found[storage._cdata] = min(value.nbytes, storage.nbytes())
        return found

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention as one kernel; on meta tensors it would be several."""
        out = torch.empty_like(query)
        self.note("attention", 4 * query.numel() * key.shape[-2], (query, key, value), out)
        return out


@contextmanager
def regions_of(network: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Number the calls of the blocks that backend `compile` compiles."""

    def enter(*_: Any) -> None:
        tracer.regions += 1
        tracer.region = tracer.regions

    def leave(*_: Any) -> None:
        tracer.region = 0

    blocks = [module for module in network.modules() if isinstance(module, REGIONS)]
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def trace(network: nn.Module, call: Callable[[], object]) -> list[Operator]:
    """Operators of a call that runs `network`, on meta tensors."""
    with (
        Tracer() as tracer,
        regions_of(network, tracer),
        mock.patch.object(F, "scaled_dot_product_attention", tracer.attend),
    ):
        call()
    return tracer.operators


def single(operators: Sequence[Operator]) -> list[Kernel]:
    """One kernel per operator."""
    return [
        Kernel(each.flops, sum(each.reads.values()) + sum(each.writes.values()))
        for each in operators
    ]


def fused(operators: Sequence[Operator]) -> list[Kernel]:
    """One kernel per product or operator of ours, and per run of others within a region.

    A run reads what it did not write, and writes what is read after it. A GroupNorm in it adds one
    kernel: statistics first, which read its input too.
    """
    last = {storage: n for n, each in enumerate(operators) for storage in each.reads}
    kernels: list[Kernel] = []
    numbered = groupby(
        enumerate(operators),
        key=lambda pair: (pair[1].region, pair[0] if _is_alone(pair[1]) else -1),
    )
    for _, group in numbered:
        run = list(group)
        end, reads, writes = run[-1][0], {}, {}
        for _, each in run:
            reads |= {key: size for key, size in each.reads.items() if key not in writes}
            writes |= each.writes
        kept = {key: size for key, size in writes.items() if last.get(key, end + 1) > end}
        kernels.append(Kernel(run[0][1].flops, sum(reads.values()) + sum(kept.values())))
        norms = [each for _, each in run if each.name == "native_group_norm" and len(run) > 1]
        kernels += [Kernel(0, max(each.reads.values())) for each in norms]
    return kernels


def _is_alone(operator: Operator) -> bool:
    return operator.flops > 0 or not operator.region or operator.name in OWN_KERNELS


@dataclass(frozen=True)
class Batch:
    """Kernels of one batch of images, by part."""

    images: int
    denoiser: list[Kernel]
    """Kernels of all evals."""
    vae: list[Kernel]
    launches: int
    host_us: float
    """Host time of a launch."""

    def images_per_s(self, roofline: Roofline, precision: Precision, vae: Precision) -> float:
        """The formula of this file's docstring."""
        parts: list[tuple[list[Kernel], Precision]] = [(self.denoiser, precision), (self.vae, vae)]
        device_s = sum(
            max(each.flops / roofline.flops[name], each.bytes / roofline.copy_bytes_per_s)
            for kernels, name in parts
            for each in kernels
        )
        return self.images / max(self.launches * self.host_us / 1e6, device_s)


Maker = Callable[[Sequence[Operator]], list[Kernel]]


def count_batches(
    model: ModelSource,
    *,
    device: str,
    size_px: int,
    batch: int,
    evals: int,
    precision: Precision,
    vae: Precision,
) -> dict[str, Batch]:
    """Kernels of a batch of one prompt's images, by backend; computes and reads nothing.

    `device`: `cpu`, where no graph is recorded and no layer fused, or `cuda`.
    """
    spec = EngineSpec(size_px=size_px, batch=batch, images_per_prompt=batch)
    architecture = replace(model, weights="random")

    def parts() -> ModelParts:
        return load_parts(architecture, precision=precision, vae_precision=vae, device="meta")

    def made(name: str, make: Maker, networks: Sequence[Sequence[Operator]], calls: int) -> Batch:
        denoiser, vae = make(networks[0]) * evals, make(networks[1]) * calls
        return Batch(batch, denoiser, vae, len(denoiser) + len(vae), HOST_US[name])

    stock, calls = _trace_engine(parts(), spec)
    torch_own = stock
    if device == "cuda":
        own = parts()
        fuse(own)
        torch_own, _ = _trace_engine(own, spec)
    whole = [[replace(each, region=1) for each in part] for part in stock]
    counted = {"diffusers": made("diffusers", single, _trace_pipeline(parts(), spec), 1)}
    for name, make, networks in (
        ("eager", single, torch_own),
        ("compile", fused, torch_own),
        ("inductor", fused, whole),
    ):
        launched = counted[name + LAUNCHED] = made(name, make, networks, calls)
        counted[name] = replace(launched, launches=1) if device == "cuda" else launched
    return counted


def _trace_engine(parts: ModelParts, spec: EngineSpec) -> tuple[list[list[Operator]], int]:
    """Operators of one eval and of one call of the decoder, and its calls per batch."""
    _, *graphs = make_graphs(parts, spec, tokens=TOKENS)
    own = []
    for graph in graphs:
        inputs = [torch.empty(port.shape, dtype=port.dtype, device="meta") for port in graph.inputs]
        own.append(trace(graph.module, lambda graph=graph, inputs=inputs: graph.module(*inputs)))
    return own, spec.batch // graphs[1].inputs[0].shape[0]


def _trace_pipeline(parts: ModelParts, spec: EngineSpec) -> tuple[list[Operator], list[Operator]]:
    """Operators of one eval, and of encoder and decoder, as diffusers' pipeline calls them."""
    unet, vae, batch = parts.unet, parts.vae, spec.batch
    config: Any = unet.config

    def empty(*shape: int, like: Any = unet) -> Tensor:
        return torch.empty(batch, *shape, dtype=like.dtype, device="meta")

    pixels = empty(3, spec.size_px, spec.size_px, like=vae)
    latents = LatentEncoder(vae)(pixels).chunk(2, dim=1)[0]
    times = 6 * config.addition_time_embed_dim
    added = {
        "text_embeds": empty(config.projection_class_embeddings_input_dim - times),
        "time_ids": empty(6),
    }
    text, step = empty(TOKENS, config.cross_attention_dim), torch.empty((), device="meta")

    def denoise() -> object:
        call: Any = unet
        x_BCHW = latents.to(unet.dtype)
        return call(x_BCHW, step, encoder_hidden_states=text, added_cond_kwargs=added)

    return trace(unet, denoise), trace(vae, lambda: (vae.encode(pixels), vae.decode(latents)))


def card_roofline(card: str) -> Roofline:
    """Rates that large products and copies should reach on a card of CARDS."""
    tflops, gb_per_s = CARDS[card]
    flops = PRODUCT_SHARE * tflops * 1e12
    return Roofline(
        flops={"fp16": flops, "bf16": flops}, copy_bytes_per_s=COPY_SHARE * gb_per_s * 1e9
    )


def predict_rates(
    model: ModelSource,
    precisions: Mapping[str, tuple[Precision, Precision]],
    measured: Roofline,
    card: str,
    **asked: Any,
) -> dict[str, float]:
    """Images per second of the peers that are known here, by name; `precisions` as in roofline.py.

    By the data sheet on a card of CARDS, elsewhere by the measured roofline. `asked`: device and
    shapes, as in count_batches.
    """
    limits = measured
    if card in CARDS:
        limits = card_roofline(card)
        limits = replace(limits, flops={**measured.flops, **limits.flops})
    counted = {
        pair: count_batches(model, precision=pair[0], vae=pair[1], **asked)
        for pair in set(precisions.values())
    }
    return {
        name: counted[pair][peer].images_per_s(limits, *pair)
        for name, pair in precisions.items()
        if (peer := split_name(name)[0]) in counted[pair]
    }


def main(options: Options) -> None:
    """Print launches per image and predicted images per second."""
    model = find_model(options.model, "random")
    print("PREDICTION, not measured: images/s, fp16")
    for size_px in options.size:
        for batch in options.batch:
            counted = count_batches(
                model,
                device="cuda",
                size_px=size_px,
                batch=batch,
                evals=options.evals,
                precision="fp16",
                vae="fp16",
            )
            print(f"\n| {size_px} px, batch {batch} | {' | '.join(counted)} |")
            print(f"| --- |{' --- |' * len(counted)}")
            launches = (f"{each.launches / batch:.3g}" for each in counted.values())
            print(f"| launches per image | {' | '.join(launches)} |")
            for card in CARDS:
                roofline = card_roofline(card)
                rates = (each.images_per_s(roofline, "fp16", "fp16") for each in counted.values())
                print(f"| {card} | {' | '.join(f'{rate:.0f}' for rate in rates)} |")


if __name__ == "__main__":
    run_program(main, Options)
