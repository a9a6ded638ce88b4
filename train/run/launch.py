"""torchrun's environment variables for this process, and which rank prints. Torch-free.

Without torchrun there is one process, and it prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass


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
    """Read the launch from torchrun's environment variables."""
    return Launch(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
