"""The queue of queries: bounded, fair between users, and robust against cancelled queries."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.errors import Overloaded
from service.search.query_queue import QueryLimits, QueryQueue

LIMITS = QueryLimits(
    max_running=2,
    max_running_per_user=1,
    max_waiting=6,
    max_waiting_per_user=4,
    max_waiting_bytes=1000,
    max_waiting_bytes_per_user=600,
)


class Queries:
    """Queries that record when they run, and end when the test says so."""

    def __init__(self, limits: QueryLimits = LIMITS) -> None:
        self.queue = QueryQueue(limits)
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._loop = asyncio.get_running_loop()

    async def add(
        self,
        name: str,
        *,
        n_bytes: int = 1,
        has_started: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """Add a query of the user named by the first letter, and let it run or wait."""
        end = self._ends[name] = asyncio.Event()

        async def run() -> None:
            timeout_at = self._loop.time() + timeout_s
            async with self.queue.admitted(name[0], n_bytes, timeout_at, has_started=has_started):
                self.order.append(name)
                await end.wait()

        self.tasks[name] = self._loop.create_task(run())
        await asyncio.sleep(0)

    async def assert_rejected(self, name: str, **options: Any) -> Overloaded:
        """Add a query, and assert that it is rejected."""
        await self.add(name, **options)
        with pytest.raises(Overloaded) as caught:
            await self.tasks[name]
        return caught.value

    async def end(self, *names: str) -> None:
        """Let queries end, and those that they make room for run."""
        for name in names:
            self._ends[name].set()
            for _ in range(3):
                await asyncio.sleep(0)

    async def end_all(self) -> None:
        """Let all queries end, in the order in which they run."""
        index = 0
        while index < len(self.order):
            await self.end(self.order[index])
            index += 1


async def test_users_are_admitted_in_rotation_whatever_one_of_them_sends() -> None:
    queries = Queries()
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
        await queries.add(name)
    assert queries.order == ["a1", "b1"], "a user leaves room for others"
    assert queries.queue.waiting_count == 5
    await queries.end_all()
    assert queries.order == ["a1", "b1", "a2", "b2", "c1", "a3", "a4"]
    assert queries.queue.waiting_count == 0


async def test_excess_is_rejected_for_the_user_who_causes_it() -> None:
    queries = Queries()
    await queries.add("a0")
    for n in range(1, 5):
        await queries.add(f"a{n}")
    error = await queries.assert_rejected("a5")
    assert error.reason == "OVERLOADED"
    assert error.retry_after
    await queries.add("b1")
    assert "b1" in queries.order
    await queries.add("b2")
    await queries.add("c1")
    await queries.assert_rejected("d1")
    assert queries.queue.rejected_count == 2
    await queries.end_all()
    assert len(queries.order) == 8


async def test_bytes_of_waiting_queries_are_bounded() -> None:
    queries = Queries()
    await queries.add("a0", n_bytes=10_000)
    await queries.add("a1", n_bytes=500)
    await queries.assert_rejected("a2", n_bytes=200)
    await queries.add("b0", n_bytes=10_000)
    await queries.add("b1", n_bytes=450)
    await queries.assert_rejected("c0", n_bytes=100)
    await queries.end_all()
    assert queries.order == ["a0", "b0", "a1", "b1"]
    await queries.add("c0", n_bytes=10_000)
    await queries.add("c1", n_bytes=600)
    assert queries.queue.waiting_count == 1, "the bytes of the others are released"
    await queries.end_all()


async def test_started_query_precedes_the_users_other_queries_and_is_not_rejected() -> None:
    queries = Queries()
    for n in range(5):
        await queries.add(f"a{n}")
    await queries.add("a-started", has_started=True)
    await queries.end_all()
    assert queries.order == ["a0", "a-started", "a1", "a2", "a3", "a4"]


async def test_cancelled_query_leaves_the_queue_and_is_never_admitted() -> None:
    queries = Queries()
    await queries.add("a0")
    for n in range(1, 5):
        await queries.add(f"a{n}")
    waiting = [queries.tasks[f"a{n}"] for n in range(1, 5)]
    waiting[1].cancel()
    await asyncio.sleep(0)
    assert queries.queue.waiting_count == 3
    waiting[0].cancel()  # Its task has not run yet when the next query is admitted.
    await queries.end("a0")
    assert queries.order == ["a0", "a3"]
    queries._ends["a3"].set()
    await asyncio.sleep(0)
    waiting[3].cancel()  # It has just been admitted.
    await asyncio.gather(*waiting, return_exceptions=True)
    await queries.add("a9")
    assert queries.order == ["a0", "a3", "a9"]
    await queries.end_all()
    assert not queries.queue._queues
    assert not queries.queue._running
    assert queries.queue._running_count == queries.queue.waiting_count == 0
    assert queries.queue._waiting_bytes == 0


async def test_query_that_is_not_admitted_in_time_is_rejected() -> None:
    queries = Queries()
    await queries.add("a0")
    await queries.assert_rejected("a1", timeout_s=0.01)
    assert queries.queue.waiting_count == 0
    await queries.end_all()
    assert queries.order == ["a0"]
