"""Images → uint8 crops, by DALI: each image is read once and decoded once, and P crops are cut.

Images come upright and in RGB: greyscale, CMYK, palette and alpha are converted, EXIF rotation is
applied. Crops depend only on an image's bytes, its boxes and the decoder: not on batch size, number
of threads, order, or a damaged neighbour.

Shapes: B images, P crops of one image, H = W = ``size_px``, C = 3 (RGB). A box is (top, left,
height, width) in whole pixels of the upright image.

Neither torch nor DALI is imported before the first stream starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .images import ImageSet, InputError

if TYPE_CHECKING:
    import torch

    from .decode import CropRequest

STANDARD_RESIZE_RATIO = 8 / 7
"""Validation resizes the shorter side to size_px * 8/7 (256 for 224), then crops the centre."""

BoxFn = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""(index_B, heights_B, widths_B, epoch), int64 → boxes_BP4, integers inside the image."""


class CorruptImageError(InputError):
    """A file that DALI cannot decode; the message names it."""


@dataclass(frozen=True)
class CropBatch:
    """Crops of B images, in the requested order. The caller owns all tensors."""

    pixels_BPHWC: torch.Tensor
    """uint8, on the requested device."""
    labels_B: torch.Tensor
    """int64, CPU."""
    index_B: torch.Tensor
    """int64, CPU: position in ``ImageSet.paths``."""
    boxes_BP4: torch.Tensor
    """int64, CPU: (top, left, height, width) in pixels of the upright image."""


def center_boxes(resize_ratio: float, size_px: int) -> BoxFn:
    """Boxes of "resize the shorter side to size_px * resize_ratio, crop the centre of size_px".

    In source pixels that is one centred square of side short / resize_ratio (rounded to whole
    pixels), so one resampling replaces the resize and the crop. A file that is already
    size_px × size_px is used whole.
    """
    if resize_ratio < 1.0:
        raise ValueError(f"resize_ratio: expected at least 1, got {resize_ratio}")

    def boxes(_: np.ndarray, heights_B: np.ndarray, widths_B: np.ndarray, __: int) -> np.ndarray:
        short_B = np.minimum(heights_B, widths_B)
        side_B = np.maximum(np.rint(short_B / resize_ratio).astype(np.int64), 1)
        side_B = np.where((heights_B == size_px) & (widths_B == size_px), size_px, side_B)
        corners = ((heights_B - side_B) // 2, (widths_B - side_B) // 2)
        return np.stack((*corners, side_B, side_B), axis=-1)[:, None]

    return boxes


@dataclass(frozen=True)
class CropStream:
    """Passes over ``order``; each ``iter`` starts one. ``stream_crops`` creates it."""

    images: ImageSet
    order: np.ndarray
    request: CropRequest
    skip_corrupt: bool
    skipped: list[int] = field(default_factory=list)
    """Indices of the undecodable files that the pass has skipped so far."""

    def __iter__(self) -> Iterator[CropBatch]:
        import torch

        from .decode import decode_crops

        self.skipped.clear()
        crops = decode_crops(self._read, self.order, self.request, self._leave_out)
        for pixels_BPHWC, index_B, boxes_BP4 in crops:
            yield CropBatch(
                pixels_BPHWC=pixels_BPHWC,
                labels_B=torch.from_numpy(self.images.labels[index_B]),
                index_B=torch.from_numpy(index_B),
                boxes_BP4=torch.from_numpy(boxes_BP4.astype(np.int64)),
            )

    def _read(self, index: int) -> np.ndarray:
        try:
            return self.images.read(index)
        except MemoryError:
            raise self._full_memory(index) from None

    def _full_memory(self, index: int) -> InputError:
        return InputError(
            f"memory is full, so {self.images.place(index)} cannot be decoded: "
            "close what else uses memory, or give a smaller image"
        )

    def _leave_out(self, index: int, reason: str) -> None:
        from .decode import NO_MEMORY

        if reason == NO_MEMORY:  # never skipped: the file is not damaged
            raise self._full_memory(index)
        place, what = self.images.place(index), "image"
        if self.images.store is None:
            reason, what = _fault(Path(place)) or reason, "file"
        if not self.skip_corrupt:
            raise CorruptImageError(
                f"cannot decode {place}: {reason}; replace or remove the {what}, "
                f"or leave such {what}s out with --skip-corrupt"
            )
        self.skipped.append(index)


def _fault(path: Path) -> str | None:
    """Why no decoder could read the file."""
    if not path.exists():
        return "it is a link to nothing"
    if not path.is_file():
        return "it is not a regular file"
    return None if path.stat().st_size else "the file is empty"


def stream_crops(
    images: ImageSet,
    order: np.ndarray,
    boxes: BoxFn,
    *,
    crops: int,
    size_px: int,
    batch: int = 64,
    device: str = "cpu",
    threads: int | None = None,
    skip_corrupt: bool = False,
    epoch: int = 0,
) -> CropStream:
    """Decode the images ``order`` (int64 indices) and cut ``crops`` boxes of each.

    Crops are resized to size_px × size_px by antialiased bilinear interpolation. ``device`` is
    "cpu" or "cuda[:n]", which decodes and resizes there; its pixels differ slightly from the CPU's.
    ``threads`` defaults to the cores that this process may use.

    While streaming, an undecodable file raises CorruptImageError, or with ``skip_corrupt`` is
    skipped and appended to ``skipped``. One that memory cannot hold raises InputError.
    """
    from .decode import CropRequest

    request = CropRequest(
        boxes=lambda index_B, heights_B, widths_B: boxes(index_B, heights_B, widths_B, epoch),
        crops=crops,
        size_px=size_px,
        batch=batch,
        device=device,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    return CropStream(images, np.asarray(order, dtype=np.int64), request, skip_corrupt)


def stream_center(
    images: ImageSet,
    order: np.ndarray | None = None,
    *,
    size_px: int,
    batch: int = 64,
    device: str = "cpu",
    threads: int | None = None,
    skip_corrupt: bool = False,
) -> CropStream:
    """The validation crop of the images ``order``. Default: of all. See ``center_boxes``; P = 1."""
    return stream_crops(
        images,
        np.arange(len(images)) if order is None else order,
        center_boxes(STANDARD_RESIZE_RATIO, size_px),
        crops=1,
        size_px=size_px,
        batch=batch,
        device=device,
        threads=threads,
        skip_corrupt=skip_corrupt,
    )


def to_unit(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] → contiguous fp32 [N, 3, H, W] in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_pixels(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Images, clamped to [-1, 1] → uint8 [N, H, W, 3] on the same device."""
    pixels_NCHW = (images_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return pixels_NCHW.round().byte().permute(0, 2, 3, 1)
