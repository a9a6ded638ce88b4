"""A ring of slots: one side fills them, the other drains them, at the same time.

    producer   thread, its own CUDA stream    wait(drained) → fill → record(filled)
    consumer   caller, a stream that the GPU prefers    wait(filled) → use → record(drained)

Slots go round between the two sides (as in FFCV). Streams synchronise through events: on a GPU no
host waits for the other side's kernels, and the producer waits for its own only where it reads a
result (the NaN gate, labels to store). On a CPU the two threads synchronise through a condition
alone. The producer is at most as many items ahead as there are slots. Items keep the iterable's
order, whatever the timing, and both sides compute with the caller's number of threads, so results
have the same bits with or without overlap. Without overlap the consumer fills all slots itself,
then drains them: the baseline.

While a ring is open no convolution of the process computes in TF32: sessions switch it off for
their own calls, and would switch it under the consumer's.

On a GPU the producer's kernels are large and many, the consumer's short: with higher priority the
consumer's run as soon as they are queued, and expansion takes the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Generic, TypeVar

import torch

from ...export.parity import without_tf32

Slot = TypeVar("Slot")
Item = TypeVar("Item")
LOOK_UP_S = 0.05  # how often a waiting consumer checks for an interrupt
CONSUMER_PRIORITY = -1  # CUDA: lower is sooner


@dataclass
class _Place(Generic[Slot]):
    """A slot and the events of its last use; events are None without separate streams."""

    slot: Slot
    filled: torch.cuda.Event | None = None
    drained: torch.cuda.Event | None = None


class Ring(AbstractContextManager["Ring[Slot, Item]"], Generic[Slot, Item]):
    """Calls ``fill(slot, item)`` for every item, at most ``len(slots)`` ahead of the consumer.

    ``take`` hands out filled slots, and frees those it handed out before. It raises the producer's
    error, with its own traceback, after handing out everything filled earlier. Leaving the block
    ends the thread, which finishes the slot in progress and no other. With `alone` false that slot
    may wait for other processes, so after an error nobody waits for it.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        fill: Callable[[Slot, Item], None],
        items: Iterable[Item],
        *,
        device: torch.device,
        overlap: bool = True,
        interrupted: Callable[[], bool] = lambda: False,
        alone: bool = True,
    ) -> None:
        if not slots:
            raise ValueError("slots: expected one or more, got none")
        streams = overlap and device.type == "cuda"
        self._fill, self._items, self._interrupted = fill, iter(items), interrupted
        self._alone = alone
        self._free = deque(_Place(slot) for slot in slots)
        self._filled: deque[tuple[Item, _Place[Slot]]] = deque()
        self._taken: list[_Place[Slot]] = []
        self._changed = Condition()
        self._ended = self._stopping = False
        self._error: BaseException | None = None
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waited_s = self._stalled_s = 0.0
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if streams:
            self._streams = (
                torch.cuda.Stream(device),
                torch.cuda.Stream(device, priority=CONSUMER_PRIORITY),
            )
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream(device))
            for place in self._free:
                place.filled, place.drained = torch.cuda.Event(), torch.cuda.Event()
        self._in_fp32 = without_tf32()
        self._in_fp32.__enter__()
        self._thread: Thread | None = None
        if overlap:
            threads = torch.get_num_threads()
            # A daemon: at interpreter shutdown nobody may be left to close the ring.
            self._thread = Thread(
                target=self._produce, args=(threads,), name="producer", daemon=True
            )
            self._thread.start()

    def take(self) -> list[tuple[Item, Slot]]:
        """The filled slots in order, with their items: one or more, or none at the end.

        Also none when ``interrupted`` returns true. Slots taken before go back to the producer.
        """
        self._release()
        if self._thread is None:
            return self._fill_here()
        began = time.perf_counter()
        with self._changed:
            while not (self._filled or self._ended or self._interrupted()):
                self._changed.wait(LOOK_UP_S)
            taken = list(self._filled)
            self._filled.clear()
        self._waited_s += time.perf_counter() - began
        for _, place in taken:
            self._wait_until_filled(place)
        self._taken = [place for _, place in taken]
        if not taken and self._error is not None and not self._interrupted():
            raise self._error
        return [(item, place.slot) for item, place in taken]

    @contextmanager
    def consuming(self) -> Iterator[None]:
        """Run the consumer on its own stream on a GPU; the caller's stream then waits for it."""
        if self._streams is None:
            yield
            return
        callers = torch.cuda.current_stream()
        try:
            with torch.cuda.stream(self._streams[1]):
                yield
        finally:
            callers.wait_stream(self._streams[1])

    def waited_s(self) -> float:
        """Seconds for which the consumer was idle; on a GPU its stream, not its host."""
        if self._streams is None:
            return self._waited_s
        self._streams[1].synchronize()
        self._add_ended()
        return self._stalled_s

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if kind is not None and not self._alone:
            return
        if self._thread is not None:
            self._thread.join()
        if self._streams is not None:
            self._streams[0].synchronize()
        self._in_fp32.__exit__(None, None, None)

    def _release(self) -> None:
        """Return the consumer's slots to the producer."""
        for place in self._taken:
            if place.drained is not None:
                place.drained.record()
        with self._changed:
            self._free.extend(self._taken)
            self._changed.notify_all()
        self._taken = []

    def _fill_here(self) -> list[tuple[Item, Slot]]:
        """Without overlap: fill all free slots."""
        began = time.perf_counter()
        taken: list[tuple[Item, Slot]] = []
        try:
            while self._free and self._error is None and not self._interrupted():
                item, place = next(self._items), self._free.popleft()
                self._taken.append(place)
                self._fill(place.slot, item)
                taken.append((item, place.slot))
        except StopIteration:
            pass
        except Exception as error:
            self._error = error
        self._waited_s += time.perf_counter() - began
        if not taken and self._error is not None:
            raise self._error
        return taken

    def _wait_until_filled(self, place: _Place[Slot]) -> None:
        """Let the consumer's stream wait, and time it."""
        if place.filled is None:
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        torch.cuda.current_stream().wait_event(place.filled)
        ended.record()
        self._waits.append((began, ended))
        self._add_ended()

    def _add_ended(self) -> None:
        """Add up the waits that have ended, and free their events."""
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            self._stalled_s += began.elapsed_time(ended) / 1e3

    def _produce(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a new thread has the number that any thread set last
        try:
            with nullcontext() if self._streams is None else torch.cuda.stream(self._streams[0]):
                while (place := self._next_free()) is not None:
                    try:
                        item = next(self._items)
                    except StopIteration:
                        break
                    self._fill_place(place, item)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next_free(self) -> _Place[Slot] | None:
        """Wait for a slot; None when the consumer has left."""
        with self._changed:
            while not (self._free or self._stopping):
                self._changed.wait()
            return None if self._stopping else self._free.popleft()

    def _fill_place(self, place: _Place[Slot], item: Item) -> None:
        if place.drained is not None:
            torch.cuda.current_stream().wait_event(place.drained)
        self._fill(place.slot, item)
        if place.filled is not None:
            place.filled.record()
        with self._changed:
            self._filled.append((item, place))
            self._changed.notify_all()
