"""The budget in bytes: which charges are rejected, and which reservations wait."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Overloaded
from service.rpc.byte_budget import ByteBudget


def charges(budget: ByteBudget, owner_id: str, n_bytes: int, connection: str = "") -> bool:
    try:
        budget.charge(owner_id, connection, n_bytes)
    except Overloaded as error:
        if error.retry_after:
            return False
        raise
    return True


def test_one_user_may_hold_the_limit_of_a_user_and_no_more() -> None:
    budget = ByteBudget(1000, per_user=300, per_connection=1000)
    assert sum(charges(budget, "flood", 10) for _ in range(100)) == 30
    assert charges(budget, "other", 300)
    assert budget.rejections == {"user": 70}


def test_one_connection_may_hold_its_limit_and_no_more() -> None:
    budget = ByteBudget(1000, per_user=300, per_connection=400)
    assert sum(charges(budget, f"{n}", 10, "one") for n in range(100)) == 40
    assert charges(budget, "other", 10, "two")
    assert charges(budget, "other", 10)
    assert budget.rejections == {"connection": 60}


def test_users_who_hold_little_are_admitted_after_others_filled_three_quarters() -> None:
    budget = ByteBudget(1000, per_user=400, per_connection=1000)
    assert sum(charges(budget, "flood", 5) for _ in range(1000)) == 80
    assert sum(charges(budget, "second", 5) for _ in range(1000)) == 70
    assert budget.held == 750
    assert budget.rejections["total"] == 930
    assert all(charges(budget, "other", 10) for _ in range(10))
    assert not charges(budget, "second", 5)


def test_many_users_with_a_charge_each_are_bounded_by_the_limit() -> None:
    budget = ByteBudget(1000, per_user=375, per_connection=1000)
    assert sum(charges(budget, f"{n}", 1) for n in range(2000)) == 1000
    assert budget.rejections == {"total": 1000}


def test_user_and_connection_close_to_their_limits_have_no_room() -> None:
    budget = ByteBudget(1000, per_user=160, per_connection=240)
    budget.charge("a", "one", 140)
    assert budget.held <= budget.unchecked_bytes
    budget.check_room("a", "one")
    budget.charge("a", "one", 1)
    assert budget.held > budget.unchecked_bytes
    with pytest.raises(Overloaded):
        budget.check_room("a", "two")
    budget.check_room("b", "one")
    budget.charge("b", "one", 70)
    with pytest.raises(Overloaded):
        budget.check_room("c", "one")
    budget.check_room("c", "two")
    assert budget.rejections == {"user": 1, "connection": 1}


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 40)),
        max_size=100,
    )
)
def test_counts_match_the_held_bytes_after_any_sequence(
    steps: list[tuple[bool, str, str, int]],
) -> None:
    budget = ByteBudget(100, per_user=60, per_connection=70)
    held: list[tuple[str, str, int]] = []
    for is_charge, owner_id, connection, n_bytes in steps:
        if is_charge and charges(budget, owner_id, n_bytes, connection):
            held.append((owner_id, connection, n_bytes))
        elif not is_charge and held:
            budget.release(*held.pop(0))
        users, connections = Counter[str](), Counter[str]()
        for one_owner_id, one_connection, size in held:
            users[one_owner_id] += size
            connections[one_connection] += size
        assert (budget._users, budget._connections) == (users, connections)
        assert budget.held == users.total() <= 100
        assert max(users.values(), default=0) <= 60
        assert max(connections.values(), default=0) <= 70


async def test_reservation_waits_until_bytes_are_released() -> None:
    budget = ByteBudget(100, per_user=100, per_connection=100)
    await budget.reserve("a", "", 50)
    waiting = asyncio.create_task(budget.reserve("b", "", 10))
    await asyncio.sleep(0)
    assert (budget.waiting_count, budget.held) == (1, 50)
    assert charges(budget, "b", 40), "calls are admitted while streams wait"
    budget.release("b", "", 40)
    assert not waiting.done()
    budget.release("a", "", 10)
    await waiting
    assert (budget.waiting_count, budget.held) == (0, 50)


async def test_reservations_are_granted_to_users_in_rotation() -> None:
    budget = ByteBudget(100, per_user=100, per_connection=100)
    await budget.reserve("a", "", 50)
    order: list[str] = []

    async def reserve(owner_id: str) -> None:
        await budget.reserve(owner_id, "", 50)
        order.append(owner_id)
        budget.release(owner_id, "", 50)

    async with asyncio.TaskGroup() as group:
        for owner_id in ("flood", "flood", "flood", "b", "c"):
            group.create_task(reserve(owner_id))
        await asyncio.sleep(0)
        budget.release("a", "", 50)
    assert order == ["flood", "b", "c", "flood", "flood"]
    assert (budget.held, budget._users) == (0, {})


async def test_waiting_user_does_not_keep_out_one_who_has_room() -> None:
    budget = ByteBudget(100, per_user=40, per_connection=100)
    await budget.reserve("a", "", 20)
    waiting = asyncio.create_task(budget.reserve("a", "", 1))
    await asyncio.sleep(0)
    await budget.reserve("b", "", 20)
    assert not waiting.done()
    budget.release("a", "", 20)
    await waiting


@pytest.mark.parametrize("is_granted", [False, True])
async def test_cancelled_reservation_holds_nothing(is_granted: bool) -> None:
    budget = ByteBudget(100, per_user=100, per_connection=100)
    await budget.reserve("a", "", 50)
    waiting = asyncio.create_task(budget.reserve("b", "", 50))
    await asyncio.sleep(0)
    if is_granted:
        budget.release("a", "", 50)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.held == (0 if is_granted else 50)
    assert (budget.waiting_count, set(budget._users)) == (0, set() if is_granted else {"a"})
