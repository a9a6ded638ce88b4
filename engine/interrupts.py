"""Ctrl-C and SIGTERM, kept by our own handler until a safe point asks for them.

An exception that leaves a signal handler can be lost: Python prints and drops what it meets in a
weakref callback or a destructor. So the handler only keeps the signal. A second one raises at once,
and so does the first after GRACE_S without a safe point, as in a download. Only the main thread
receives and raises. Standard library only: the commands import this first.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 3.0


@dataclass
class _Kept:
    """The signals of one block, or of a process."""

    came: int | None = None
    deferred: bool = False
    raised: bool = False
    over: bool = False


_kept = _Kept()


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no Exception, so that no handler catches it."""


def keep_signals() -> None:
    """Keep signals from now on, to the end of the process."""
    _handle_by(_keep)
    # Python takes its handlers down, then its modules: what comes then would change the exit code.
    atexit.register(_handle_by, signal.SIG_IGN)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keep signals inside the block, unless they are kept already.

    The handlers from before get a signal that the block did not raise.
    """
    global _kept
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if _keep in before.values() or not _in_main_thread():
        yield
        return
    kept = _kept = _Kept()
    try:
        _handle_by(_keep)
        yield
    finally:
        kept.over = True  # first: an exception among the next lines would leave our handlers
        with ExitStack() as last:  # a restored handler may raise before the other is back
            last.callback(_hand_on, kept)
            for number, handler in before.items():
                last.callback(signal.signal, number, handler)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Keep signals, and raise none inside the block but a second one.

    The block looks at `signal_came`, ends in its own way, and calls `stop`. Also a decorator.
    """
    with signals_kept():
        _kept.deferred = True
        try:
            yield
        finally:
            _kept.deferred = False


def signal_came() -> bool:
    return _kept.came is not None and not _kept.over


def stop() -> NoReturn:
    """Raise what stands for the signal: KeyboardInterrupt or Terminated."""
    _kept.raised = True
    raise KeyboardInterrupt if _kept.came == signal.SIGINT else Terminated


def safe_point() -> None:
    """Raise KeyboardInterrupt or Terminated if a signal came: here nothing is lost by it."""
    if signal_came() and not _kept.deferred and _in_main_thread():
        stop()


def _hand_on(kept: _Kept) -> None:
    if kept.came is not None and not kept.raised:
        signal.raise_signal(kept.came)


def _handle_by(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _keep(number: int, frame: FrameType | None) -> None:
    kept = _kept
    if signal_came():
        stop()
    if kept.came is None:
        kept.came = number
    if not kept.over:
        # The bare call: Thread.start takes locks that the interrupted code may hold.
        _thread.start_new_thread(_send_again, (threading.get_ident(), number, kept))


def _send_again(thread: int, number: int, kept: _Kept) -> None:
    time.sleep(GRACE_S)
    if not (kept.deferred or kept.raised or kept.over):
        signal.pthread_kill(thread, number)


def _forget_in_child() -> None:
    """A forked worker ends at a signal, without a word: its parent has been told."""
    if signal.getsignal(signal.SIGINT) is _keep:
        _handle_by(signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
