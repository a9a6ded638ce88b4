"""Images per engine call that fill a card, by its data sheet; no two batches were compared on one.

    fills   the fewest images for which the UNet's deepest products, images · tokens rows of C
            columns in tiles of 128 × 256, give FILLED of the multiprocessors a tile; at least 32
    fits    as many as ENGINE_SHARE of the memory holds beside the weights and the VAE's layers
            (needs.py), each with its own prompt; teacher, students and their pools have the rest

The smaller of both, in steps of STEP, is the most images per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...export.trt_library import plain_name
from .needs import Needs

TILE_ROWS, TILE_COLUMNS = 128, 256
FILLED, ENGINE_SHARE, STEP, LEAST = 0.9, 0.75, 16, 32


class Card(NamedTuple):
    """A card's data sheet."""

    multiprocessors: int
    memory_gb: float


CARDS = {
    "t4": Card(40, 16),
    "rtx2070": Card(36, 8),
    "rtx2080": Card(46, 8),
    "rtx2080ti": Card(68, 11),
    "rtx8000": Card(72, 48),
    "a100": Card(108, 80),
    "a30": Card(56, 24),
    "a6000": Card(84, 48),
    "a5000": Card(64, 24),
    "a4000": Card(48, 16),
    "a40": Card(84, 48),
    "a10": Card(72, 24),
    "a10g": Card(80, 24),
    "rtx3070": Card(46, 8),
    "rtx3080": Card(68, 10),
    "rtx3090": Card(82, 24),
    "l40s": Card(142, 48),
    "l40": Card(142, 48),
    "l4": Card(58, 24),
    "rtx4070": Card(46, 12),
    "rtx4080": Card(76, 16),
    "rtx4090": Card(128, 24),
    "rtx6000-ada": Card(142, 48),
    "rtx5070": Card(48, 12),
    "rtx5080": Card(84, 16),
    "rtx5090": Card(170, 32),
    "rtx-pro-6000": Card(188, 96),
    "gb10": Card(48, 128),
    "dgx-spark": Card(48, 128),
}
"""The cards of export.trt_library.TARGETS, for engines that are built elsewhere."""


def card_here() -> Card:
    """The current GPU."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(found.multi_processor_count, found.total_memory / 1e9)


def named_card(name: str) -> Card:
    """The card of a name that export.trt_library takes.

    Raises ValueError for a compute capability, which several cards have.
    """
    card = CARDS.get(plain_name(name))
    if card is None:
        raise ValueError(
            f"--build-only {name}: the images per call follow from the card's memory and "
            "multiprocessors: name the card, or give --engine-batch"
        )
    return card


def most_per_call(needs: Needs, card: Card) -> int:
    """Images per call that fill the card and fit, for a model with these needs at any batch."""
    tile_rows = -int(-FILLED * card.multiprocessors // -(-needs.deep_columns // TILE_COLUMNS))
    fills = max((tile_rows - 1) * TILE_ROWS // needs.deep_tokens + 1, LEAST)
    room_bytes = ENGINE_SHARE * card.memory_gb * 1e9 - needs.memory_bytes
    fits = int(room_bytes // needs.image_bytes) // STEP * STEP
    return max(min(-(-fills // STEP) * STEP, fits), STEP)
