"""What torchrun says of this process, and who speaks for all: from the environment, torch-free.

Without torchrun there is one process, and it speaks.
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
    """Among the processes of this machine; the number of its GPU."""
    local_size: int = 1
    """Processes of this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def require_alone(self, command: str) -> None:
        """ValueError for a command that has nothing to share."""
        if self.size > 1:
            raise ValueError(
                f"{command} runs in one process, and torchrun started {self.size}: "
                "start it without torchrun"
            )

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What ranks other than 0 print is dropped meanwhile, on stdout and stderr."""
        if self.leads:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def read_launch() -> Launch:
    """The launch that torchrun's variables describe."""
    names = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
    }
    given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    return Launch(**{key: int(value) for key, value in given.items()})
