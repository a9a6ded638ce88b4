"""Method upsample: patches that the teacher chose, enlarged; dace's images without the model."""

from __future__ import annotations

from .method import Method, later, takes_patches

UPSAMPLE = Method(
    name="upsample",
    takes=takes_patches,
    make=later("patches.make_scored"),
    open=later("source.open_enlarged"),
)
