"""patchbloom from Python: a coreset of patches in, fresh training images out.

    open(folder)                    a Coreset: look at it, expand it, train from it
    select(data, ipc=1, rule=...)   make a coreset, by a rule of your own
    evaluate(student, data)         accuracy of a network, as `train` measures it
    model_entry(model)              what a coreset built by hand must say of its model
    __version__

>>> import patchbloom
>>> core = patchbloom.open("runs/demo/coreset")
>>> patchbloom.__version__
'0...'

Names are loaded when they are used: importing patchbloom takes milliseconds, and no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchbloom.coreset import Coreset, open
    from patchbloom.evaluation import evaluate
    from patchbloom.model import model_entry
    from patchbloom.selection import select

    __version__: str

_PLACES = {
    "Coreset": "coreset",
    "evaluate": "evaluation",
    "model_entry": "model",
    "open": "coreset",
    "select": "selection",
}
__all__ = ["Coreset", "__version__", "evaluate", "model_entry", "open", "select"]

if not os.path.isdir(os.path.join(__path__[0], "train")):
    # An editable install: this folder is train/public, and the others lie in the repository.
    __path__.append(os.path.dirname(os.path.dirname(__path__[0])))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("patchbloom")
    if name not in _PLACES:
        raise AttributeError(f"module 'patchbloom' has no attribute {name!r}")
    from importlib import import_module

    # OpenMP reads it when torch is loaded. Eight variants on two busy cores: 2.1 to 9.1 s of CPU
    # when waiting threads spin, 0.4 to 0.7 s when they sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return getattr(import_module(f"patchbloom.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
