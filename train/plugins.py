"""Functions of one's own, which options name as `package.module:function`. Torch-free.

They are found among installed packages, then in the current folder: a console script does not look
there by itself.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..engine.errors import reason

_FUNCTION = re.compile(r"(?!torchvision:|timm:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function(name: str) -> bool:
    """Whether a name has the form `package.module:function`."""
    return _FUNCTION.fullmatch(name) is not None


def require_package(name: str) -> None:
    """Raises ValueError when the package that a name begins with is not here; imports none."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    package = re.split("[.:]", name)[0]
    if package not in sys.modules and find_spec(package) is None:
        put = f"put {package}.py into the current folder"
        way_out = "pip install 'patchbloom[timm]'" if package == "timm" else f"install it, {put}"
        raise ValueError(f"there is no package {package!r}: {way_out}, or name another")


def load_function(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; its module is imported.

    Raises ValueError, one line, for a module that cannot be imported or has no such function.
    """
    require_package(name)
    try:
        function = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # a module may do anything when it is imported
        raise ValueError(f"it cannot be imported ({reason(error)})") from error
    if not callable(function):
        raise ValueError(f"expected a function, got {function!r:.60}")
    return function
