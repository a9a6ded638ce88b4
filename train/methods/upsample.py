"""Method upsample: patches of the teacher's choice, enlarged: what dace adds noise to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from .method import Machine, Made, Making, Method

if TYPE_CHECKING:
    from ...engine.coreset.coreset import Coreset
    from .source import UpsampledPatches


def takes_patches(ipc: int, factor: int) -> tuple[int, str]:
    """One image for each patch."""
    needed = ipc * factor**2
    return needed, (
        f"ipc · factor² = {needed} patches are wanted, one of each image: give a smaller --ipc or "
        "--factor"
    )


def make_chosen(making: Making, _: Path) -> Made:
    """The patches that --select chooses."""
    from .patches import chosen

    return chosen(making, making.plan.select)


def open_enlarged(coreset: Coreset, machine: Machine) -> AbstractContextManager[UpsampledPatches]:
    """Each patch of a coreset, enlarged."""
    from .source import UpsampledPatches

    return nullcontext(
        UpsampledPatches(
            method=coreset.settings["method"],
            patches_NHWC=coreset.patches().to(machine.device),
            labels_N=coreset.labels_N,
            class_ids=coreset.class_ids,
            size_px=coreset.settings["image_size_px"],
        )
    )


UPSAMPLE = Method(name="upsample", takes=takes_patches, make=make_chosen, open=open_enlarged)
