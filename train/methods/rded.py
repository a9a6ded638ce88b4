"""Method rded: mosaics of r² neighbouring patches of the teacher's choice, in a fresh order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from .method import Machine, Method
from .upsample import make_chosen, takes_patches

if TYPE_CHECKING:
    from ...engine.coreset.coreset import Coreset
    from .source import Mosaics


def _open(coreset: Coreset, machine: Machine) -> AbstractContextManager[Mosaics]:
    from .source import Mosaics

    return nullcontext(
        Mosaics(
            patches_NHWC=coreset.patches().to(machine.device),
            labels_N=coreset.labels_N,
            class_ids=coreset.class_ids,
            factor=coreset.settings["factor"],
            seed=coreset.settings["seed"],
        )
    )


RDED = Method(name="rded", takes=takes_patches, make=make_chosen, open=_open)
