"""FairSemaphore: which owner gets the next permit, and that no permit is lost."""

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

    async with permits.hold("holder", 20):
        burst = [asyncio.create_task(use("burst")) for _ in range(100)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(use(owner_id)) for owner_id in "aabc"]
        await asyncio.sleep(0)
        assert not order
    await asyncio.gather(*burst, *others)
    assert order[:8] == ["burst", "a", "b", "c", "burst", "a", "burst", "burst"]
    assert len(order) == 104
    assert permits.free_count == 1


async def test_holders_never_exceed_the_count() -> None:
    permits = FairSemaphore(3)
    most = current = 0

    async def use() -> None:
        nonlocal most, current
        async with permits.hold("", 20):
            current += 1
            most = max(most, current)
            await asyncio.sleep(0)
            current -= 1

    await asyncio.gather(*(use() for _ in range(20)))
    assert (most, permits.free_count) == (3, 3)


async def test_acquire_timeout_raises_and_loses_no_permit() -> None:
    permits = FairSemaphore(1)
    async with permits.hold("a", 20):
        with pytest.raises(TimeoutError):
            async with permits.hold("b", 0.01):
                pytest.fail("a permit was granted that was not free")
    async with permits.hold("c", 0.01):
        pass


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
async def test_permit_granted_to_a_cancelled_waiter_is_passed_on(turns: int) -> None:
    permits = FairSemaphore(1)

    async def use() -> None:
        async with permits.hold("a", 20):
            await asyncio.sleep(0)

    async with permits.hold("holder", 20):
        leaving = asyncio.create_task(use())
        staying = asyncio.create_task(use())
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    leaving.cancel()
    async with asyncio.timeout(20):
        await staying
        await asyncio.wait([leaving])
    assert permits.free_count == 1
