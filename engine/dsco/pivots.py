"""Random features of a class's latents, and pivots of their distribution, to compare latents.

    x       a latent noised to the level that a denoising step leads to, as the network's input
    phi(x)  4 → 256, then 512, 1024, 2048 channels: convolutions with random weights, each
            followed by LeakyReLU, and the mean over the remaining positions
    pivots  per feature: the means of n equal parts of the sorted values of all images

The first convolution is 3×3; the others are grouped and 4×4 with stride 2. Small latents cannot be
halved three times: where fewer than 2×2 positions would remain, a convolution is 3×3 with stride 1
instead. The weights have torch's default distribution for a convolution, uniform up to
1 / sqrt(fan-in), drawn with Draw.FEATURES by (seed, class, layer).

Source: DsCo, arXiv 2603.27987, which states neither the first kernel's size nor the groups.

Legend: B images, F features, R rows kept, n parts, C h w of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, leaky_relu

from ...kernels.noise import Draw, uniform

WIDTHS = (256, 512, 1024, 2048)
FEATURES = WIDTHS[-1]
COLUMNS = 256  # features sorted at a time; the rest of the memory holds the result


class LatentFeatures:
    """A random network of one class: latents → features. Its weights get no gradient."""

    def __init__(
        self,
        latent_CHW: tuple[int, ...],
        *,
        seed: int,
        class_index: int,
        groups: int,
        device: torch.device,
    ) -> None:
        channels, side = latent_CHW[0], min(latent_CHW[1:])
        self._layers: list[Callable[[Tensor], Tensor]] = []
        for number, width in enumerate(WIDTHS):
            halves = number > 0 and side >= 4
            kernel, grouped = (4 if halves else 3), (groups if number else 1)
            shape = (width, channels // grouped, kernel, kernel)
            weight, bias = _weights(shape, seed, class_index, number, device)
            options = {"stride": 2 if halves else 1, "padding": 1, "groups": grouped}
            self._layers.append(partial(conv2d, weight=weight, bias=bias, **options))
            channels, side = width, side // 2 if halves else side

    def __call__(self, latents_BCHW: Tensor) -> Tensor:
        """fp32 [B, F]; differentiable in the latents, fp32 [B, C, h, w]."""
        x = latents_BCHW
        for layer in self._layers:
            x = leaky_relu(layer(x))
        return x.mean((2, 3))


def _weights(
    shape: tuple[int, ...], seed: int, class_index: int, layer: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution."""
    classes_1 = torch.tensor([class_index], device=device, dtype=torch.int64)
    u = uniform(seed, Draw.FEATURES, classes_1, layer, math.prod(shape) + shape[0])[0]
    values = (2 * u - 1) / math.sqrt(math.prod(shape[1:]))
    return values[: -shape[0]].view(shape), values[-shape[0] :].contiguous()


def bin_means(values_RF: Tensor, bins: int, weights_RF: Tensor | None = None) -> Tensor:
    """Per column, the means of `bins` equal-weight parts of the sorted values: fp32 [bins, F].

    A value at a border is split, so any number of bins fits any number of rows. Without
    `weights_RF` every row counts 1. Computed in float64.
    """
    parts = []
    for first in range(0, values_RF.shape[1], COLUMNS):
        values_FR, order_FR = values_RF[:, first : first + COLUMNS].double().T.sort(stable=True)
        mass_FR = torch.ones_like(values_FR)
        if weights_RF is not None:
            mass_FR = weights_RF[:, first : first + COLUMNS].double().T.gather(1, order_FR)
        parts.append(_means_of_parts(values_FR, mass_FR, bins).T)
    return torch.cat(parts, dim=1).float()


def _means_of_parts(values_FR: Tensor, mass_FR: Tensor, bins: int) -> Tensor:
    """For ascending values, the integral of the quantile function over each part, per mass."""
    ends_FR = mass_FR.cumsum(1)
    sums_FR = (values_FR * mass_FR).cumsum(1)
    share = torch.arange(bins + 1, device=values_FR.device, dtype=torch.float64) / bins
    borders_FE = (share * ends_FR[:, -1:]).contiguous()
    at_FE = torch.searchsorted(ends_FR, borders_FE).clamp_(max=values_FR.shape[1] - 1)
    # The sum up to the end of the value that holds the border, minus the share beyond the border.
    beyond_FE = (ends_FR.gather(1, at_FE) - borders_FE) * values_FR.gather(1, at_FE)
    upto_FE = sums_FR.gather(1, at_FE) - beyond_FE
    return upto_FE.diff(dim=1) / borders_FE.diff(dim=1)


class Pivots:
    """Bin means of a stream of feature rows, in the memory of 2·R rows for any length.

    When the buffer's R rows are full, they join R earlier values per feature, of equal weight, and
    are reduced to R bin means. Up to 2·R rows in all, the result is exact. Beyond, with M rows, the
    mean of each feature is still exact, and the values that a pivot averages have ranks that are
    off by at most (M + R) / (2·R²) of all: a reduction moves none by more than one of R bins.
    """

    def __init__(self, rows: int, columns: int = FEATURES, device: str | torch.device = "cpu"):
        self._buffer_RF = torch.empty(rows, columns, device=device, dtype=torch.float32)
        self._filled = 0
        self._earlier_RF = self._buffer_RF[:0]
        self._count = 0
        """Rows that the earlier values represent."""

    def add(self, rows_BF: Tensor) -> None:
        """Add feature rows, fp32 [B, F]."""
        rows = len(self._buffer_RF)
        while len(rows_BF):
            if self._filled == rows:
                self._earlier_RF = self.means(rows)
                self._count, self._filled = self._count + rows, 0
            taken = rows_BF[: rows - self._filled]
            self._buffer_RF[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows_BF = rows_BF[len(taken) :]

    def means(self, bins: int) -> Tensor:
        """The pivots of all rows so far, ascending: fp32 [bins, F]. Raises ValueError if none."""
        if not self._filled:
            raise ValueError("pivots: expected features of one image or more, got none")
        new_RF = self._buffer_RF[: self._filled]
        if not self._count:
            return bin_means(new_RF, bins)
        values_RF = torch.cat([self._earlier_RF, new_RF])
        weights_RF = torch.ones_like(values_RF)
        weights_RF[: len(self._earlier_RF)] = self._count / len(self._earlier_RF)
        return bin_means(values_RF, bins, weights_RF)
