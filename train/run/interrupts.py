"""Ctrl-C and SIGTERM, deferred until a training has written its checkpoint.

The first signal requests a stop; a second one stops at once. Torch-free.
"""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from ...engine.console import Terminated


class Interrupts(AbstractContextManager["Interrupts"]):
    """Inside the block, SIGINT and SIGTERM only request its end.

    Signals reach the main thread alone: in another one nothing changes.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def stop(self) -> None:
        """Raise what the signal would have raised: KeyboardInterrupt or Terminated."""
        raise KeyboardInterrupt if self._signal == signal.SIGINT else Terminated

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self.stop()
        self._signal = number
