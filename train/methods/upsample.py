"""Method upsample: patches that the teacher chose, enlarged; dace's images without the model."""

from __future__ import annotations

from .method import Method, later

UPSAMPLE = Method(
    name="upsample",
    takes="patches",
    make=later("patches.make_scored"),
    open=later("source.open_enlarged"),
)
