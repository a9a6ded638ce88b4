"""Labels of every codec, images and text files with hostile content: read, or refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_cases import EXAMPLES, changed, nothing_else_opened, seeded
from hypothesis import given
from hypothesis import strategies as st
from label_cases import LabelBlock, write_labelled
from patchbloom.engine.coreset.coreset import Coreset, open_coreset
from patchbloom.engine.coreset.manifest import LABELS, MANIFEST, file_entry, seal, spelled
from patchbloom.engine.data.names import display_names, read_prompts
from patchbloom.engine.errors import CoresetError
from patchbloom.kernels.softlabel import softlabel
from patchbloom.train.data.shapes import write_shapes
from PIL import Image

IDS = tuple("abcdefgh")
PIXELS = np.random.default_rng(0).integers(0, 256, (len(IDS), 8, 8, 3), np.uint8)
KEPT = 3


def new_coreset(folder: Path, codec: str) -> Coreset:
    """A coreset with one image per class and labels of two epochs."""
    logits = 4 * torch.randn(2, len(IDS), len(IDS), generator=torch.Generator().manual_seed(1))
    return write_labelled(
        folder,
        LabelBlock(codec=codec, logits=logits, k=KEPT, temperature=4.0),
        patches_NHWC=PIXELS,
        class_ids=IDS,
        class_names=IDS,
        settings={
            **{"method": "random", "seed": 0, "image_size_px": 8},
            **{"factor": 1, "patch_px": 8, "ipc": 1},
        },
        provenance={},
    )


def seal_again(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Give the changed file the hash that the manifest expects."""
    files = {**manifest["files"], name: file_entry(folder / name)}
    whole = seal({**manifest, "files": files}, manifest["provenance"])
    (folder / MANIFEST).write_bytes(spelled(whole))


WORDS = (
    *(0x0000, 0x7FFF, 0x8000, 0xFFFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00, 0x3C01, 0x8001),
    *(len(IDS) - 1, len(IDS), 32256, 0x8080, 0x7F7F),
)


@EXAMPLES
@pytest.mark.parametrize("codec", ["dense", "topk", "pca"])
def test_labels(tmp_path: Path, codec: str, examples: int | None) -> None:
    folder = tmp_path / "coreset"
    manifest = new_coreset(folder, codec).manifest
    whole = (folder / LABELS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    at = st.one_of(st.integers(0, len(whole) - 2), st.integers(start, len(whole) - 2))
    edits = st.lists(st.tuples(at, st.sampled_from(WORDS)), min_size=1, max_size=4)

    @seeded(examples, 150)
    @given(edits, st.sampled_from([0, 0, 0, 0, -1, 1, -100]))
    def hold(edits: list[tuple[int, int]], longer: int) -> None:
        data = bytearray(whole)
        for place, word in edits:
            place -= (place - start) % 2  # whole numbers of the parts
            struct.pack_into("<H", data, max(place, 0), word)
        (folder / LABELS).write_bytes(data + bytes(longer) if longer >= 0 else data[:longer])
        seal_again(folder, manifest, LABELS)
        with nothing_else_opened(folder), suppress(CoresetError):
            learn_from(open_coreset(folder))

    hold()


def learn_from(coreset: Coreset) -> None:
    """Labels that are not refused are finite and name existing classes."""
    labels = coreset.soft_labels()
    assert labels is not None
    labels.recognised(0)
    everything = np.arange(len(IDS))
    labels.answers(everything % 2, everything)
    for epoch in range(labels.epochs):
        targets = labels.targets(epoch, everything)
        assert bool(targets.labels.isfinite().all())
        if targets.classes is not None:
            assert 0 <= int(targets.classes.min()) <= int(targets.classes.max()) < len(IDS)
        student = torch.zeros(len(IDS), len(IDS), requires_grad=True)
        loss = softlabel(student, targets.labels, targets.classes, temperature=4.0)
        assert bool(loss.isfinite().all())


@EXAMPLES
def test_images_of_coresets(tmp_path: Path, examples: int | None) -> None:
    folder = tmp_path / "coreset"
    manifest, name = new_coreset(folder, "dense").manifest, "patches/c/000000.png"
    whole = (folder / name).read_bytes()

    @seeded(examples, 200)
    @given(changed_png(whole))
    def hold(data: bytes) -> None:
        (folder / name).write_bytes(data)
        seal_again(folder, manifest, name)
        with nothing_else_opened(folder), suppress(CoresetError):
            assert open_coreset(folder).patches().shape == PIXELS.shape

    hold()


@st.composite
def changed_png(draw: st.DrawFn, whole: bytes) -> bytes:
    """Its chunks changed, with the right checksums; or another format under its name."""
    chunks, place = [], 8
    while place < len(whole):
        (length,) = struct.unpack_from(">I", whole, place)
        chunks.append((whole[place + 4 : place + 8], whole[place + 8 : place + 8 + length]))
        place += 12 + length
    kinds = [b"IHDR", b"IDAT", b"IEND", b"zTXt", b"tEXt", b"iCCP", b"PLTE", b"tRNS", b"acTL", b"\0"]
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(chunks) - 1))
        kind, data = chunks[number]
        match draw(st.sampled_from(["header", "bytes", "kind", "drop", "twice", "bomb", "other"])):
            case "header" if len(data) >= 13:
                edges = st.sampled_from([0, 1, 7, 8, 9, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
                rest = draw(st.binary(min_size=5, max_size=5)) if draw(st.booleans()) else data[8:]
                chunks[number] = (kind, struct.pack(">II", draw(edges), draw(edges)) + rest)
            case "bytes":
                chunks[number] = (kind, draw(st.binary(max_size=40)))
            case "kind":
                chunks[number] = (draw(st.sampled_from(kinds)), data)
            case "drop" if len(chunks) > 1:
                del chunks[number]
            case "twice":
                chunks.insert(number, chunks[number])
            case "bomb":
                chunks.insert(1, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**22))))
            case "other":
                stream = io.BytesIO()
                kind = draw(st.sampled_from(["BMP", "JPEG", "WEBP", "TIFF", "GIF"]))
                Image.fromarray(PIXELS[0]).save(stream, kind)
                return stream.getvalue()
    pieces = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return whole[:8] + b"".join(pieces)


TEXTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(["a", "b one", "c\ttwo", "\t", "", "ä\u2028b", "\0"])).map(
        lambda lines: "\n".join(lines).encode()
    ),
    changed({"a": "one", "b": "two", "c": "three"}).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"{" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{", b'{"a": NaN}', b'{"a": 1e999}']),
    st.sampled_from([b'{"a": ' + b"9" * 5000 + b"}", b"", b"\xef\xbb\xbf{}", b"{} {}"]),
)


def told_by(read: Callable[..., Any], path: Path) -> str | None:
    """The error that a reader of texts raises, if any."""
    arguments = ("abc", path) if read is display_names else (path, "abc")
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


@EXAMPLES
def test_names_and_prompts(tmp_path: Path, examples: int | None) -> None:
    path = tmp_path / "texts"

    @seeded(examples, 400)
    @given(TEXTS)
    def hold(data: bytes) -> None:
        path.write_bytes(data)
        for option, read in (("--class-names", display_names), ("--prompts", read_prompts)):
            with nothing_else_opened(tmp_path):
                told = told_by(read, path)
            assert told is None or (told.startswith(f"{option} {path}") and len(told) < 1000)

    hold()


@EXAMPLES
def test_cards_of_the_generated_set(tmp_path: Path, examples: int | None) -> None:
    """The set of this recipe is taken, and any other folder refused."""
    write_shapes(tmp_path / "s", train_per_class=1, val_per_class=1)
    card = tmp_path / "s" / "shapes.json"
    recipe = json.loads(card.read_bytes())
    cards = st.one_of(TEXTS, changed(recipe).map(lambda value: json.dumps(value).encode()))

    @seeded(examples, 300)
    @given(cards)
    def hold(data: bytes) -> None:
        card.write_bytes(data)
        with nothing_else_opened(tmp_path):
            try:
                write_shapes(tmp_path / "s", train_per_class=1, val_per_class=1)
            except (FileExistsError, ValueError) as refused:
                told = str(refused)
            else:
                told = str(tmp_path / "s") if json.loads(data) == recipe else "another set"
        assert told.startswith(str(tmp_path / "s"))

    hold()
