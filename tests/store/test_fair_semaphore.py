"""FairSemaphore: which owner gets the next permit, and that no permit is lost."""

from __future__ import annotations

import asyncio

import pytest

from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore, QueueFull


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


async def test_owner_at_its_limit_waits_although_permits_are_free() -> None:
    permits = FairSemaphore(3, max_held_per_owner=2)
    async with permits.hold("a", 20), permits.hold("a", 20):
        with pytest.raises(AcquireTimeout):
            async with permits.hold("a", 0.01):
                pytest.fail("the owner exceeded its limit")
        assert (permits.free_count, permits.waiting_count) == (1, 0)
        async with permits.hold("b", 0.01):
            pass
    assert permits.free_count == 3


@pytest.mark.parametrize("limits", [{"max_waiting": 2}, {"max_waiting_per_owner": 2}])
async def test_calls_beyond_the_queue_are_refused_without_a_wait(limits: dict[str, int]) -> None:
    permits = FairSemaphore(1, **limits)
    waiting: list[asyncio.Task[None]] = []

    async def use(owner_id: str) -> None:
        async with permits.hold(owner_id, 20):
            await asyncio.sleep(0)

    async with permits.hold("holder", 20):
        waiting += [asyncio.create_task(use("a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await use("a")
        if "max_waiting" in limits:
            with pytest.raises(QueueFull):
                await use("b")
        else:
            waiting.append(asyncio.create_task(use("b")))
            await asyncio.sleep(0)
        waiting.pop(0).cancel()
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(use("a")))
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await asyncio.gather(*waiting)
    assert (permits.free_count, permits.waiting_count) == (1, 0)
