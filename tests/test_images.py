"""Image sets and their decoder: listing, refusals, and correct pixels."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from patchbloom.engine.data import decode
from patchbloom.engine.data.crops import (
    CorruptImageError,
    CropBatch,
    CropStream,
    center_boxes,
    stream_center,
    stream_crops,
)
from patchbloom.engine.data.images import (
    ImageSet,
    InputError,
    check_same_classes,
    open_image_set,
    with_classes,
)
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import center_crop, resize

RNG = np.random.default_rng(7)


def picture(height: int, width: int) -> Image.Image:
    """Random colour blocks: edges for resampling, and little loss in JPEG."""
    blocks = RNG.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return Image.fromarray(pixels[:height, :width])


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def write_set(folder: Path, files: dict[str, bytes]) -> ImageSet:
    """Write {"class/name": content} as an ImageFolder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return open_image_set(folder, "train")


def some_boxes(index_B: np.ndarray, heights_B, widths_B, epoch: int) -> np.ndarray:
    """Three boxes: the whole image, its lower right quarter, a thin strip that moves."""
    one, zero = np.ones_like(heights_B), np.zeros_like(heights_B)
    whole = (zero, zero, heights_B, widths_B)
    quarter = (heights_B // 2, widths_B // 2, (heights_B + 1) // 2, (widths_B + 1) // 2)
    strip = ((index_B + epoch) % heights_B, zero, one, widths_B)
    return np.stack([np.stack(box, axis=-1) for box in (whole, quarter, strip)], axis=1)


def by_index(stream: CropStream) -> dict[int, CropBatch]:
    """Each image's row of its batch, by index."""
    rows = {}
    for batch in stream:
        for b, index in enumerate(batch.index_B.tolist()):
            rows[index] = CropBatch(
                batch.pixels_BPHWC[b], batch.labels_B[b], batch.index_B[b], batch.boxes_BP4[b]
            )
    return rows


def pillow_crops(path: Path, boxes_P4: torch.Tensor, size_px: int) -> np.ndarray:
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    crops = [
        upright.crop((left, top, left + width, top + height)).resize(
            (size_px, size_px), Image.Resampling.BILINEAR
        )
        for top, left, height, width in boxes_P4.tolist()
    ]
    return np.stack([np.asarray(crop) for crop in crops])


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """One file of every kind found in real sets, in two classes."""
    colour, wide = picture(48, 48), picture(40, 72)
    files = {
        "a/grey.jpg": encoded(colour.convert("L")),
        "a/cmyk.jpg": encoded(wide.convert("CMYK")),
        "a/progressive.JPEG": encoded(wide, progressive=True, quality=90),
        "a/subsampled.jpg": encoded(wide, subsampling="4:2:0"),
        "a/large.jpeg": encoded(picture(500, 333)),
        "b/alpha.png": encoded(wide.convert("RGBA"), "PNG"),
        "b/bits.png": encoded(colour.convert("1"), "PNG"),
        "b/palette.png": encoded(wide.convert("P"), "PNG"),
        "b/pixel.jpg": encoded(colour.resize((1, 1))),
        "b/strip.png": encoded(picture(3, 90), "PNG"),
        "b/bitmap.bmp": encoded(wide, "BMP"),
        "b/web.webp": encoded(wide, "WEBP", lossless=True),
        "b/deep/down/tiff.tif": encoded(wide, "TIFF"),
    }
    for orientation in range(2, 9):
        exif = rotated_exif(orientation)
        files[f"a/exif{orientation}.jpg"] = encoded(wide, exif=exif)
    return write_set(tmp_path_factory.mktemp("odd"), files)


@pytest.fixture(scope="module")
def even_set(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """41 JPEGs of many sizes in three classes."""
    files = {
        f"{'abc'[n % 3]}/{n:03}.jpg": encoded(picture(20 + 3 * (n % 7), 30 + 5 * (n % 5)))
        for n in range(41)
    }
    return write_set(tmp_path_factory.mktemp("even"), files)


# Listing


def test_files_are_listed_by_class_then_name(tmp_path: Path):
    jpeg = encoded(picture(8, 8))
    names = ["b/2.JPG", "b/10.jpg", "a/z/1.png", "a/a.jpeg"]
    hidden = ["b/.thumb.jpg", "b/notes.txt", ".git/x.jpg", "readme.md"]
    images = write_set(tmp_path, dict.fromkeys(names + hidden, jpeg))
    assert images.class_ids == ("a", "b")
    assert images.paths == ("a/a.jpeg", "a/z/1.png", "b/10.jpg", "b/2.JPG")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.labels.dtype == np.int64
    assert len(images) == 4
    assert images.passed_over == ("b/notes.txt", "readme.md")


def test_every_suffix_of_jpeg_is_taken(tmp_path: Path):
    names = [f"a/1{suffix}" for suffix in (".JFIF", ".jpe", ".jpeg", ".jpg")]
    images = write_set(tmp_path, dict.fromkeys(names, encoded(picture(8, 8))))
    assert sorted(images.paths) == sorted(names)
    assert len(by_index(stream_center(images, size_px=8))) == 4


@pytest.mark.parametrize("val_name", ["val", "test"])
def test_splits_are_found(tmp_path: Path, val_name: str):
    jpeg = encoded(picture(8, 8))
    write_set(tmp_path, {"train/cat/1.jpg": jpeg, f"{val_name}/cat/2.jpg": jpeg})
    train, val = open_image_set(tmp_path, "train"), open_image_set(tmp_path, "val")
    assert (train.root, train.paths) == (tmp_path / "train", ("cat/1.jpg",))
    assert (val.root, val.paths) == (tmp_path / val_name, ("cat/2.jpg",))


def test_missing_things_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*found nothing; give an existing folder"):
        open_image_set(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="found a file"):
        open_image_set(tmp_path / "file", "train")
    with pytest.raises(InputError, match=r"no class folders; expected .*<class>/<image>"):
        open_image_set(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no images in it; expected files ending in .*\.jpg"):
        open_image_set(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no val/ or test/ folder"):
        open_image_set(tmp_path, "val")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "1.jpg").write_bytes(encoded(picture(8, 8)))
    with pytest.raises(InputError, match="no images in class folder cat; add images"):
        open_image_set(tmp_path, "train")


def test_links_to_images_and_folders_are_followed(tmp_path: Path):
    jpeg = encoded(picture(8, 8))
    write_set(tmp_path / "kept", {"x/1.jpg": jpeg})
    write_set(tmp_path / "set", {"a/1.jpg": jpeg})
    (tmp_path / "set" / "a" / "2.jpg").symlink_to(tmp_path / "kept" / "x" / "1.jpg")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "kept" / "x")
    images = open_image_set(tmp_path / "set", "train")
    assert images.paths == ("a/1.jpg", "a/2.jpg", "b/1.jpg")
    assert len(by_index(stream_center(images, size_px=8))) == 3


@pytest.mark.parametrize(
    ("link", "target", "found"),
    [("a", "..", "a"), ("a/up", "..", "a/up"), ("a/b/top", "../../a", "a/b/top")],
)
def test_a_loop_of_links_is_named_shortly(tmp_path: Path, link: str, target: str, found: str):
    (tmp_path / "train" / link).parent.mkdir(parents=True)
    (tmp_path / "train" / link).symlink_to(target if "/" in link else ".")
    with pytest.raises(InputError) as caught:
        open_image_set(tmp_path, "train")
    link_to = f"{tmp_path / 'train' / found} is a link to a folder that holds it"
    assert str(caught.value) == f"{link_to}: remove the link"


def test_two_folders_with_links_to_each_other(tmp_path: Path):
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        (tmp_path / one / other).symlink_to(tmp_path / other)
    with pytest.raises(InputError, match=r"/a/b/a is a link to a folder that holds it"):
        open_image_set(tmp_path, "train")


def test_different_classes_are_named(tmp_path: Path):
    jpeg = encoded(picture(8, 8))
    files = {f"train/{c}/1.jpg": jpeg for c in "abcdefgh"}
    write_set(tmp_path, files | {"val/a/1.jpg": jpeg, "val/x/1.jpg": jpeg})
    train, val = open_image_set(tmp_path, "train"), open_image_set(tmp_path, "val")
    expected = "only in .*train: b, c, d, e, f and 2 more; only in .*val: x; both splits need"
    with pytest.raises(InputError, match=expected):
        check_same_classes(train, val)
    check_same_classes(train, train)


def test_classes_are_matched_after_normalisation(tmp_path: Path):
    jpeg = encoded(picture(8, 8))
    one, two, last = "caf\u00e9", "cafe\u0301", "cafz"  # one sorts after the last, two before it
    files = {f"train/{one}/1.jpg": jpeg, f"train/{last}/2.jpg": jpeg}
    write_set(tmp_path, files | {f"val/{two}/3.jpg": jpeg, f"val/{last}/4.jpg": jpeg})
    train, found = open_image_set(tmp_path, "train"), open_image_set(tmp_path, "val")
    with pytest.raises(InputError, match=r"only in .*train: 'caf\\xe9'; only in .*'cafe\\u0301'"):
        check_same_classes(train, found)
    val = with_classes(found, train.class_ids)
    check_same_classes(train, val)
    assert val.paths == (f"{last}/4.jpg", f"{two}/3.jpg")
    assert val.labels.tolist() == [0, 1]
    assert with_classes(found, (last,)) is found
    assert with_classes(val, train.class_ids) is val


def test_a_class_folder_that_is_not_utf_8_is_shown_escaped(tmp_path: Path):
    write_set(tmp_path, {"a/1.jpg": encoded(picture(8, 8))})
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"folders in UTF-8.*got 'caf\\udce9': rename it"):
        open_image_set(tmp_path, "train")


# Pixels


def test_every_kind_of_file_is_decoded_as_pillow_does(odd_set: ImageSet):
    """Decoded bits equal Pillow's; resampling differs by rounding only."""
    stream = stream_crops(odd_set, np.arange(len(odd_set)), some_boxes, crops=3, size_px=24)
    rows = by_index(stream)
    assert sorted(rows) == list(range(len(odd_set)))
    for index, row in rows.items():
        expected = pillow_crops(odd_set.root / odd_set.paths[index], row.boxes_BP4, 24)
        difference = np.abs(row.pixels_BPHWC.numpy().astype(int) - expected)
        assert difference.max() <= 1, odd_set.paths[index]
        assert row.labels_B == odd_set.labels[index]


def test_boxes_are_asked_for_the_upright_size(odd_set: ImageSet):
    seen = {}

    def boxes(index_B, heights_B, widths_B, epoch):
        seen.update(zip(index_B.tolist(), zip(heights_B, widths_B, strict=True), strict=True))
        assert epoch == 3
        return some_boxes(index_B, heights_B, widths_B, epoch)

    list(stream_crops(odd_set, np.arange(len(odd_set)), boxes, crops=3, size_px=8, epoch=3))
    for index, path in enumerate(odd_set.paths):
        upright = ImageOps.exif_transpose(Image.open(odd_set.root / path))
        assert seen[index] == (upright.height, upright.width), path


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (7, 2), (41, 3), (64, 1)])
def test_pixels_depend_on_neither_batch_threads_nor_order(
    even_set: ImageSet, batch: int, threads: int
):
    forward = np.arange(len(even_set))
    reference = by_index(stream_crops(even_set, forward, some_boxes, crops=3, size_px=16))
    order = np.concatenate([forward[::-1], forward[5:9]])  # and some images twice
    options = {"crops": 3, "size_px": 16, "batch": batch, "threads": threads}
    seen = []
    for result in stream_crops(even_set, order, some_boxes, **options):
        assert result.pixels_BPHWC.dtype == torch.uint8
        assert result.pixels_BPHWC.shape[1:] == (3, 16, 16, 3)
        for b, index in enumerate(result.index_B.tolist()):
            seen.append(index)
            assert torch.equal(result.pixels_BPHWC[b], reference[index].pixels_BPHWC)
            assert torch.equal(result.boxes_BP4[b], reference[index].boxes_BP4)
    assert seen == order.tolist()


def test_the_crop_graph_of_the_gpu_agrees(even_set: ImageSet, monkeypatch: pytest.MonkeyPatch):
    """The GPU's graph, run by DALI's CPU operators, against the CPU path."""
    request = decode.CropRequest(
        boxes=lambda *sizes: some_boxes(*sizes, 0),
        crops=3,
        size_px=16,
        batch=8,
        device="cpu",
        threads=2,
    )

    def crops_of() -> torch.Tensor:
        def refuse(index: int, reason: str) -> None:
            raise AssertionError(f"{index}: {reason}")

        def read(index: int) -> np.ndarray:
            return np.fromfile(even_set.root / even_set.paths[index], np.uint8)

        order = np.arange(len(even_set))
        crops = [pixels for pixels, *_ in decode.decode_crops(read, order, request, refuse)]
        return torch.cat(crops)

    expected = crops_of()
    monkeypatch.setattr(decode, "_image_pipeline", decode._crop_pipeline)

    def as_tensor(pool, crops, batch, request) -> Callable[[], torch.Tensor]:
        pixels = torch.from_numpy(np.array(crops.as_tensor()))
        return lambda: pixels

    monkeypatch.setattr(decode, "_resize", as_tensor)
    difference = (crops_of().int() - expected.int()).abs()
    assert difference.float().mean() < 0.5
    assert difference.max() <= 16  # at edges between random colours; DALI's filter is a table


def test_cuda_is_the_current_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    devices = {name: decode._device_id(name) for name in ("cpu", "cuda", "cuda:0", "cuda:2")}
    assert devices == {"cpu": None, "cuda": 1, "cuda:0": 0, "cuda:2": 2}


@pytest.mark.parametrize("most", [1, 3 * 60 * 80, 5 * 3 * 60 * 80])
def test_a_batch_decoded_in_parts_is_the_same(
    even_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    """The same batches of the same crops, also beside a damaged file."""
    jpegs = {f"a/{n:02}.jpg": encoded(picture(60, 80), quality=95) for n in range(9)}
    jpegs["a/04.jpg"] = DAMAGE["cut"](jpegs["a/04.jpg"])
    for images in (even_set, write_set(tmp_path, jpegs)):
        stream = stream_center(images, size_px=16, batch=7, skip_corrupt=True)
        monkeypatch.undo()
        whole = list(stream)
        monkeypatch.setattr(decode, "MOST_BYTES", most)
        for one, other in zip(whole, stream, strict=True):
            assert torch.equal(one.pixels_BPHWC, other.pixels_BPHWC)
            assert torch.equal(one.boxes_BP4, other.boxes_BP4)
            assert torch.equal(one.index_B, other.index_B)


def test_memory_for_large_photographs_is_bounded(tmp_path: Path):
    """40 photographs of 12 megapixels: 0.9 GB above one of them, and 1.5 in one step."""
    jpeg = encoded(Image.new("RGB", (4000, 3000), (9, 200, 30)))
    write_set(tmp_path, {f"a/{n:02}.jpg": jpeg for n in range(40)})
    measure = (
        "import resource, sys, numpy as np\n"
        "from patchbloom.engine.data.images import open_image_set\n"
        "from patchbloom.engine.data.crops import center_boxes, stream_crops\n"
        "images = open_image_set(sys.argv[1], 'train')\n"
        "for count in (1, 40):\n"
        "    boxes = center_boxes(1.0, 64)\n"
        "    list(stream_crops(images, np.arange(count), boxes, crops=1, size_px=64))\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    told = subprocess.check_output([sys.executable, "-c", measure, str(tmp_path)], text=True)
    one, many = map(int, told.split()[-2:])
    assert many - one < 1200, (one, many)


@pytest.mark.gpu
def test_gpu_decoding(even_set: ImageSet):
    """Close to the CPU's pixels; equal at any batch size."""
    order = np.arange(len(even_set))
    cpu = by_index(stream_crops(even_set, order, some_boxes, crops=3, size_px=16))
    options = {"crops": 3, "size_px": 16, "device": "cuda"}
    gpu = by_index(stream_crops(even_set, order, some_boxes, batch=64, **options))
    single = by_index(stream_crops(even_set, order, some_boxes, batch=1, **options))
    for index in order:
        pixels = gpu[index].pixels_BPHWC
        assert pixels.is_cuda
        assert torch.equal(pixels, single[index].pixels_BPHWC)
        assert (pixels.cpu().int() - cpu[index].pixels_BPHWC.int()).abs().float().mean() < 3


def test_center_is_that_of_torchvision(tmp_path: Path):
    smooth = picture(80, 80).resize((10, 10), 0).resize((270, 224), Image.Resampling.BICUBIC)
    images = write_set(tmp_path, {"a/1.png": encoded(smooth, "PNG")})
    (batch,) = stream_center(images, size_px=112)
    pixels = torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1)
    expected = center_crop(resize(pixels, [128], antialias=True), [112]).permute(1, 2, 0)
    assert (batch.pixels_BPHWC[0, 0].int() - expected.int()).abs().float().mean() < 1.0


def test_center_takes_a_file_of_the_right_size_whole(tmp_path: Path):
    image = picture(32, 32)
    images = write_set(tmp_path, {"a/1.png": encoded(image, "PNG")})
    (batch,) = stream_center(images, size_px=32)
    assert batch.boxes_BP4.tolist() == [[[0, 0, 32, 32]]]
    assert np.array_equal(batch.pixels_BPHWC[0, 0].numpy(), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (2, 500), (7, 3), (224, 224), (375, 500)])
def test_center_boxes_are_inside(size: tuple[int, int]):
    height, width = np.array([size[0]]), np.array([size[1]])
    ((top, left, h, w),) = center_boxes(8 / 7, 224)(np.array([0]), height, width, 0)[0]
    assert top >= 0
    assert left >= 0
    assert h == w >= 1
    assert top + h <= size[0]
    assert left + w <= size[1]


# Damaged files


DAMAGE = {
    "cut": lambda jpeg: jpeg[: len(jpeg) // 2],
    "cut-short": lambda jpeg: jpeg[:-10],
    "text": lambda _: b"this is not an image\n" * 20,
    "empty": lambda _: b"",
    "header-only": lambda jpeg: jpeg[:30],
    "zeros": lambda _: bytes(300),
}
REASONS = {"cut": "truncated or damaged", "text": "it is not a JPEG", "empty": "the file is empty"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str):
    jpeg = encoded(picture(80, 80), quality=95)
    files = {f"a/{n}.jpg": jpeg for n in range(5)} | {"a/x.jpg": DAMAGE[kind](jpeg)}
    images = write_set(tmp_path, files)
    expected = rf"cannot decode .*a/x\.jpg: .*{REASONS.get(kind, '')}.*--skip-corrupt"
    with pytest.raises(CorruptImageError, match=expected) as caught:
        list(stream_center(images, size_px=16))
    assert "\n" not in str(caught.value)


def with_size(png: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header, which then has the right checksum."""
    header = b"IHDR" + struct.pack(">II", width % 2**32, height % 2**32) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


IRREGULAR = {
    "dangling": (lambda path: path.symlink_to("nowhere.jpg"), "it is a link to nothing"),
    "itself": (lambda path: path.symlink_to(path.name), "it is a link to nothing"),
    "pipe": (os.mkfifo, "it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_file_is_a_damaged_file(tmp_path: Path, kind: str):
    jpeg = encoded(picture(40, 40))
    write_set(tmp_path, {"a/0.jpg": jpeg, "a/2.jpg": jpeg})
    make, reason = IRREGULAR[kind]
    make(tmp_path / "a" / "1.jpg")
    images = open_image_set(tmp_path, "train")
    with pytest.raises(CorruptImageError, match=rf"cannot decode .*a/1\.jpg: {reason}; .*--skip"):
        list(stream_center(images, size_px=16))
    stream = stream_center(images, size_px=16, skip_corrupt=True)
    assert sorted(by_index(stream)) == [0, 2]
    assert stream.skipped == [1]


IMPOSSIBLE_SIZES = {
    "width-below-zero.png": lambda png, _: png[:16] + bytes([png[16] ^ 0x80]) + png[17:],
    "height-below-zero.png": lambda png, _: png[:20] + bytes([png[20] ^ 0x80]) + png[21:],
    "both-below-zero.png": lambda png, _: with_size(png, -40, -40),
    "lowest-width.bmp": lambda _, bmp: bmp[:18] + struct.pack("<i", -(2**31)) + bmp[22:],
    "400-megapixels.png": lambda png, _: with_size(png, 20_000, 20_000),
    "4e18-pixels.png": lambda png, _: with_size(png, 2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("name", IMPOSSIBLE_SIZES)
def test_an_impossible_size_is_a_damaged_file(tmp_path: Path, name: str):
    image = picture(40, 40)
    good = encoded(image, "PNG")
    bad = IMPOSSIBLE_SIZES[name](good, encoded(image, "BMP"))
    images = write_set(tmp_path, {"a/0.png": good, f"a/{name}": bad, "a/z.png": good})
    reason = "at most 268 megapixels, its header says" if name[0] == "4" else "it is not a JPEG"
    with pytest.raises(CorruptImageError, match=rf"cannot decode .*a/{name}: .*{reason}.*--skip"):
        list(stream_center(images, size_px=16))
    stream = stream_center(images, size_px=16, skip_corrupt=True)
    assert sorted(by_index(stream)) == [0, 2]
    assert stream.skipped == [1]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_damaged_files_are_skipped_and_nothing_else(tmp_path: Path, batch: int):
    jpegs = {f"a/{n:02}.jpg": encoded(picture(60, 80), quality=95) for n in range(20)}
    clean = by_index(stream_center(write_set(tmp_path / "clean", jpegs), size_px=16))
    damaged = dict(jpegs)
    for name, kind in zip(["a/00.jpg", "a/03.jpg", "a/04.jpg", "a/19.jpg"], DAMAGE, strict=False):
        damaged[name] = DAMAGE[kind](jpegs[name])
    images = write_set(tmp_path / "damaged", damaged)
    stream = stream_center(images, size_px=16, batch=batch, skip_corrupt=True)
    for _ in range(2):  # a second pass starts over
        order = list(itertools.chain(*(result.index_B.tolist() for result in stream)))
        assert order == [n for n in range(20) if n not in (0, 3, 4, 19)]
        assert sorted(stream.skipped) == [0, 3, 4, 19]
    for index, row in by_index(stream).items():
        assert torch.equal(row.pixels_BPHWC, clean[index].pixels_BPHWC)


def test_nothing_but_damaged_files(tmp_path: Path):
    images = write_set(tmp_path, {f"a/{n}.jpg": b"text" for n in range(6)})
    stream = stream_center(images, size_px=16, batch=4, skip_corrupt=True)
    assert list(stream) == []
    assert sorted(stream.skipped) == list(range(6))


def test_a_file_that_vanished_is_named(even_set: ImageSet):
    gone = ImageSet(even_set.root, "train", ("a",), ("a/gone.jpg",), np.zeros(1, np.int64))
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        list(stream_center(gone, size_px=16))


# Misuse


def test_bad_arguments_are_refused(even_set: ImageSet):
    def outside(index_B, heights_B, widths_B, epoch):
        boxes = some_boxes(index_B, heights_B, widths_B, epoch)
        boxes[0, 1, 2] += 1
        return boxes

    with pytest.raises(ValueError, match="inside the image, got"):
        list(stream_crops(even_set, np.arange(4), outside, crops=3, size_px=8))
    with pytest.raises(ValueError, match=r"expected shape \(4, 2, 4\), got \(4, 3, 4\)"):
        list(stream_crops(even_set, np.arange(4), some_boxes, crops=2, size_px=8))


def test_a_fault_that_no_file_explains_is_passed_on(even_set: ImageSet):
    def fault(*_):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(stream_crops(even_set, np.arange(4), fault, crops=1, size_px=8))


def test_a_pass_may_be_left_early(even_set: ImageSet):
    stream = stream_center(even_set, size_px=16, batch=4)
    first = next(iter(stream))
    assert first.index_B.tolist() == [0, 1, 2, 3]
    assert len(by_index(stream)) == len(even_set)


def test_memory_is_flat(even_set: ImageSet):
    """Resident memory grows by less than 16 MB between image 1,000 and image 4,000."""
    resident = []
    order = np.resize(np.arange(len(even_set)), 5000)
    stream = stream_crops(even_set, order, some_boxes, crops=3, size_px=32, batch=50, threads=1)
    for batch in itertools.islice(stream, 0, None, 20):
        del batch
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert len(resident) == 5
    assert resident[-1] - resident[1] < 16e6
