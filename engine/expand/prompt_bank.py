"""Added embeddings, keys and values of the class prompts, for all classes or as many as fit.

They depend only on the prompt, so the rows that fit the budget are computed once and kept on the
device. SDXL-Turbo needs 25.6 MB (fp16) per prompt: 26 GB for 1000 classes, 256 GB for 10,000. If
not all fit, the text embeddings stay on the host (0.3 MB per prompt), the weights that project them
stay on the device (13 % of the UNet's; eager has them anyway), and a missing row is computed when a
call needs it.

Prompts are always projected in groups of GROUP. Products of one shape give a row the same bits in
any place and with any neighbours, so images are bit-identical with any budget.

The row evicted is the most recently used one that this call does not need. A pass over the classes
is a cycle, in which LRU would evict every prompt just before its turn; this way a cycle finds a
share C / K of the rows.

Legend: K classes, C of them kept, G prompts of a call, L tokens, D embedding width, P keys and
values of a prompt end to end.
"""

from __future__ import annotations

from collections.abc import Collection
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from ...export.machine import free_host_bytes, gpu_memory_bytes
from ...export.models import ModelParts
from ...export.modules import PromptProjector, key_value_slots
from ...export.terminal import say
from .batches import upload
from .prompts import TextEmbeddings

GROUP = 8
"""Prompts projected together. For 8, SDXL-Turbo reads 0.69 GB of weights and does 0.4 TFLOP: 1 ms
on an H100 by its data sheet (not measured), and 0.4 GB of memory meanwhile."""
BANK_SHARE = 0.4
"""Default share of free memory: an engine's build and activations need the rest."""


class PromptBank:
    """Rows of K prompts, `capacity` of them on the device. Threads and CUDA streams may share it.

    Takes over `text`, and frees it if all rows are kept.
    """

    def __init__(
        self,
        parts: ModelParts,
        text: TextEmbeddings,
        *,
        conditioning_px: int,
        capacity: int,
    ) -> None:
        prompts, self.tokens = text.text_KLD.shape[:2]
        self.capacity = min(capacity, prompts)
        self._device, dtype = parts.unet.device, parts.unet.dtype
        width = parts.unet.time_embedding.linear_2.out_features
        self._added_CD = torch.empty(self.capacity, width, dtype=dtype, device=self._device)
        self._kv_CP = torch.empty(
            self.capacity, _elements(parts, self.tokens), dtype=dtype, device=self._device
        )
        size = float(conditioning_px)
        self._time_ids_6 = torch.tensor(
            [size, size, 0, 0, size, size], device=self._device, dtype=torch.float32
        )
        self._text: TextEmbeddings | None = text
        self._projector: PromptProjector | None = PromptProjector(parts.unet)
        self._rows: dict[int, int] = {}  # class → its row, in order of last use
        self._lock = Lock()
        self._last_use: torch.cuda.Event | None = None
        if self.capacity == prompts:
            self._keep(range(prompts), ())
            self._text = self._projector = None
        self._record_use()

    @property
    def resident(self) -> bool:
        """Whether all prompts are kept, so that nothing is computed any more."""
        return self._text is None

    @property
    def weights_bytes(self) -> int:
        """Size of the weights that stay to compute rows; 0 if all rows are kept."""
        weights = () if self._projector is None else self._projector.parameters()
        return sum(weight.nbytes for weight in weights)

    @property
    def kept_bytes(self) -> int:
        """Size of the rows on the device."""
        return self._added_CD.nbytes + self._kv_CP.nbytes

    def of(self, classes_G: np.ndarray, placed_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(added_GD, kv_GP) of a call's prompts: int64 class indices, repeats allowed.

        `placed_G`: the same on the device, where the caller has them. The results are on the
        device, in the UNet's dtype, and the caller owns them. Raises ValueError for more than
        `capacity` different classes.
        """
        if self.resident:
            self._await_last_use()
            return self._copies(upload(classes_G, self._device) if placed_G is None else placed_G)
        wanted = dict.fromkeys(classes_G.tolist())
        if len(wanted) > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} different prompts in a call, got {len(wanted)}: "
                "give a larger prompt_cache_bytes"
            )
        with self._lock:
            # Another stream may still read the rows that this call overwrites, or write those that
            # it reads.
            self._await_last_use()
            self._keep([each for each in wanted if each not in self._rows], wanted)
            for each in wanted:
                self._rows[each] = self._rows.pop(each)
            rows_G = np.array([self._rows[each] for each in classes_G.tolist()], dtype=np.int64)
            found = self._copies(upload(rows_G, self._device))
            self._record_use()
        return found

    def _record_use(self) -> None:
        if self._device.type == "cuda":
            self._last_use = torch.cuda.Event()
            self._last_use.record()

    def _await_last_use(self) -> None:
        if self._last_use is not None:
            torch.cuda.current_stream().wait_event(self._last_use)

    def _copies(self, rows_G: Tensor) -> tuple[Tensor, Tensor]:
        return self._added_CD[rows_G], self._kv_CP[rows_G]

    @torch.no_grad()
    def _keep(self, classes: Collection[int], wanted: Collection[int]) -> None:
        """Compute rows of classes that have none, without evicting rows of `wanted`."""
        pending = list(classes)
        for first in range(0, len(pending), GROUP):
            chosen = pending[first : first + GROUP]
            added_GD, kv_GP = self._project(chosen)
            for index, each in enumerate(chosen):
                row = self._room(wanted)
                self._added_CD[row] = added_GD[index]
                self._kv_CP[row] = kv_GP[index]
                self._rows[each] = row
            del added_GD, kv_GP  # before the next group's are allocated

    def _project(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        assert self._text is not None
        assert self._projector is not None
        padded = chosen + chosen[-1:] * (GROUP - len(chosen))
        inputs = []
        for kept_KD in (self._text.text_KLD, self._text.pooled_KD):
            shape = (GROUP, *kept_KD.shape[1:])
            rows_GD = torch.empty(shape, dtype=self._kv_CP.dtype, device=self._device)
            for row_D, each in zip(rows_GD, padded, strict=True):
                row_D.copy_(kept_KD[each], non_blocking=True)
            inputs.append(rows_GD)
        return self._projector(*inputs, self._time_ids_6)

    def _room(self, wanted: Collection[int]) -> int:
        """A free row, or an evicted prompt's."""
        if len(self._rows) < self.capacity:
            return len(self._rows)
        return self._rows.pop(next(each for each in reversed(self._rows) if each not in wanted))


def open_prompt_bank(
    parts: ModelParts,
    text: TextEmbeddings,
    *,
    conditioning_px: int,
    least: int,
    budget_bytes: int | None,
) -> PromptBank:
    """A bank with as many rows as fit into `budget_bytes`; None: BANK_SHARE of free memory.

    One call has up to `least` different prompts. Reports on stderr when not all prompts are kept.
    Raises ValueError when the budget is too small for `least`.
    """
    prompts, tokens = text.text_KLD.shape[:2]
    least = min(least, prompts)
    row_bytes = _elements(parts, tokens) * parts.unet.dtype.itemsize
    if budget_bytes is None:
        on_gpu = parts.unet.device.type == "cuda"
        free = gpu_memory_bytes()[0] if on_gpu else free_host_bytes()
        budget_bytes = max(int(BANK_SHARE * free), least * row_bytes)
    if budget_bytes < least * row_bytes:
        raise ValueError(
            f"prompt_cache_bytes: expected {least * row_bytes} or more, the keys and values of the "
            f"{least} prompts of one call, got {budget_bytes}"
        )
    bank = PromptBank(
        parts, text, conditioning_px=conditioning_px, capacity=budget_bytes // row_bytes
    )
    if not bank.resident:
        say(
            f"prompts: keys and values of {bank.capacity} of {prompts} classes are kept "
            f"({bank.kept_bytes / 1e6:,.1f} MB), the others are computed on demand, for which "
            f"{bank.weights_bytes / 1e6:,.1f} MB of the UNet's weights stay"
        )
    return bank


def _elements(parts: ModelParts, tokens: int) -> int:
    """Number of elements in one prompt's keys and values."""
    return 2 * sum(slot.size for slot in key_value_slots(parts.unet, tokens))
