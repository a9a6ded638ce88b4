"""Class names → prompts → their text embeddings; the text encoders are freed at once.

Legend: K classes, G prompts that are encoded together, L tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...export.models import TOKENS, ModelSource, load_text_encoder, seen_classes
from ...kernels.noise import Draw, normal
from ..config import TEMPLATE

CHUNK = 32  # prompts at a time: SDXL's second encoder keeps 33 states of 0.4 MB for each


@dataclass(frozen=True)
class TextEmbeddings:
    """Of K prompts: text_KLD from both encoders, pooled_KD from the second.

    On the host: 10,000 prompts of SDXL-Turbo are 3.2 GB in fp16.
    """

    text_KLD: Tensor
    pooled_KD: Tensor


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
def encode_prompts(
    model: ModelSource,
    prompts: Sequence[str],
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> TextEmbeddings:
    """Encode as SDXL does: penultimate states of both encoders, pooled states of the second.

    Computed on `device` in fp32, CHUNK prompts at a time, and kept in `dtype` on the host. A model
    of random weights has no text encoders: its embeddings are normal numbers that depend on the
    prompt alone. ValueError: a prompt that is longer than the model reads.
    """
    width, pooled_width = model.text_widths()
    text = TextEmbeddings(
        torch.empty(len(prompts), TOKENS, width, dtype=dtype),
        torch.empty(len(prompts), pooled_width, dtype=dtype),
    )
    if model.weights == "random":
        _draw_text(text, prompts, device)
        return text
    width = _encode_part(model, "text_encoder", prompts, device, text, 0)
    _encode_part(model, "text_encoder_2", prompts, device, text, width)
    return text


def _encode_part(
    model: ModelSource,
    part: str,
    prompts: Sequence[str],
    device: str,
    text: TextEmbeddings,
    first: int,
) -> int:
    """Fill the columns of `text` from `first` on, and return where they end; the encoder is freed.

    The pooled states are the second encoder's.
    """
    tokenizer, encoder = load_text_encoder(model, part, device=device)
    for start in range(0, len(prompts), CHUNK):
        _require_short(tokenizer, prompts[start : start + CHUNK])
    end = first
    for start in range(0, len(prompts), CHUNK):
        tokens_GL = tokenizer(
            list(prompts[start : start + CHUNK]),
            padding="max_length",
            max_length=TOKENS,
            return_tensors="pt",
        ).input_ids.to(device)
        output = encoder(tokens_GL, output_hidden_states=True)
        states_GLD = output.hidden_states[-2]
        end = first + states_GLD.shape[-1]
        text.text_KLD[start : start + CHUNK, :, first:end] = states_GLD.cpu()
        if part == "text_encoder_2":
            text.pooled_KD[start : start + CHUNK] = output[0].cpu()
    return end


def _require_short(tokenizer: Any, prompts: Sequence[str]) -> None:
    """ValueError: what is cut off a prompt would be missing from the images without a word."""
    for prompt, tokens in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(tokens) > TOKENS:
            raise ValueError(
                f"prompt {prompt!r}: expected {TOKENS} tokens at most, which the model reads, got "
                f"{len(tokens)}: give a shorter one"
            )


def _draw_text(text: TextEmbeddings, prompts: Sequence[str], device: str) -> None:
    for row, prompt in enumerate(prompts):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8])
        sample = torch.zeros(1, dtype=torch.int64, device=device)
        for draw, kept in enumerate((text.text_KLD, text.pooled_KD)):
            kept[row] = normal(seed, Draw.PRIOR, sample, draw, tuple(kept.shape[1:]))[0].cpu()
