"""Soft labels on the disk: one file of fixed parts, written epoch by epoch and memory-mapped.

    dense   logits         fp16  [E, N, K]
    topk    probabilities  fp16  [E, N, k]
            classes        int16 [E, N, k]

`labels.safetensors` is safetensors' header and then the parts; a recording, which a teacher fills
answer by answer, is the parts alone. At 1000 classes and ipc 50 dense labels are 112 GiB: nothing
here holds more of a file in memory than the rows of one epoch that it is given or asked for.

Legend: E epochs, N samples, K classes, k kept probabilities, B rows.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .manifest import CoresetError

KeptCodec = Literal["dense", "topk"]
_MOST_CLASSES = 32256  # int16 class indices; the next is what an unwritten one looks like
_DTYPES = {"F16": np.float16, "I16": np.int16}
_FILL_BYTES = 2**21
_BLOCK_PAGES = 32  # 128 KiB, what the kernel reads ahead at one call at the least


@dataclass(frozen=True)
class Part:
    """One tensor of a label file; all have two bytes per number."""

    name: str
    kind: str
    """As safetensors names it: F16 or I16."""
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        """Its size."""
        return 2 * self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True, kw_only=True)
class LabelLayout:
    """What a label file holds; CoresetError for labels that no such file can hold."""

    codec: KeptCodec
    epochs: int
    samples: int
    classes: int
    k: int = 10
    """Probabilities kept per row by topk; refused when 2k >= K, where dense is as small."""

    def __post_init__(self) -> None:
        if self.codec == "topk" and not (self.k >= 1 and 2 * self.k < self.classes):
            raise CoresetError(
                f"codec topk: expected 1 <= k and 2k < {self.classes} classes, got k={self.k}: "
                "use a smaller k, or dense, which is as small here"
            )
        if self.classes > _MOST_CLASSES:
            raise CoresetError(f"expected at most {_MOST_CLASSES} classes, got {self.classes}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the file, which is that of safetensors' own writer."""
        if self.codec == "dense":
            return (Part("logits", "F16", (self.epochs, self.samples, self.classes)),)
        shape = (self.epochs, self.samples, self.k)
        return Part("probabilities", "F16", shape), Part("classes", "I16", shape)

    @property
    def bytes(self) -> int:
        """Of all parts: E·N·K·2 dense, E·N·k·4 top-k."""
        return sum(part.bytes for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """The manifest's words for it."""
        sizes = {"epochs": self.epochs, "samples": self.samples, "classes": self.classes}
        kept = {"k": self.k} if self.codec == "topk" else {}
        return {"codec": self.codec, **sizes, **kept}

    def header(self) -> bytes:
        """What stands before the parts in a safetensors file."""
        entries, begin = {}, 0
        for part in self.parts:
            offsets = [begin, begin + part.bytes]
            entries[part.name] = {"dtype": part.kind, "shape": part.shape, "data_offsets": offsets}
            begin += part.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def write_label_file(
    path: Path, layout: LabelLayout, epoch_parts: Callable[[int], Sequence[np.ndarray]]
) -> None:
    """Write `labels.safetensors`, one epoch's parts ([N, K], or twice [N, k]) after the other.

    Byte for byte what safetensors' `save_file` makes of the whole tensors; on the disk when this
    returns. OSError on a full disk.
    """
    begin = len(layout.header())
    with path.open("wb") as stream:
        stream.write(layout.header())
        for epoch in range(layout.epochs):
            first = begin
            for part, rows in zip(layout.parts, epoch_parts(epoch), strict=True):
                stream.seek(first + epoch * (part.bytes // layout.epochs))
                stream.write(np.ascontiguousarray(rows).data)
                first += part.bytes
        stream.flush()
        os.fsync(stream.fileno())


def fill_with_nan(path: Path, layout: LabelLayout) -> None:
    """Make `path` a recording without one answer, durably.

    Every number is fp16's NaN, in a part of classes 32256: no answer holds either.
    """
    block = np.full(_FILL_BYTES // 2, np.nan, np.float16).tobytes()
    with path.open("wb") as stream:
        for first in range(0, layout.bytes, len(block)):
            stream.write(block[: layout.bytes - first])
        stream.flush()
        os.fsync(stream.fileno())


class MappedParts:
    """The parts of a label file or a recording, memory-mapped: `arrays` in the file's order.

    CoresetError, when it is opened, for a file that is not of this layout or was cut short. Of a
    recording (`recording=True`) the arrays can be written to; what is written survives the process,
    and the machine after `flush`.
    """

    def __init__(self, path: Path, layout: LabelLayout, *, recording: bool = False) -> None:
        self.path, self.layout = path, layout
        begin = 0 if recording else _checked_header(path, layout)
        _check_size(path, begin + layout.bytes)
        access = mmap.ACCESS_WRITE if recording else mmap.ACCESS_READ
        with path.open("r+b" if recording else "rb") as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=access)
        self.arrays: list[np.ndarray] = []
        self._begins: list[int] = []
        for part in layout.parts:
            numbers = part.bytes // 2
            flat = np.frombuffer(self._mapped, _DTYPES[part.kind], numbers, begin)
            self.arrays.append(flat.reshape(part.shape))
            self._begins.append(begin)
            begin += part.bytes

    def read_ahead(self, epoch: int, rows_B: np.ndarray) -> None:
        """Ask the kernel for rows that are wanted soon, and return at once.

        madvise(WILLNEED) on the pages of these rows: the kernel reads them into its page cache
        while a pool is rendered. A reading thread would do the same with a buffer and an end of its
        own to look after. A call covers at most 128 KiB, of which the kernel may read no more.
        1024 rows of 1000 classes, scattered, cold: 70 to 160 ms unasked, 2 to 8 ms asked for.
        """
        for begin, part in zip(self._begins, self.layout.parts, strict=True):
            row_bytes = 2 * part.shape[2]
            first_B = begin + (epoch * part.shape[1] + rows_B.astype(np.int64)) * row_bytes
            last_B = first_B + row_bytes - 1
            pages = np.unique(np.concatenate([first_B, last_B]) // mmap.PAGESIZE)
            cuts = np.flatnonzero(np.diff(pages // _BLOCK_PAGES)) + 1
            for block in np.split(pages, cuts):
                length = int(block[-1] - block[0] + 1) * mmap.PAGESIZE
                self._mapped.madvise(mmap.MADV_WILLNEED, int(block[0]) * mmap.PAGESIZE, length)

    def flush(self) -> None:
        """Bring to the disk what was written."""
        self._mapped.flush()


def _checked_header(path: Path, layout: LabelLayout) -> int:
    """Where the parts begin."""
    expected = layout.header()
    with path.open("rb") as stream:
        if stream.read(len(expected)) != expected:
            raise CoresetError(
                f"{path}: expected {layout.codec} labels of {layout.epochs} epochs, "
                f"{layout.samples} samples and {layout.classes} classes, found another header: "
                f"{_AGAIN}"
            )
    return len(expected)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        state = "it was cut short" if found < expected else "something was added to it"
        raise CoresetError(f"{path}: expected {expected} bytes, found {found}, {state}: {_AGAIN}")


_AGAIN = "restore the file, or label the coreset again"
