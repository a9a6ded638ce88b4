"""Method upsample: patches of the teacher's choice, enlarged: what dace adds noise to."""

from __future__ import annotations

from .method import Method, later


def takes_patches(ipc: int, factor: int) -> tuple[int, str]:
    """One image for each patch."""
    needed = ipc * factor**2
    return needed, (
        f"ipc · factor² = {needed} patches are wanted, one of each image: give a smaller --ipc or "
        "--factor"
    )


UPSAMPLE = Method(
    name="upsample",
    takes=takes_patches,
    make=later("patches.make_scored"),
    open=later("source.open_enlarged"),
)
