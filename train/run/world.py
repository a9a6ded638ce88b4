"""The world: the processes that torchrun started for one command, one per device.

There are two process groups: one for tensors (nccl on GPUs, gloo on CPUs), and a gloo group for
plain values and for waiting, which never times out: rank 0 may train a teacher for hours. Without
torchrun there is one process and no group.

A failure is reported once, by the rank that has it. The others see a closed connection, or SIGTERM
from torchrun, and exit silently.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.expand.backends import resolve_device
from ...engine.interrupts import safe_point
from ...export.config import DeviceName
from .launch import MEETING, Launch, read_launch

Value = TypeVar("Value")

WITHOUT_LIMIT = timedelta(days=3650)
STARTED_WITHIN = timedelta(minutes=10)  # of torch's own waits for the processes that are there
TOLD_AFTER_S, LOOK_UP_S = 5.0, 0.5  # while others are missing
REPORTED_WITHIN = timedelta(seconds=10)  # how long the other ranks wait for the error message
STARTED, FAILED, REPORTED = "patchbloom/started", "patchbloom/failed", "patchbloom/told"


class OtherRankError(OSError):
    """Another process of the world has ended; the work cannot continue without it."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Peers (engine/peers.py) of a command: rank 0 leads, the others follow.

    All ranks call every method, in the same order. Raises OtherRankError when one of them is gone.
    """

    launch: Launch
    device: torch.device
    """This process's device, with its index: a thread that starts later has another default."""
    values: dist.ProcessGroup | None = None
    """The group for plain values; None in a world of one."""
    tensors: dist.ProcessGroup | None = None
    """The group for tensors on this device; None in a world of one, and in `producing`."""
    beside: World | None = None
    """The same ranks in separate groups, see `producing`."""

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def size(self) -> int:
        return self.launch.size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.launch.leads

    @property
    def producing(self) -> World:
        """The world for the rendering thread: calls of two threads in one group would mix."""
        return self.beside or self

    @property
    def threads(self) -> int:
        """CPU cores for this process: its share of the machine's usable ones, at least 1."""
        return max(1, len(os.sched_getaffinity(0)) // self.launch.local_size)

    def barrier(self) -> None:
        """Wait until all ranks are here, without a timeout."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.size == 1:
            return flag
        flag_1 = torch.tensor([flag], dtype=torch.int32)
        with _loss_explained():
            dist.all_reduce(flag_1, dist.ReduceOp.MAX, self.values)
        return bool(flag_1)

    def same(self, value: Value) -> Value:
        """Rank 0's value, plain JSON, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with _loss_explained():
            dist.broadcast_object_list(values, src=0, group=self.values)
        return values[0]

    def once(self, work: Callable[[], Value]) -> Value:
        """Rank 0 does the work, the others wait; all return its result, plain JSON."""
        return self.same(work() if self.leads else None)  # pyright: ignore[reportReturnType]

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """All do the work: rank 0 first, then one rank on every other machine, then the rest.

        Downloads and builds thus happen once per disk, and the other ranks find them.
        """
        own_turn = 0 if self.leads else 1 if self.launch.local_rank == 0 else 2
        done: list[Value] = []
        for turn in range(3):
            if turn == own_turn:
                done.append(work())
            self.barrier()
        return done[0]

    def all_gather(self, value: Value) -> list[Value]:
        """The plain values of all ranks, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _loss_explained():
            dist.all_gather_object(values, value, group=self.values)
        return values

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank, on their own device.

        Ranks may have different numbers of rows; a rank without rows passes any empty tensor.
        """
        if self.size == 1:
            return rows
        of_ranks = self.all_gather(_Rows(tuple(rows.shape), rows.dtype, rows.device.type))
        on_gpu = any(each.device == "cuda" for each in of_ranks)
        with _loss_explained():
            return _gather_bytes(rows, of_ranks, (on_gpu and self.tensors) or self.values)

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's content into the tensors of all ranks, on the world's device."""
        if self.size == 1:
            return
        with _loss_explained():
            for tensor in tensors:
                dist.broadcast(tensor, 0, self.tensors)


ALONE = World(launch=Launch(), device=torch.device("cpu"))


class _Rows(NamedTuple):
    """Description of one rank's rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def _gather_bytes(rows: Tensor, of_ranks: list[_Rows], group: dist.ProcessGroup | None) -> Tensor:
    """Gather rows of any type as bytes, padded to the longest: gloo and nccl both can.

    Between a GPU and gloo they lie in pinned memory, which torch keeps for the next call, and only
    the copy from the GPU is waited for. This has not run on a GPU.
    """
    kind = max(of_ranks, key=_Rows.bytes)
    through = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    pinned = through == "cpu" and kind.device == "cuda"
    shape = (1 + len(of_ranks), kind.bytes())
    padded, *parts = torch.empty(shape, dtype=torch.uint8, device=through, pin_memory=pinned)
    own = rows.contiguous().reshape(-1).view(torch.uint8)
    padded[: len(own)] = own
    dist.all_gather(parts, padded, group)
    parts = [
        part[: each.bytes()].to(kind.device, non_blocking=True)
        for part, each in zip(parts, of_ranks, strict=True)
    ]
    count = sum(each.shape[0] for each in of_ranks)
    return torch.cat(parts).view(kind.dtype).view(count, *kind.shape[1:])


@contextmanager
def open_world(device: DeviceName, start_timeout_s: float = 600.0) -> Iterator[World]:
    """The world of this command; its groups are destroyed when the block ends, even by an error.

    Raises ValueError for more processes than GPUs, or when one does not start in time. When several
    ranks fail, the first keeps its error; the others get OtherRankError, which `tell_once` does not
    print.
    """
    launch = read_launch()
    if launch.size == 1:
        yield World(launch=launch, device=own_device(launch, device))
        return
    try:
        own = own_device(launch, device)
        _wait_for(_unreachable, start_timeout_s, tells=True)
        _store().add(STARTED, 1)
        _wait_for(lambda: _missing(launch.size), start_timeout_s, tells=launch.leads)
        world = _joined(launch, own)
        yield world
        world.barrier()  # a rank that left early would close connections that others still read
    except BaseException as error:
        if not _fails_first() and isinstance(error, Exception):
            raise OtherRankError("another process of this run failed first") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _joined(launch: Launch, device: torch.device) -> World:
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_store(),
        rank=launch.rank,
        world_size=launch.size,
        device_id=device if on_gpu else None,
    )
    # Two nccl communicators in two threads may deadlock: beside the students' gradients, images are
    # exchanged by gloo, through host memory.
    by_host = _new_group(backend="gloo", timeout=WITHOUT_LIMIT)
    beside = World(launch=launch, device=device, values=by_host)
    values = _new_group(backend="gloo", timeout=WITHOUT_LIMIT)
    tensors = _new_group() if on_gpu else values
    return World(launch=launch, device=device, values=values, tensors=tensors, beside=beside)


def _new_group(**options: Any) -> dist.ProcessGroup:
    """New group of all ranks (never the non-member sentinel)."""
    return cast(dist.ProcessGroup, dist.new_group(**options))


def own_device(launch: Launch, device: DeviceName) -> torch.device:
    """The CPU, or this process's GPU, made the current one. Raises ValueError if it has none."""
    if resolve_device(device) == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if launch.local_rank >= found:
        raise ValueError(
            f"torchrun started {launch.local_size} processes on a machine with {found} GPUs: "
            f"give --nproc-per-node {found}, or --device cpu"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _wait_for(missing: Callable[[], str], within_s: float, *, tells: bool) -> None:
    """Look until nothing is missing; between two looks a signal ends the command.

    Raises ValueError after `within_s`. Waits inside torch hear no signal.
    """
    began = time.monotonic()
    while what := missing():
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            raise ValueError(
                f"waited {within_s:g} s for {what}: start all processes with one MASTER_ADDR and "
                "MASTER_PORT, or allow more time with --start-timeout"
            )
        if tells and waited_s > TOLD_AFTER_S:
            print(f"waiting for {what}", file=sys.__stderr__, flush=True)
            tells = False
        time.sleep(LOOK_UP_S)
        safe_point()


def _missing(size: int) -> str:
    missing = size - _store().add(STARTED, 0)
    return f"{missing} of {size} processes" if missing else ""


def _serves() -> bool:
    """Whether this process has the store; else torchrun has it, or rank 0."""
    return read_launch().leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _unreachable() -> str:
    """The place of another process's store, if nobody answers there."""
    address, port = (os.environ[name] for name in MEETING)
    try:
        if not _serves():
            socket.create_connection((address, int(port)), timeout=LOOK_UP_S).close()
    except OSError as error:
        return f"rank 0 at {address}:{port} ({error.strerror or error})"
    return ""


@cache
def _store() -> dist.Store:
    """The store where the ranks find each other: torchrun's own, or rank 0's; waits for nobody.

    torchrun keeps its store across restarts, with the addresses of dead processes in it.
    """
    if missing := _unreachable():
        raise ValueError(f"no answer from {missing}")
    address, port = (os.environ[name] for name in MEETING)
    try:
        store = dist.TCPStore(
            *(address, int(port), read_launch().size, _serves(), STARTED_WITHIN),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"MASTER_ADDR={address}, MASTER_PORT={port}: {reason}") from error
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@cache
def _fails_first() -> bool:
    """Whether this process failed first in its world, and so reports the error."""
    try:
        return _store().add(FAILED, 1) == 1
    except (RuntimeError, ValueError):  # the store ended with torchrun, or was never reached
        return read_launch().leads or not _store.cache_info().currsize


def tell_once(line: str) -> None:
    """Print an error on stderr, unless another process of this world has failed before."""
    with suppress(RuntimeError, ValueError):  # there may be no store
        if _fails_first():
            print(line, file=sys.__stderr__, flush=True)
            _store().set(REPORTED, "")
        else:  # torchrun ends all processes as soon as one of them has ended
            _store().wait([REPORTED], REPORTED_WITHIN)


@contextmanager
def _loss_explained() -> Iterator[None]:
    """Turn an error of gloo or nccl about a closed connection into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition("] ")[2] or str(error)
        raise OtherRankError(
            f"a process of this run ended, or cannot be reached ({reason}): see its output or "
            "torchrun's; finished work is kept, continue with --resume"
        ) from error
