"""Faults of the search processes, which compute the embeddings of their replicas."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress

import psutil

from tests.soak.stack import Replica, Stack


class SearchFaults:
    """Stops or kills the search process of one replica or of all of them."""

    def __init__(self, stack: Stack, rng: random.Random) -> None:
        self._stack = stack
        self._rng = rng
        self.kinds: dict[str, Callable[[], Awaitable[list[Replica]]]] = {
            "search process suspended": self._suspend,
            "search process killed (-9)": self._kill,
        }
        """The faults by name. After them, replicas must search again."""

    async def _suspend(self) -> list[Replica]:
        """Suspend the processes, in some draws for so long that their replicas report it."""
        replicas = self._stack.some_replicas(self._rng)
        with suspended(replicas):
            await asyncio.sleep(self._rng.uniform(0.5, 8))
        return replicas

    async def _kill(self) -> list[Replica]:
        """Kill each process once: a text that ends two of them is blocked as their cause."""
        replicas = self._stack.some_replicas(self._rng)
        _send(_processes_of(replicas), signal.SIGKILL)
        return replicas


@contextmanager
def suspended(replicas: Sequence[Replica]) -> Generator[None]:
    """Suspend the search processes of replicas during a block."""
    processes = _processes_of(replicas)
    try:
        _send(processes, signal.SIGSTOP)
        yield
    finally:
        _send(processes, signal.SIGCONT)


def _processes_of(replicas: Sequence[Replica]) -> list[psutil.Process]:
    return [process for replica in replicas for process in replica.search_processes]


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
