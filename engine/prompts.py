"""Class names → what the UNet needs of them, computed once; the text encoders are freed at once.

Legend: K classes, L tokens, D embedding width, P keys and values of one prompt end to end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..export.models import TOKENS, ModelParts, ModelSource, load_text_encoder, seen_classes
from ..export.modules import PromptProjector, key_value_slots
from ..kernels.noise import Draw, normal
from .config import TEMPLATE

CHUNK = 32  # prompts at a time: SDXL's second encoder keeps 33 states of 0.4 MB for each
BANK_SHARE = 0.4
"""Of the free GPU memory, for keys and values: an engine's build and its activations need the rest.
From the host, a prompt of SDXL-Turbo costs a copy of 25.6 MB (fp16) in every batch that has it."""


@dataclass(frozen=True)
class TextEmbeddings:
    """Of K prompts: text_KLD from both encoders, pooled_KD from the second; fp32."""

    text_KLD: Tensor
    pooled_KD: Tensor


@dataclass(frozen=True)
class PromptBank:
    """Of K prompts: the added embedding and the cross-attention keys and values of all layers."""

    added_KD: Tensor
    kv_KP: Tensor
    tokens: int


def class_prompts(
    names: Sequence[str],
    template: str = TEMPLATE,
    *,
    class_ids: Sequence[str] = (),
    own: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """A prompt per class: the template, or its `own` by class id; `{name}` in it is the class name.

    `class_ids` go with `names`, and are needed where there are own prompts. ValueError: a template
    without `{name}`, which would give all classes one prompt.
    """
    if "{name}" not in template:
        raise ValueError(f"the prompt template must hold {{name}}, got {template!r}")
    if not own:
        return tuple(template.replace("{name}", name) for name in names)
    return tuple(
        own.get(class_id, template).replace("{name}", name)
        for class_id, name in zip(class_ids, names, strict=True)
    )


def unseen_classes(model: ModelSource, names: Sequence[str]) -> tuple[str, ...]:
    """The names that the model's card does not list; none when the model has no card."""
    seen = seen_classes(model.folder)
    return () if seen is None else tuple(name for name in names if name not in seen)


@torch.no_grad()
def encode_prompts(model: ModelSource, prompts: Sequence[str], *, device: str) -> TextEmbeddings:
    """Encode as SDXL does: penultimate states of both encoders, pooled states of the second.

    A model of random weights has no text encoders: its embeddings are normal numbers that depend on
    the prompt alone. ValueError: a prompt that is longer than the model reads.
    """
    if model.weights == "random":
        return _random_text(model, prompts, device)
    states, pooled = [], []
    for part in ("text_encoder", "text_encoder_2"):
        tokenizer, encoder = load_text_encoder(model, part, device=device)
        _require_short(tokenizer, prompts)
        tokens_KL = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(device)
        penultimate, pooled = [], []
        for tokens_GL in tokens_KL.split(CHUNK):
            output = encoder(tokens_GL, output_hidden_states=True)
            penultimate.append(output.hidden_states[-2])
            pooled.append(output[0])
        states.append(torch.cat(penultimate))
    return TextEmbeddings(torch.cat(states, dim=-1), torch.cat(pooled))


def _require_short(tokenizer: Any, prompts: Sequence[str]) -> None:
    """ValueError: what is cut off a prompt would be missing from the images without a word."""
    most = tokenizer.model_max_length
    for prompt, tokens in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(tokens) > most:
            raise ValueError(
                f"prompt {prompt!r}: expected {most} tokens at most, which the model reads, got "
                f"{len(tokens)}: give a shorter one"
            )


def _random_text(model: ModelSource, prompts: Sequence[str], device: str) -> TextEmbeddings:
    width, pooled_width = model.text_widths()
    text, pooled = [], []
    for prompt in prompts:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8])
        sample = torch.zeros(1, dtype=torch.int64, device=device)
        text.append(normal(seed, Draw.PRIOR, sample, 0, (TOKENS, width)))
        pooled.append(normal(seed, Draw.PRIOR, sample, 1, (pooled_width,)))
    return TextEmbeddings(torch.cat(text), torch.cat(pooled))


def _empty_bank(prompts: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, unless it would take more than BANK_SHARE of its free memory: then on the
    host, from where a batch fetches the rows of its prompts."""
    size_bytes = prompts * width * dtype.itemsize
    if device.type == "cuda" and size_bytes > BANK_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(prompts, width, dtype=dtype)
    return torch.empty(prompts, width, dtype=dtype, device=device)


@torch.no_grad()
def project_prompts(parts: ModelParts, text: TextEmbeddings, *, conditioning_px: int) -> PromptBank:
    """Compute keys, values and added embeddings of all prompts; `conditioning_px` as diffusers'
    original and target size, with no crop."""
    projector, dtype, device = PromptProjector(parts.unet), parts.unet.dtype, parts.unet.device
    size = float(conditioning_px)
    time_ids_6 = torch.tensor([size, size, 0, 0, size, size], device=device)
    prompts, tokens = text.text_KLD.shape[:2]
    width = 2 * sum(slot.size for slot in key_value_slots(parts.unet, tokens))
    added = []
    # Filled in place: 1000 classes of SDXL-Turbo are 25.6 GB in fp16, which must not lie there
    # twice.
    kv_KP = _empty_bank(prompts, width, dtype, device)
    for text_GLD, pooled_GD, out_GP in zip(
        text.text_KLD.split(CHUNK), text.pooled_KD.split(CHUNK), kv_KP.split(CHUNK), strict=True
    ):
        added_GD, kv_GP = projector(
            text_GLD.to(device, dtype), pooled_GD.to(device, dtype), time_ids_6
        )
        added.append(added_GD)
        out_GP.copy_(kv_GP)
        del kv_GP
    return PromptBank(torch.cat(added), kv_KP, tokens=tokens)
