"""All methods by name, in the order in which help and messages list them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine.errors import CoresetError
from .dace import DACE
from .dsco import DSCO
from .herding import HERDING
from .method import Method
from .random import RANDOM
from .rded import RDED
from .t2i import T2I
from .upsample import UPSAMPLE

if TYPE_CHECKING:
    from ...engine.coreset.coreset import Coreset

METHODS = {method.name: method for method in (DACE, RDED, RANDOM, UPSAMPLE, T2I, DSCO, HERDING)}


def method_of(coreset: Coreset) -> Method:
    """The method that made a coreset; CoresetError when its name is unknown."""
    name = coreset.settings["method"]
    if name not in METHODS:
        raise CoresetError(
            f"{coreset.folder}: expected a coreset of {', '.join(METHODS)}, got one of {name!r}: "
            "take the version of patchbloom that made it"
        )
    return METHODS[name]
