"""Users: created once, unique by email and external id, updated with their etag, deleted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from chathistory.v1 import user_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import aio

from service.errors import AlreadyExists
from service.ids import SYSTEM_USER_ID
from service.server import Server
from service.store import importing, slices
from service.store.db.database import NO_OWNER
from tests.support.chat import Chat, new_id, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations, read_failure
from tests.support.servers import AsyncStub, connected, serving


async def create(stub: AsyncStub, **fields: Any) -> user_pb2.User:
    return (await stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(**fields)))).user


async def get(stub: AsyncStub, **key: str) -> user_pb2.User:
    return (await stub.GetUser(user_pb2.GetUserRequest(**key))).user


async def update(stub: AsyncStub, mask: tuple[str, ...] = (), **fields: Any) -> user_pb2.User:
    request = user_pb2.UpdateUserRequest(
        user=user_pb2.User(**fields), update_mask=FieldMask(paths=mask)
    )
    return (await stub.UpdateUser(request)).user


async def delete(stub: AsyncStub, user_id: str, **fields: Any) -> user_pb2.DeleteUserResponse:
    return await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=user_id, **fields))


async def list_ids(stub: AsyncStub, page_size: int = 0) -> list[str]:
    ids: list[str] = []
    token, seen = "", set[str]()
    while True:
        assert token not in seen, "a page token is repeated"
        seen.add(token)
        reply = await stub.ListUsers(
            user_pb2.ListUsersRequest(page_size=page_size, page_token=token)
        )
        ids += [user.id for user in reply.users]
        token = reply.next_page_token
        if not token:
            return ids


async def test_created_user_is_returned_as_sent(stub: AsyncStub) -> None:
    created = await create(
        stub,
        external_id="crm-7",
        email="Ada@Example.com",
        name="Ada",
        metadata={"plan": "pro", "tags": ["a", None, 1.5]},
    )
    assert (created.external_id, created.email, created.name) == ("crm-7", "Ada@Example.com", "Ada")
    assert dict(created.metadata)["plan"] == "pro"
    assert created.create_time.ToMicroseconds() > 0
    assert created.etag
    assert await get(stub, user_id=created.id) == created


async def test_server_ids_are_version_7_and_sort_by_time(stub: AsyncStub) -> None:
    ids = [(await create(stub)).id for _ in range(3)]
    assert [id_[14] for id_ in ids] == ["7", "7", "7"]
    assert ids == sorted(ids)


async def test_output_only_fields_in_a_request_are_ignored(stub: AsyncStub) -> None:
    created = await create(
        stub, id=new_id(), etag="mine", create_time={"seconds": 1}, update_time={"seconds": 1}
    )
    assert created.etag != "mine"
    assert created.create_time.seconds > 1


async def test_retry_of_create_returns_the_user(stub: AsyncStub) -> None:
    sent: dict[str, Any] = {
        "id": new_id(),
        "email": "a@example.com",
        "external_id": "x",
        "name": "A",
        "metadata": {"k": 1},
    }
    first = await create(stub, **sent)
    assert await create(stub, **sent) == first
    assert await create(stub, **sent | {"id": sent["id"].upper()}) == first
    assert await list_ids(stub) == [sent["id"]]


async def test_retry_of_create_ignores_output_only_fields(stub: AsyncStub) -> None:
    first = await create(stub, id=new_id(), name="A")
    again = await stub.CreateUser(user_pb2.CreateUserRequest(user=first))
    assert again.user == first


async def test_retry_of_create_returns_the_current_user(stub: AsyncStub) -> None:
    sent = {"id": new_id(), "name": "before"}
    await create(stub, **sent)
    changed = await update(stub, id=sent["id"], name="after")
    assert await create(stub, **sent) == changed


@pytest.mark.parametrize(
    "change",
    [{"name": "B"}, {"email": "b@example.com"}, {"metadata": {"k": 2}}, {"external_id": "y"}],
)
async def test_create_with_the_same_id_and_other_content_fails(
    stub: AsyncStub, change: dict[str, Any]
) -> None:
    sent: dict[str, Any] = {
        "id": new_id(),
        "email": "a@example.com",
        "name": "A",
        "metadata": {"k": 1},
    }
    await create(stub, **sent)
    await assert_fails(create(stub, **sent | change), "ID_TAKEN", user_id=sent["id"])


async def test_concurrent_equal_creates_create_one_user(stub: AsyncStub) -> None:
    sent = {"id": new_id(), "email": "a@example.com", "external_id": "x"}
    created = await asyncio.gather(*(create(stub, **sent) for _ in range(20)))
    assert len({user.SerializeToString(deterministic=True) for user in created}) == 1
    assert await list_ids(stub) == [sent["id"]]


@pytest.mark.parametrize("key", ["id", "email", "external_id"])
async def test_concurrent_equal_creates_through_two_replicas_return_the_user(
    stub: AsyncStub, database_url: str, key: str
) -> None:
    """Only `id` makes a create repeatable; the other unique values must not disturb that."""
    async with serving(database_url) as replica, connected(replica.address) as other_stub:
        for number in range(25):
            sent = {
                "id": new_id(),
                "email": f"user-{number}@example.com",
                "external_id": f"x-{number}",
            }
            stubs = (stub, other_stub) * 6
            created = await asyncio.gather(*(create(stub, **sent) for stub in stubs))
            assert len({user.SerializeToString(deterministic=True) for user in created}) == 1
            changed = sent | {key: new_id() if key == "id" else f"other.{sent[key]}"}
            reason = "EMAIL_TAKEN" if key == "id" else "ID_TAKEN"
            await assert_fails(create(other_stub, **changed), reason)


async def test_one_of_many_concurrent_users_gets_an_email(stub: AsyncStub) -> None:
    """Creates and updates that race for an address: one wins, and the others fail."""
    existing = [await create(stub, name=str(number)) for number in range(4)]
    for number in range(10):
        email = f"wanted-{number}@example.com"
        results = await asyncio.gather(
            *(create(stub, email=email) for _ in range(4)),
            *(update(stub, id=user.id, email=email.upper()) for user in existing),
            return_exceptions=True,
        )
        failures = [read_failure(it) for it in results if isinstance(it, aio.AioRpcError)]
        assert [failure.reason for failure in failures] == ["EMAIL_TAKEN"] * 7
        holder = await get(stub, email=email)
        assert [user for user in results if isinstance(user, user_pb2.User)] == [holder]


async def test_users_that_swap_unique_values_keep_them(stub: AsyncStub) -> None:
    first = await create(stub, email="a@example.com", external_id="a")
    second = await create(stub, email="b@example.com", external_id="b")
    for _ in range(10):
        results = await asyncio.gather(
            update(stub, id=first.id, email="b@example.com", external_id="b"),
            update(stub, id=second.id, email="a@example.com", external_id="a"),
            return_exceptions=True,
        )
        for result in results:
            assert isinstance(result, aio.AioRpcError)
            assert read_failure(result).reason == "EMAIL_TAKEN"
    assert await get(stub, user_id=first.id) == first
    assert await get(stub, user_id=second.id) == second
    assert await list_ids(stub) == sorted([first.id, second.id])


async def test_email_can_change_its_case_and_be_written_again(stub: AsyncStub) -> None:
    created = await create(stub, email="ada@example.com", external_id="x", name="Ada")
    again = await update(stub, id=created.id, email="ada@example.com", external_id="x", name="B")
    assert (again.email, again.external_id, again.name) == ("ada@example.com", "x", "B")
    changed = await update(stub, id=created.id, email="Ada@Example.com", external_id="y")
    assert (changed.email, changed.external_id) == ("Ada@Example.com", "y")
    assert await list_ids(stub) == [created.id]


async def test_email_is_unique_ignoring_case(stub: AsyncStub) -> None:
    await create(stub, email="ada@example.com")
    await assert_fails(create(stub, email="ADA@Example.COM"), "EMAIL_TAKEN")
    other = await create(stub, email="bob@example.com")
    await assert_fails(update(stub, id=other.id, email="Ada@example.com"), "EMAIL_TAKEN")
    assert (await get(stub, user_id=other.id)).email == "bob@example.com"


async def test_external_id_is_unique_respecting_case(stub: AsyncStub) -> None:
    await create(stub, external_id="crm-1")
    await create(stub, external_id="CRM-1")
    await assert_fails(create(stub, external_id="crm-1"), "EXTERNAL_ID_TAKEN")
    other = await create(stub)
    await assert_fails(update(stub, id=other.id, external_id="crm-1"), "EXTERNAL_ID_TAKEN")


async def test_email_and_external_id_may_be_empty_for_many_users(
    stub: AsyncStub,
) -> None:
    created = [await create(stub, name="anonymous") for _ in range(3)]
    first, second, _ = created
    await update(stub, ("email", "external_id"), id=first.id)
    await update(stub, ("email", "external_id"), id=second.id)
    assert len(await list_ids(stub)) == 3


async def test_unique_values_can_be_reused_after_they_are_cleared(stub: AsyncStub) -> None:
    first = await create(stub, email="ada@example.com", external_id="x")
    await update(stub, ("email", "external_id"), id=first.id)
    second = await create(stub, email="ada@example.com", external_id="x")
    await delete(stub, second.id)
    await update(stub, id=first.id, email="ada@example.com", external_id="x")


async def test_user_is_found_by_id_email_and_external_id(stub: AsyncStub) -> None:
    created = await create(stub, email="Ada@Example.com", external_id="crm 7/ü")
    assert await get(stub, user_id=created.id.upper()) == created
    assert await get(stub, email="aDA@eXAMPLE.com") == created
    assert await get(stub, external_id="crm 7/ü") == created


async def test_missing_user_is_not_found_by_any_key(stub: AsyncStub) -> None:
    missing = new_id()
    await assert_fails(get(stub, user_id=missing), "USER_NOT_FOUND", user_id=missing)
    await assert_fails(get(stub, email="nobody@example.com"), "USER_NOT_FOUND")
    await assert_fails(get(stub, external_id="nobody"), "USER_NOT_FOUND")
    await assert_fails(update(stub, id=missing, name="x"), "USER_NOT_FOUND", user_id=missing)
    await assert_fails(delete(stub, missing), "USER_NOT_FOUND", user_id=missing)


async def test_get_user_by_a_service_requires_a_key(stub: AsyncStub) -> None:
    await assert_field_violations(get(stub), "user_id")
    await assert_field_violations(get(stub, email=""), "user_id")
    await assert_field_violations(get(stub, external_id=""), "user_id")
    await assert_field_violations(update(stub, name="x"), "user_id")


async def test_system_user_cannot_be_read_or_changed(stub: AsyncStub) -> None:
    await assert_field_violations(create(stub, id=SYSTEM_USER_ID), "user.id")
    await assert_field_violations(get(stub, user_id=SYSTEM_USER_ID), "user_id")
    await assert_field_violations(update(stub, id=SYSTEM_USER_ID, name="x"), "user_id")
    await assert_field_violations(delete(stub, SYSTEM_USER_ID), "user_id")
    assert await list_ids(stub) == []


async def test_system_user_cannot_be_imported(server: Server) -> None:
    values = {"id": SYSTEM_USER_ID, "name": "x", "fingerprint": b"1"}
    with pytest.raises(AlreadyExists, match="id"):
        await server.database.write(
            lambda connection: importing.import_user(connection, values),
            owner_id=NO_OWNER,
            deadline=asyncio.get_running_loop().time() + 30,
        )


async def test_users_are_listed_once_in_order_of_id(stub: AsyncStub) -> None:
    created = sorted(
        (await asyncio.gather(*(create(stub, name=str(n)) for n in range(7)))),
        key=lambda user: user.id,
    )
    for page_size in (1, 2, 3, 7, 0):
        assert await list_ids(stub, page_size) == [user.id for user in created]
    page = await stub.ListUsers(user_pb2.ListUsersRequest(page_size=2))
    assert list(page.users) == created[:2]


async def test_empty_mask_writes_every_field_that_is_set(stub: AsyncStub) -> None:
    created = await create(
        stub, email="a@example.com", external_id="x", name="A", metadata={"k": 1}
    )
    changed = await update(stub, id=created.id, name="B", metadata={"k": 2})
    assert (changed.name, changed.metadata["k"]) == ("B", 2)
    assert (changed.email, changed.external_id) == ("a@example.com", "x")
    assert await get(stub, user_id=created.id) == changed


async def test_mask_writes_only_its_fields_and_clears_empty_ones(stub: AsyncStub) -> None:
    created = await create(
        stub, email="a@example.com", external_id="x", name="A", metadata={"k": 1}
    )
    changed = await update(stub, ("email", "metadata"), id=created.id, name="ignored")
    assert (changed.name, changed.external_id) == ("A", "x")
    assert changed.email == ""
    assert not changed.HasField("metadata")


@pytest.mark.parametrize(
    "path", ["id", "create_time", "update_time", "etag", "nonsense", "metadata.k", "*", ""]
)
async def test_mask_with_an_unwritable_field_is_rejected(stub: AsyncStub, path: str) -> None:
    created = await create(stub)
    await assert_field_violations(
        update(stub, ("name", path), id=created.id, name="B"), "update_mask"
    )
    assert await get(stub, user_id=created.id) == created


async def test_every_unwritable_path_of_a_mask_is_reported(stub: AsyncStub) -> None:
    created = await create(stub)
    failure = await assert_field_violations(
        update(stub, ("id", "nope"), id=created.id), "update_mask"
    )
    assert "'id'" in failure.descriptions[0]
    assert "'nope'" in failure.descriptions[0]


async def test_update_takes_the_user_id_from_request_or_resource(stub: AsyncStub) -> None:
    created = await create(stub)
    for request in (
        user_pb2.UpdateUserRequest(user_id=created.id, user=user_pb2.User(name="a")),
        user_pb2.UpdateUserRequest(
            user_id=created.id, user=user_pb2.User(id=created.id.upper(), name="b")
        ),
        user_pb2.UpdateUserRequest(user=user_pb2.User(id=created.id, name="c")),
    ):
        assert (await stub.UpdateUser(request)).user.name == request.user.name
    both = user_pb2.UpdateUserRequest(user_id=created.id, user=user_pb2.User(id=new_id(), name="d"))
    await assert_field_violations(stub.UpdateUser(both), "user.id")


async def test_update_with_stale_etag_is_aborted(
    stub: AsyncStub,
) -> None:
    created = await create(stub, name="A")
    second = await update(stub, id=created.id, name="B", etag=created.etag)
    assert second.etag != created.etag
    assert second.update_time.ToMicroseconds() >= created.update_time.ToMicroseconds()
    failure = await assert_fails(
        update(stub, id=created.id, name="C", etag=created.etag), "ETAG_MISMATCH"
    )
    assert failure.metadata["etag"] == second.etag
    assert (await get(stub, user_id=created.id)) == second
    third = await update(stub, id=created.id, name="C")
    assert third.etag not in (created.etag, second.etag)


async def test_one_of_concurrent_updates_with_one_etag_succeeds(stub: AsyncStub) -> None:
    created = await create(stub)
    results = await asyncio.gather(
        *(update(stub, id=created.id, name=f"{n}", etag=created.etag) for n in range(8)),
        return_exceptions=True,
    )
    won = [result for result in results if isinstance(result, user_pb2.User)]
    assert len(won) == 1
    assert (await get(stub, user_id=created.id)) == won[0]


async def test_etag_of_a_deleted_user_does_not_match_its_successor(
    stub: AsyncStub,
) -> None:
    first = await create(stub, id=new_id())
    await delete(stub, first.id)
    await create(stub, id=first.id)
    await assert_fails(update(stub, id=first.id, name="x", etag=first.etag), "ETAG_MISMATCH")


async def test_update_without_fields_changes_nothing(stub: AsyncStub) -> None:
    created = await create(stub, name="A")
    assert await update(stub, id=created.id) == created


async def rows_of(url: str, user_id: str) -> list[int]:
    tables = {"users": "id", "chat_sessions": "user_id", "chat_messages": "user_id"}
    return [
        (await fetch(url, f"SELECT count(*) FROM {t} WHERE {c} = $1", user_id))[0][0]
        for t, c in tables.items()
    ]


async def test_deletion_of_a_user_deletes_its_data_only(
    chat: Chat, other: Chat, database_url: str
) -> None:
    for user_chat in (chat, other):
        first = await user_chat.start(new_messages(5))
        await user_chat.start(new_messages(3))
        await user_chat.create_session()
        await user_chat.delete(first, (await user_chat.all(first))[0].id)
    counts = await delete(chat.stub, chat.user_id)
    # A message that was deleted before is not counted again.
    assert (counts.session_count, counts.message_count) == (3, 7)
    assert (counts.document_count, counts.chunk_count, counts.vector_count) == (0, 0, 0)
    assert await rows_of(database_url, chat.user_id) == [0, 0, 0]
    assert await rows_of(database_url, other.user_id) == [1, 3, 8]
    await assert_fails(get(chat.stub, user_id=chat.user_id), "USER_NOT_FOUND")
    await assert_fails(delete(chat.stub, chat.user_id), "USER_NOT_FOUND")
    assert (
        await delete(chat.stub, chat.user_id, allow_missing=True) == user_pb2.DeleteUserResponse()
    )


async def test_large_user_is_deleted_in_slices(
    chat: Chat, other: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MESSAGES_PER_DELETE", 7)
    kept = await other.start(new_messages(30))
    long = await chat.start(new_messages(25))
    await chat.start(new_messages(6))
    for message in (await chat.all(long))[:3]:
        await chat.delete(long, message.id)
    counts = await delete(chat.stub, chat.user_id)
    assert (counts.session_count, counts.message_count) == (2, 28)
    assert await rows_of(database_url, chat.user_id) == [0, 0, 0]
    assert len(await other.all(kept)) == 30


async def test_no_data_can_be_added_to_a_deleted_user(chat: Chat, server: Server) -> None:
    session_id = await chat.start([sent := new_message("hello")])
    await delete(chat.stub, chat.user_id)
    for call in (
        chat.append(session_id, [sent]),
        chat.get_session(session_id),
        chat.all(session_id),
        chat.context(session_id),
    ):
        await assert_fails(call, "SESSION_NOT_FOUND")
    await assert_fails(chat.append("", [sent]), "USER_NOT_FOUND", user_id=chat.user_id)
    await assert_fails(chat.append(session_id, [sent], create_if_missing=True), "USER_NOT_FOUND")
    await assert_fails(chat.create_session(), "USER_NOT_FOUND")
    assert (await chat.list_sessions()).sessions == []
