"""torchrun's environment variables for this process, and which rank prints. Torch-free.

Without torchrun there is one process, and it prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process of a world."""

    rank: int = 0
    """0 to size - 1."""
    size: int = 1
    """Processes in all, on all machines."""
    local_rank: int = 0
    """Rank among the processes of this machine; the index of its GPU."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def require_alone(self, command: str) -> None:
        """Raises ValueError if torchrun started several processes for a command that takes one."""
        if self.size > 1:
            raise ValueError(
                f"{command} runs in one process, and torchrun started {self.size}: "
                "start it without torchrun"
            )

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Drop stdout and stderr of all ranks except 0 inside the block."""
        if self.leads:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def read_launch() -> Launch:
    """Read the launch from torchrun's environment variables; an empty one counts as not set.

    Raises ValueError for variables that another launcher left: incomplete, or against each other.
    """
    given = {name: os.environ[name] for name in (*NUMBERS, *MEETING) if os.environ.get(name)}
    if not given.keys() & set(NUMBERS):
        return Launch()
    needed = NUMBERS[:3] if given.get("WORLD_SIZE") == "1" else (*NUMBERS[:3], *MEETING)
    if missing := [name for name in needed if name not in given]:
        raise _refusal(given, f"without {', '.join(missing)}")
    try:
        rank, size, local_rank, local_size = (int(given.get(name, 1)) for name in NUMBERS)
        port = int(given.get("MASTER_PORT", 1))
    except ValueError:
        raise _refusal(given, "are not numbers") from None
    if not (0 <= rank < size >= local_size > local_rank >= 0 and 0 < port < 2**16):
        raise _refusal(given, "contradict each other")
    return Launch(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _refusal(given: dict[str, str], fault: str) -> ValueError:
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return ValueError(
        f"{told} {fault}: start with torchrun, which sets all of them, or unset {', '.join(given)}"
    )
