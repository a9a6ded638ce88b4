"""Guards stored numbers: a sealed file may hold any, and students learn from none that is wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.manifest import LABELS
from patchbloom.engine.errors import CoresetError
from test_fuzz_files import IDS, new_coreset, seal_again

EVERY = np.arange(len(IDS))


@pytest.mark.parametrize(
    ("codec", "part", "word"),
    [
        ("dense", "logits", 0x7E00),  # NaN
        ("dense", "logits", 0x7C00),  # infinity
        ("topk", "classes", 32767),  # a kernel would read the logit there
        ("topk", "classes", -1),
        ("topk", "classes", len(IDS)),
        ("pca", "codes", 0x8080),  # -128, twice
    ],
)
def test_a_stored_number_that_no_answer_has_is_refused(
    tmp_path: Path, codec: str, part: str, word: int
) -> None:
    manifest = new_coreset(tmp_path, codec).manifest
    path = tmp_path / LABELS
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + struct.pack("<H", word % 2**16))
    seal_again(tmp_path, manifest, LABELS)
    labels = open_coreset(tmp_path).soft_labels()
    assert labels is not None
    labels.targets(0, EVERY)
    for read in (lambda: labels.targets(1, EVERY), lambda: labels.answers(EVERY * 0 + 1, EVERY)):
        with pytest.raises(CoresetError, match=rf"{LABELS}: expected {part} in "):
            read()


@pytest.mark.parametrize(
    ("codec", "part", "at", "word"),
    [("topk", "probabilities", 0, 0x3C01), ("pca", "basis", 2, 0x7FC0)],  # 1.001; NaN
)
def test_a_probability_and_a_basis_are_checked_too(
    tmp_path: Path, codec: str, part: str, at: int, word: int
) -> None:
    manifest = new_coreset(tmp_path, codec).manifest
    path = tmp_path / LABELS
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8 + int.from_bytes(data[:8], "little") + at, word)
    path.write_bytes(data)
    seal_again(tmp_path, manifest, LABELS)
    with pytest.raises(CoresetError, match=rf"{LABELS}: expected {part} in "):
        open_coreset(tmp_path).soft_labels().targets(0, EVERY)  # pyright: ignore[reportOptionalMemberAccess]
