"""All methods by name: ours, and those of installed packages, which entry points name.

A package brings a Method by an entry point of the group `patchbloom.methods`; it is loaded when its
name is given, so a broken one stops no other command.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ...engine.errors import CoresetError, reason
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

GROUP = "patchbloom.methods"
_NAME = re.compile(r"(?!(real|doped)$)[a-z0-9]+")
"""It names folders and files of a run, beside those of the ceiling and of doping."""


class _Methods(dict[str, Method]):
    """Ours in the order in which help lists them, then those of packages that were asked for."""

    def __missing__(self, name: str) -> Method:
        """Raises ValueError for an unknown name or an entry point that gives no such method."""
        brought = [*entry_points(group=GROUP, name=name)]
        if len(brought) != 1:
            among = f"expected one or several of {', '.join(known_methods())}"
            told = "several packages bring it: uninstall all but one" if brought else among
            raise ValueError(f"--method {name}: {told}")
        try:
            method = brought[0].load()
            fits = isinstance(method, Method) and method.name == name and _NAME.fullmatch(name)
            why = f"expected a Method of this name in a-z and 0-9, got {method!r:.60}"
        except (Exception, SystemExit) as error:  # a module may do anything when it is imported
            fits, why = False, reason(error)
        if not fits:
            raise ValueError(
                f"--method {name}: its entry point {brought[0].value} is broken ({why}): repair or "
                "uninstall the package"
            )
        self[name] = method
        return method


METHODS = _Methods(
    (method.name, method) for method in (DACE, RDED, RANDOM, UPSAMPLE, T2I, DSCO, HERDING)
)


def known_methods() -> tuple[str, ...]:
    """The names of all methods, with those of packages that are not loaded."""
    return tuple(dict.fromkeys([*METHODS, *sorted(entry_points(group=GROUP).names)]))


def method_of(coreset: Coreset) -> Method:
    """The method that made a coreset; CoresetError when its name is unknown."""
    name = coreset.settings["method"]
    try:
        return METHODS[name]
    except ValueError as error:
        raise CoresetError(
            f"{coreset.folder}: {error}; or take the version of patchbloom that made it"
        ) from None
