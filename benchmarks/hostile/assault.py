"""The means of an attack: calls in closed loops, connections, preparations, and the tally."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from grpc import aio

from benchmarks.hostile.account import Account
from benchmarks.hostile.calls import CHANNEL_OPTIONS, call
from benchmarks.hostile.http2 import Http2Connection

if TYPE_CHECKING:
    from benchmarks.hostile.attacks import Attack

_GRACE_S = 0.5
"""Time beyond the end of the attack after which calls are abandoned."""
_PREPARING_CALLS = 8
_PREPARING_TIMEOUT_S = 60.0


class Assault:
    """One attack while it runs.

    The attack first prepares its requests, then awaits `begin`, and then attacks until `ends_at`.
    """

    def __init__(
        self, account: Account, attack: Attack, wait_for_start: Callable[[], Awaitable[float]]
    ) -> None:
        self.account = account
        self.attack = attack
        self.chance = random.Random(attack.seed)  # noqa: S311 - the attacks must be repeatable
        self.tally: Counter[str] = Counter()
        """Calls by status and reason, and other events."""
        self.ends_at = 0.0
        self._wait_for_start = wait_for_start
        self._exit_stack = AsyncExitStack()

    def parameter(self, name: str) -> Any:
        """Return one of the attack's parameters."""
        return self.attack.parameters[name]

    async def begin(self) -> None:
        """Report that the preparations are done, and wait for the start."""
        seconds = await self._wait_for_start()
        self.ends_at = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Remaining time of the attack, at least 0."""
        return max(self.ends_at - time.monotonic(), 0.0)

    async def close(self) -> None:
        """Close all connections."""
        await self._exit_stack.aclose()

    async def channel(self) -> aio.Channel:
        """Return a channel with a connection of its own."""
        channel = aio.insecure_channel(self.account.address, options=CHANNEL_OPTIONS)
        return await self._exit_stack.enter_async_context(channel)

    async def raw_connection(
        self, *, window_bytes: int = 65_535, reads: bool = True
    ) -> Http2Connection:
        """Return a connection whose frames the attack writes."""
        connection = await Http2Connection.open(
            self.account.address, window_bytes=window_bytes, reads=reads
        )
        self._exit_stack.push_async_callback(connection.close)
        return connection

    async def flood(
        self,
        rpc: str,
        bodies: Sequence[bytes],
        *,
        concurrency: int,
        connections: int = 1,
        caller: str = "user",
        timeout_s: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """Call an RPC in closed loops until the end of the attack.

        Args:
            rpc: Name of the RPC.
            bodies: Serialised requests, sent in turn.
            concurrency: Number of loops.
            connections: Number of connections that they share.
            caller: `user` or `service`.
            timeout_s: Deadline of a call; None for the rest of the attack.
            metadata: Metadata in place of the caller's token.
        """
        if metadata is None:
            metadata = self.account.metadata(as_service=caller == "service")
        channels = [await self.channel() for _ in range(min(connections, concurrency))]

        async def loop(number: int) -> None:
            channel = channels[number % len(channels)]
            turn = number
            while self.seconds_left > 0:
                body = bodies[turn % len(bodies)]
                turn += concurrency
                timeout = self.seconds_left + _GRACE_S if timeout_s is None else timeout_s
                self.tally[await call(channel, rpc, body, metadata, timeout)] += 1

        await asyncio.gather(*(loop(number) for number in range(concurrency)))

    async def sleep_to_end(self) -> None:
        """Wait until the attack ends, while its connections stay open."""
        await asyncio.sleep(self.seconds_left)

    async def prepare(self, rpc: str, bodies: Sequence[bytes]) -> int:
        """Make calls as a service before the attack, and retry them while they are refused.

        Returns:
            The number of calls that succeeded.
        """
        remaining = iter(bodies)
        done = 0
        deadline = time.monotonic() + _PREPARING_TIMEOUT_S

        async def loop(channel: aio.Channel) -> None:
            nonlocal done
            for body in remaining:
                while time.monotonic() < deadline:
                    metadata = self.account.metadata(as_service=True)
                    status = await call(channel, rpc, body, metadata, _PREPARING_TIMEOUT_S)
                    if status == "OK":
                        done += 1
                        break
                    if not status.startswith(("RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE")):
                        break
                    await asyncio.sleep(0.2)

        channel = await self.channel()
        await asyncio.gather(*(loop(channel) for _ in range(_PREPARING_CALLS)))
        return done
