"""Soft labels on disk: one file of fixed parts, written epoch by epoch and memory-mapped.

The codec decides the parts. `labels.safetensors` is safetensors' header followed by the parts; a
recording, which a teacher fills answer by answer, is the parts alone. At 1000 classes and ipc 50
dense labels are 112 GiB: no function here holds more in memory than the requested rows of one
epoch.

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
from torch import Tensor

from ..errors import CoresetError
from .codecs import MOST_CLASSES, Codec, Part, describe_codec

_DTYPES = {"F32": np.float32, "F16": np.float16, "I16": np.int16, "I8": np.int8}
_FILL_BYTES = 2**21
_BLOCK_PAGES = 32  # 128 KiB, the least that the kernel reads ahead per call


@dataclass(frozen=True, kw_only=True)
class LabelLayout:
    """Content of a label file; CoresetError for labels that no such file can hold."""

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
        """Parts in the order of the file, which is that of safetensors' own writer."""
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
        """The layout's entries in a manifest."""
        sizes = {"epochs": self.epochs, "samples": self.samples, "classes": self.classes}
        return describe_codec(self.codec) | sizes

    def header(self) -> bytes:
        """The bytes before the parts in a safetensors file."""
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
    """Write `labels.safetensors` durably, one epoch of answers after the other, each part [N, *].

    `shared` is the basis of a codec that has one. The bytes equal those that safetensors'
    `save_file` writes for the whole tensors. OSError on a full disk.
    """
    with path.open("xb") as stream:
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
    """Make `path` an empty recording, durably: every number is its part's `missing`."""
    with path.open("xb") as stream:
        for part in layout.parts:
            kind = np.dtype(_DTYPES[part.kind])
            block = np.full(_FILL_BYTES // kind.itemsize, part.missing, kind).tobytes()
            for first in range(0, part.bytes, len(block)):
                stream.write(block[: part.bytes - first])
        stream.flush()
        os.fsync(stream.fileno())


class MappedParts:
    """The parts of a label file or a recording, memory-mapped.

    `answers` holds the parts with a row per answer, [E, N, *], in the file's order; `basis` is the
    shared part, or None. Opening raises CoresetError for a file of another layout or one that was
    cut short. The parts of a recording (`recording=True`) are writable; written answers survive a
    killed process, and after `flush` a crash of the machine.
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
                if not recording:
                    _check_bounds(path, part, torch.from_numpy(self.basis.copy()))
            begin += part.bytes

    def read_ahead(self, epoch: int, rows_B: np.ndarray) -> None:
        """Tell the kernel which rows are needed soon, and return at once.

        madvise(WILLNEED) on the pages of these rows: the kernel reads them into its page cache
        while a pool is rendered, without a reading thread and its buffer. A call covers at most
        128 KiB, because the kernel may read no more. Reading 1024 scattered rows of 1000 classes
        from a cold disk: 70 to 160 ms without read-ahead, 2 to 8 ms with it.
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
        """Whether any of an epoch's answers is missing from a recording, wholly or in part.

        A killed process may leave a row half written.
        """
        return any(
            # A maximum is NaN where one number is, and needs no [B, K] of its own.
            bool((rows.amax(1).isnan() if math.isnan(missing) else rows == missing).any())
            for rows, missing in (
                (torch.from_numpy(array[epoch][rows_B]), part.missing)
                for array, (_, part) in zip(self.answers, self._placed, strict=True)
            )
        )

    def check_values(self, rows_B: Sequence[Tensor]) -> None:
        """Raises CoresetError for rows of the answers with a number that no answer has.

        A sealed file may still hold anything, and kernels use a stored class as an address.
        """
        for rows, (_, part) in zip(rows_B, self._placed, strict=True):
            _check_bounds(self.path, part, rows)

    def flush(self) -> None:
        """Write all changes to the disk."""
        self._mapped.flush()


@dataclass(frozen=True, kw_only=True)
class RecordedBlock:
    """A finished recording as `attach_labels` takes it: memory-mapped, never copied."""

    recording: MappedParts
    temperature: float
    """Temperature of the student's loss, and of encoded probabilities."""
    settings: dict[str, Any]
    """Everything else that decides these labels, for the manifest."""

    @property
    def layout(self) -> LabelLayout:
        """Layout of the recording and of the label file."""
        return self.recording.layout

    @property
    def basis(self) -> np.ndarray | None:
        """Basis of the recorded codes, if they have one."""
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
    """Offset of the first part."""
    expected = layout.header()
    with path.open("rb") as stream:
        if stream.read(len(expected)) != expected:
            raise CoresetError(
                f"{path}: expected {layout.codec.name} labels of {layout.epochs} epochs, "
                f"{layout.samples} samples and {layout.classes} classes, found another header: "
                f"{_AGAIN}"
            )
    return len(expected)


def _check_bounds(path: Path, part: Part, values: Tensor) -> None:
    if not values.numel():
        return
    found, (least, most) = torch.aminmax(values), part.bounds
    if not (found.min.item() >= least and found.max.item() <= most):  # false for NaN as well
        raise CoresetError(
            f"{path}: expected {part.name} in {least:g}..{most:g}, found "
            f"{found.min.item():g}..{found.max.item():g}: {_AGAIN}"
        )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        state = "it was cut short" if found < expected else "something was added to it"
        raise CoresetError(f"{path}: expected {expected} bytes, found {found}, {state}: {_AGAIN}")


_AGAIN = "restore the file, or label the coreset again"
