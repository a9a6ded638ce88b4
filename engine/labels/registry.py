"""Every label codec, by name, and the parts that it puts into labels.safetensors. Torch-free.

    dense   logits         fp16  [E, N, K]
    topk    probabilities  fp16  [E, N, k]
            classes        int16 [E, N, k]
    pca     basis          fp32  [1 + k, K]
            codes          int8  [E, N, k]

A manifest may also say `none`: nothing is stored, and the teacher answers online.

Legend: E epochs, N samples, K classes, k kept probabilities or components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..errors import CoresetError
from .codec import Codec
from .dense import Dense
from .pca import Pca
from .topk import TopK

CodecName = Literal["dense", "topk", "pca"]
DEFAULT_CODEC: CodecName = "dense"
CODECS = {kind.name: kind for kind in (Dense, TopK, Pca)}


def kept_by_option(codec: Codec | None) -> dict[str, int | None]:
    """k of a codec by the option that gives it; None for every other codec's option."""
    return {
        kind.option: codec.k if codec and codec.option == kind.option else None
        for kind in CODECS.values()
        if kind.option
    }


def described_codec(described: Mapping[str, Any]) -> Codec:
    """The codec of labels that a manifest describes; CoresetError for an unknown one."""
    name = described["codec"]
    if name not in CODECS:
        known = ", ".join(CODECS)
        raise CoresetError(f"label codec: expected {known} or none, got {name!r}")
    return CODECS[name](described["k"]) if "k" in described else CODECS[name]()
