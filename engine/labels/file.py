"""Soft labels on the disk: one file of fixed parts, written epoch by epoch and memory-mapped.

The codec says which parts. `labels.safetensors` is safetensors' header and then the parts; a
recording, which a teacher fills answer by answer, is the parts alone. At 1000 classes and ipc 50
dense labels are 112 GiB: nothing here holds more of a file in memory than the rows of one epoch
that it is given or asked for.

Legend: E epochs, N samples, B rows.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CoresetError
from .codecs import MOST_CLASSES, Codec, Part, describe_codec

_DTYPES = {"F32": np.float32, "F16": np.float16, "I16": np.int16, "I8": np.int8}
_FILL_BYTES = 2**21
_BLOCK_PAGES = 32  # 128 KiB, what the kernel reads ahead at one call at the least


@dataclass(frozen=True, kw_only=True)
class LabelLayout:
    """What a label file holds; CoresetError for labels that no such file can hold."""

    codec: Codec
    epochs: int
    samples: int
    classes: int

    def __post_init__(self) -> None:
        self.codec.check(self.classes)
        if self.classes > MOST_CLASSES:
            raise CoresetError(f"expected at most {MOST_CLASSES} classes, got {self.classes}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the file, which is that of safetensors' own writer."""
        rows = (self.epochs, self.samples)
        return tuple(
            replace(part, shape=(*rows, *part.shape)) if part.of_answers else part
            for part in self.codec.parts(self.classes)
        )

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return sum(part.bytes for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """The manifest's words for it."""
        sizes = {"epochs": self.epochs, "samples": self.samples, "classes": self.classes}
        return describe_codec(self.codec) | sizes

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
    path: Path,
    layout: LabelLayout,
    epoch_parts: Callable[[int], Sequence[np.ndarray]],
    shared: np.ndarray | None = None,
) -> None:
    """Write `labels.safetensors`, the answers of one epoch after the other, each part [N, *].

    `shared` is the basis of a codec that has one. Byte for byte what safetensors' `save_file` makes
    of the whole tensors; on the disk when this returns. OSError on a full disk.
    """
    with path.open("wb") as stream:
        stream.write(layout.header())
        if shared is not None:
            stream.write(np.ascontiguousarray(shared).data)
        answers, begin = [part for part in layout.parts if part.of_answers], stream.tell()
        for epoch in range(layout.epochs):
            first = begin
            for part, rows in zip(answers, epoch_parts(epoch), strict=True):
                stream.seek(first + epoch * (part.bytes // layout.epochs))
                stream.write(np.ascontiguousarray(rows).data)
                first += part.bytes
        stream.flush()
        os.fsync(stream.fileno())


def fill_with_missing(path: Path, layout: LabelLayout) -> None:
    """Make `path` a recording without one answer, durably: every number is its part's `missing`."""
    with path.open("wb") as stream:
        for part in layout.parts:
            kind = np.dtype(_DTYPES[part.kind])
            block = np.full(_FILL_BYTES // kind.itemsize, part.missing, kind).tobytes()
            for first in range(0, part.bytes, len(block)):
                stream.write(block[: part.bytes - first])
        stream.flush()
        os.fsync(stream.fileno())


class MappedParts:
    """The parts of a label file or a recording, memory-mapped.

    `answers` has those of answers, [E, N, *], in the file's order; `basis` is that of a codec that
    has one, else None. CoresetError, when it is opened, for a file that is not of this layout or
    was cut short. Of a recording (`recording=True`) they can be written to; what is written
    survives the process, and the machine after `flush`.
    """

    def __init__(self, path: Path, layout: LabelLayout, *, recording: bool = False) -> None:
        self.path, self.layout = path, layout
        begin = 0 if recording else _checked_header(path, layout)
        _check_size(path, begin + layout.bytes)
        access = mmap.ACCESS_WRITE if recording else mmap.ACCESS_READ
        with path.open("r+b" if recording else "rb") as stream:
            self._mapped = mmap.mmap(stream.fileno(), 0, access=access)
        self.answers: list[np.ndarray] = []
        self.basis: np.ndarray | None = None
        self._placed: list[tuple[int, Part]] = []
        for part in layout.parts:
            flat = np.frombuffer(self._mapped, _DTYPES[part.kind], math.prod(part.shape), begin)
            if part.of_answers:
                self.answers.append(flat.reshape(part.shape))
                self._placed.append((begin, part))
            else:
                self.basis = flat.reshape(part.shape)
            begin += part.bytes

    def read_ahead(self, epoch: int, rows_B: np.ndarray) -> None:
        """Ask the kernel for rows that are wanted soon, and return at once.

        madvise(WILLNEED) on the pages of these rows: the kernel reads them into its page cache
        while a pool is rendered. A reading thread would do the same with a buffer and an end of its
        own to look after. A call covers at most 128 KiB, of which the kernel may read no more.
        1024 rows of 1000 classes, scattered, cold: 70 to 160 ms unasked, 2 to 8 ms asked for.
        """
        for begin, part in self._placed:
            first_B = begin + (epoch * part.shape[1] + rows_B.astype(np.int64)) * part.row_bytes
            last_B = first_B + part.row_bytes - 1
            pages = np.unique(np.concatenate([first_B, last_B]) // mmap.PAGESIZE)
            cuts = np.flatnonzero(np.diff(pages // _BLOCK_PAGES)) + 1
            for block in np.split(pages, cuts):
                length = int(block[-1] - block[0] + 1) * mmap.PAGESIZE
                self._mapped.madvise(mmap.MADV_WILLNEED, int(block[0]) * mmap.PAGESIZE, length)

    def some_missing(self, epoch: int, rows_B: np.ndarray | slice = slice(None)) -> bool:
        """Whether a recording lacks one of an epoch's answers, even if only in part.

        A killed process may have left a row half written.
        """
        return any(
            # A maximum is NaN where one number is, and needs no [B, K] of its own.
            bool((rows.amax(1).isnan() if math.isnan(missing) else rows == missing).any())
            for rows, missing in (
                (torch.from_numpy(array[epoch][rows_B]), part.missing)
                for array, (_, part) in zip(self.answers, self._placed, strict=True)
            )
        )

    def flush(self) -> None:
        """Bring to the disk what was written."""
        self._mapped.flush()


@dataclass(frozen=True, kw_only=True)
class RecordedBlock:
    """What a recording holds, on its way into a coreset as it is: memory-mapped, never copied."""

    recording: MappedParts
    temperature: float
    """That of the student's loss, and of probabilities when they were encoded."""
    settings: dict[str, Any]
    """What else decides these labels, for the manifest."""

    @property
    def layout(self) -> LabelLayout:
        """Of the recording and of the label file."""
        return self.recording.layout

    @property
    def basis(self) -> np.ndarray | None:
        """Of the recorded codes, if they have one."""
        return self.recording.basis

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """One epoch as it is stored; CoresetError when an answer is missing."""
        if self.recording.some_missing(epoch):
            raise CoresetError(
                f"{self.recording.path}: labels of epoch {epoch} are missing: train to the end"
            )
        return [array[epoch] for array in self.recording.answers]

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for these labels."""
        kept = self.layout.describe()
        return {**kept, "temperature": float(self.temperature), "settings": self.settings}


def _checked_header(path: Path, layout: LabelLayout) -> int:
    """Where the parts begin."""
    expected = layout.header()
    with path.open("rb") as stream:
        if stream.read(len(expected)) != expected:
            raise CoresetError(
                f"{path}: expected {layout.codec.name} labels of {layout.epochs} epochs, "
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
