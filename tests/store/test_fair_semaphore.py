"""Who gets a permit next, and that none is lost."""

from __future__ import annotations

import asyncio

import pytest

from service.store.db.fair_semaphore import FairSemaphore


async def test_owners_take_turns_during_a_burst_of_one_of_them() -> None:
    permits = FairSemaphore(1)
    order: list[str] = []

    async def use(owner_id: str) -> None:
        async with permits.hold(owner_id, 20):
            order.append(owner_id)
            await asyncio.sleep(0)

    async with permits.hold("somebody", 20):
        flood = [asyncio.create_task(use("flood")) for _ in range(100)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(use(owner_id)) for owner_id in "aabc"]
        await asyncio.sleep(0)
        assert not order
    await asyncio.gather(*flood, *others)
    assert order[:8] == ["flood", "a", "b", "c", "flood", "a", "flood", "flood"]
    assert len(order) == 104
    assert permits.free == 1


async def test_holders_never_exceed_the_count() -> None:
    permits = FairSemaphore(3)
    most = now = 0

    async def use() -> None:
        nonlocal most, now
        async with permits.hold("", 20):
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1

    await asyncio.gather(*(use() for _ in range(20)))
    assert (most, permits.free) == (3, 3)


async def test_acquire_timeout_raises_and_loses_no_permit() -> None:
    permits = FairSemaphore(1)
    async with permits.hold("a", 20):
        with pytest.raises(TimeoutError):
            async with permits.hold("b", 0.01):
                pytest.fail("there was none")
    async with permits.hold("c", 0.01):
        pass


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
async def test_permit_granted_to_a_cancelled_waiter_is_passed_on(turns: int) -> None:
    permits = FairSemaphore(1)

    async def use() -> None:
        async with permits.hold("a", 20):
            await asyncio.sleep(0)

    async with permits.hold("somebody", 20):
        leaving = asyncio.create_task(use())
        staying = asyncio.create_task(use())
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    leaving.cancel()
    async with asyncio.timeout(20):
        await staying
        await asyncio.wait([leaving])
    assert permits.free == 1
