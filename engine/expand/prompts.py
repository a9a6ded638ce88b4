"""Class names → prompts → text embeddings; the text encoders are freed immediately.

Legend: K classes, G prompts encoded together, L tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...export.configurations import seen_classes
from ...export.models import TOKENS, ModelSource, load_text_encoder, load_tokenizer
from ...kernels.noise import Draw, normal
from ..config import TEMPLATE

CHUNK = 32  # prompts at a time: SDXL's second encoder keeps 33 states of 0.4 MB for each


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of K prompts: text_KLD from both encoders, pooled_KD from the second.

    They stay on the host: 10,000 prompts of SDXL-Turbo take 3.2 GB in fp16.
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
    """One prompt per class: its own from `own`, or the template; `{name}` becomes the class name.

    `own` is keyed by class id, and needs `class_ids` in the order of `names`. Raises ValueError
    when the template lacks `{name}`, which would give all classes the same prompt.
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
    """The names that the model's card does not list; none if the model has no card."""
    seen = seen_classes(model.folder)
    return () if seen is None else tuple(name for name in names if name not in seen)


def check_prompts(model: ModelSource, prompts: Sequence[str]) -> None:
    """Raise ModelError for a damaged tokenizer, ValueError for a prompt over the model's limit."""
    if model.weights == "pretrained":
        for part in ("text_encoder", "text_encoder_2"):
            _require_short(load_tokenizer(model, part), prompts)


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
    with random weights has no text encoders: its embeddings are normal numbers that depend only on
    the prompt. Raises ValueError when a prompt exceeds the model's limit.
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
    """Fill the columns of `text` from `first` on and return where they end; frees the encoder.

    The second encoder also fills the pooled states.
    """
    tokenizer, encoder = load_text_encoder(model, part, device=device)
    _require_short(tokenizer, prompts)
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
    """Raise ValueError for a prompt that would be truncated: the images would silently miss it."""
    for prompt, tokens in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(tokens) > TOKENS:
            raise ValueError(
                f"prompt {prompt!r}: expected at most {TOKENS} tokens, the model's limit, got "
                f"{len(tokens)}: give a shorter one"
            )


def _draw_text(text: TextEmbeddings, prompts: Sequence[str], device: str) -> None:
    for row, prompt in enumerate(prompts):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8])
        sample = torch.zeros(1, dtype=torch.int64, device=device)
        for draw, kept in enumerate((text.text_KLD, text.pooled_KD)):
            kept[row] = normal(seed, Draw.PRIOR, sample, draw, tuple(kept.shape[1:]))[0].cpu()
