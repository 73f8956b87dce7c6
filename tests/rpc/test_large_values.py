"""JSON values of many elements: they are limited, and their conversion does not hold the loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

import pytest
from buf.validate import validate_pb2
from chathistory.v1 import document_pb2, export_pb2, message_pb2
from google.protobuf.descriptor import Descriptor

from service.rpc import conversion_turns, convert, convert_documents, validation
from service.rpc.convert_structs import MAX_DEPTH, MAX_REQUEST_VALUES, MAX_VALUES
from service.rpc.servicer import DESCRIPTOR
from service.rpc.wire import delimited
from service.server import Server
from tests.support.chat import Chat, new_message
from tests.support.cluster import fetch
from tests.support.failures import assert_field_violations
from tests.support.servers import channel
from tests.support.turns import counted_turns


def data_message(value: Any, **fields: Any) -> message_pb2.Message:
    """Return a message with one part of data, whose only key is `k`."""
    return new_message("x", parts=[{"data": {"k": value}}], **fields)


def numbers(count: int) -> list[int]:
    return list(range(count))


def nested_arrays(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def nested_objects(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"k": value}
    return value


async def store_large_message(chat: Chat, database_url: str, value_count: int) -> tuple[str, str]:
    """Store a message with more values than the limit, as earlier versions accepted it.

    Returns:
        The ids of its session and of the message.
    """
    sent = data_message([])
    session_id = await chat.start([sent])
    parts = json.dumps([{"data": {"k": [None] * value_count}}])
    await fetch(
        database_url,
        "UPDATE chat_messages SET parts = $1::jsonb, size = $2 WHERE user_id = $3",
        parts,
        4 * value_count + 300,
        chat.user_id,
    )
    return session_id, sent.id


# --- Limits.


async def test_message_has_at_most_10000_values(chat: Chat) -> None:
    # The list itself is a value.
    sent = data_message(numbers(MAX_VALUES - 1))
    session_id = await chat.start([sent])
    assert (await chat.get(session_id, sent.id)).parts == sent.parts
    failure = await assert_field_violations(
        chat.append(session_id, [data_message(numbers(MAX_VALUES))]), "messages[0].parts[0].data"
    )
    assert str(MAX_VALUES) in failure.descriptions[0]
    await assert_field_violations(
        chat.update(session_id, sent.id, parts=[{"data": {"k": numbers(MAX_VALUES)}}]),
        "message.parts[0].data",
    )
    assert len(await chat.all(session_id)) == 1


async def test_values_of_all_parts_and_of_the_metadata_are_counted_together(chat: Chat) -> None:
    half = {"data": {"k": numbers(MAX_VALUES // 2 - 1)}}
    await chat.start([new_message("x", parts=[half, half])])
    await assert_field_violations(
        chat.start([new_message("x", parts=[half, half], metadata={"k": 1})]),
        "messages[0].metadata",
    )
    await assert_field_violations(
        chat.start([new_message("x", parts=[half, half, {"data": {"k": 1}}])]),
        "messages[0].parts[2].data",
    )


async def test_values_of_all_messages_of_a_request_are_limited(chat: Chat) -> None:
    largest = MAX_REQUEST_VALUES // MAX_VALUES
    messages = [data_message(numbers(MAX_VALUES - 1)) for _ in range(largest)]
    session_id = await chat.start(messages)
    failure = await assert_field_violations(
        chat.append(session_id, [*messages, data_message(1)]),
        f"messages[{largest}].parts[0].data",
    )
    assert str(MAX_REQUEST_VALUES) in failure.descriptions[0]
    assert len(await chat.all(session_id)) == largest


@pytest.mark.parametrize("nested", [nested_arrays, nested_objects])
async def test_struct_has_at_most_32_levels(chat: Chat, nested: Any) -> None:
    """Every reply that holds a struct of the maximum depth can be parsed."""
    deepest = nested(MAX_DEPTH - 1)
    sent = data_message(deepest, metadata={"k": deepest})
    session_id = await chat.start([sent])
    search = await chat.stub.SearchMessages(
        message_pb2.SearchMessagesRequest(user_id=chat.user_id, query="x")
    )
    request = export_pb2.ExportUserDataRequest(user_id=chat.user_id)
    exported = [item.message async for item in chat.stub.ExportUserData(request)]
    watch = chat.watch(session_id)
    replies = [
        await chat.get(session_id, sent.id),
        *await chat.all(session_id),
        *(await chat.context(session_id)).messages,
        search.hits[0].message,
        (await anext(aiter(watch))).message,
        next(message for message in exported if message.id),
    ]
    watch.cancel()
    assert len(replies) == 6
    for reply in replies:
        assert (reply.metadata, reply.parts) == (sent.metadata, sent.parts)
    deeper = nested(MAX_DEPTH) if nested is nested_arrays else nested_arrays(MAX_DEPTH)
    await assert_field_violations(
        chat.append(session_id, [data_message(deeper)]), "messages[0].parts[0].data"
    )
    await assert_field_violations(
        chat.append(session_id, [new_message("x", metadata={"k": deeper})]), "messages[0].metadata"
    )
    await assert_field_violations(
        chat.update_session(id=session_id, metadata={"k": deeper}), "session.metadata"
    )


def test_validation_does_not_visit_the_values_of_structs() -> None:
    """Otherwise it takes 4 µs for each value, and no rule applies to them."""
    visited: set[str] = set()
    structs: list[str] = []

    def visit(message: Descriptor) -> None:
        if message.full_name in visited:
            return
        visited.add(message.full_name)
        for field in message.fields:
            kind = field.message_type
            if kind is None:
                continue
            if kind.full_name == "google.protobuf.Struct":
                structs.append(field.full_name)
                rules = field.GetOptions().Extensions[validate_pb2.field]
                assert rules.ignore == validate_pb2.IGNORE_ALWAYS, field.full_name
            else:
                visit(kind)

    for method in DESCRIPTOR.methods:
        visit(method.input_type)
    assert len(structs) >= 5


# --- Turns of the loop.


async def test_conversions_of_one_request_leave_turns_to_other_tasks(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    new_row = convert.new_message

    def recorded(*args: Any) -> Any:
        turns.append(counter.count)
        return new_row(*args)

    monkeypatch.setattr(convert, "new_message", recorded)
    async with counted_turns() as counter:
        await chat.start([data_message(numbers(5_000)) for _ in range(6)])
    assert len(turns) == 6
    assert max(Counter(turns).values()) <= 2


async def test_conversions_of_many_parts_leave_turns_to_other_tasks(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    pause = conversion_turns.ConversionTurns.pause
    new_row = convert.new_message

    def recorded(*args: Any) -> Any:
        counts[-1] += len(args[0].parts)
        return new_row(*args)

    async def recorded_pause(*args: Any) -> None:
        counts.append(0)
        await pause(*args)

    monkeypatch.setattr(convert, "new_message", recorded)
    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded_pause)
    counts.append(0)
    await chat.start([new_message("x", parts=[{"text": "y"}] * 64) for _ in range(100)])
    assert sum(counts) == 6400
    assert max(counts) <= 500 + 64


async def test_large_conversions_of_many_calls_run_in_different_turns(
    chat: Chat, other: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [data_message(numbers(5_000)) for _ in range(3)]
    sessions = [(user, await user.start(sent)) for user in (chat, other)]
    turns: list[int] = []
    to_resource = convert.message

    def recorded(*args: Any) -> Any:
        turns.append(counter.count)
        return to_resource(*args)

    monkeypatch.setattr(convert, "message", recorded)
    async with counted_turns() as counter:
        calls: list[Any] = []
        for user, session_id in sessions:
            calls += [
                user.get(session_id, sent[0].id),
                user.page(session_id),
                user.context(session_id),
                user.append(session_id, [data_message(numbers(5_000))]),
            ]
        await asyncio.gather(*calls)
    # More if a read sees the message of the append.
    assert len(turns) >= 2 * (1 + 3 + 3)
    assert max(Counter(turns).values()) <= 2


async def test_lists_of_large_metadata_pause(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[str] = []
    pause = conversion_turns.ConversionTurns.pause

    async def recorded(turns: Any, owner_id: str, deadline: float) -> None:
        pauses.append(owner_id)
        await pause(turns, owner_id, deadline)

    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded)
    for _ in range(8):
        await chat.create_session(metadata={"k": [True] * 1_500})
    assert len((await chat.list_sessions()).sessions) == 8
    assert 6 <= len(pauses) <= 8
    assert set(pauses) == {chat.user_id}


async def test_pages_of_many_small_messages_pause(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[str] = []
    pause = conversion_turns.ConversionTurns.pause

    async def recorded(turns: Any, owner_id: str, deadline: float) -> None:
        pauses.append(owner_id)
        await pause(turns, owner_id, deadline)

    session_id = await chat.start([new_message("y") for _ in range(100)])
    for _ in range(5):
        await chat.append(session_id, [new_message("y") for _ in range(100)])
    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded)
    assert len((await chat.page(session_id, page_size=1000)).messages) == 600
    assert len((await chat.context(session_id, max_messages=1000)).messages) == 600
    assert pauses == [chat.user_id] * 4


async def test_small_conversions_wait_for_no_turn(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise AssertionError("a small conversion paused")

    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", fail)
    small = data_message(numbers(50), metadata={"k": "v"})
    session_id = await chat.start([small, *(new_message("y" * 1000) for _ in range(30))])
    assert len((await chat.page(session_id)).messages) == 31
    assert len((await chat.context(session_id)).messages) == 31
    await chat.update(session_id, small.id, content="z")
    await chat.update_session(id=session_id, metadata={"k": numbers(50)})
    assert len((await chat.list_sessions()).sessions) == 1


async def test_stored_message_above_the_limit_is_converted_in_a_thread(
    chat: Chat, server: Server, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id, message_id = await store_large_message(chat, database_url, 100_000)
    threads: list[int] = []
    to_resource = convert.message

    def recorded(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return to_resource(*args)

    monkeypatch.setattr(convert, "message", recorded)
    got = await chat.get(session_id, message_id)
    assert len(got.parts[0].data.fields["k"].list_value.values) == 100_000
    assert await chat.all(session_id) == [got]
    assert list((await chat.context(session_id)).messages) == [got]
    assert (await chat.update(session_id, message_id, feedback={"score": 1})).parts == got.parts
    request = export_pb2.ExportUserDataRequest(user_id=chat.user_id)
    assert [
        item.message.id
        async for item in chat.stub.ExportUserData(request)
        if item.HasField("message")
    ] == [message_id]
    assert threads
    assert threading.get_ident() not in threads


async def test_cancelled_call_keeps_its_turn_until_its_thread_has_ended() -> None:
    turns = conversion_turns.ConversionTurns()
    loop = asyncio.get_running_loop()
    started, finish = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert finish.wait(20)

    call = asyncio.create_task(turns._run_in_thread("a", loop.time() + 20, work))
    await asyncio.to_thread(started.wait, 20)
    call.cancel()
    waiting = asyncio.create_task(turns.pause("b", loop.time() + 20))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    finish.set()
    await waiting
    with pytest.raises(asyncio.CancelledError):
        await call


# --- Limits of a stored message.


async def test_update_checks_the_limit_of_the_whole_stored_message(chat: Chat) -> None:
    parts = [{"text": "x" * 250_000}] * 4
    sent = new_message("short", parts=parts)
    session_id = await chat.start([sent])
    failure = await assert_field_violations(
        chat.update(session_id, sent.id, content="y" * 200_000), "message"
    )
    assert "1048576" in failure.descriptions[0]
    assert (await chat.get(session_id, sent.id)).content == "short"
    # Smaller values of the same fields are accepted, and so are other fields.
    await chat.update(session_id, sent.id, ["feedback"], feedback={"score": 1})
    updated = await chat.update(session_id, sent.id, ["parts"], parts=parts[:3])
    assert len(updated.parts) == 3
    await chat.update(session_id, sent.id, content="y" * 200_000)


async def test_message_of_the_maximum_size_can_be_updated_to_the_same_size(chat: Chat) -> None:
    sent = new_message("y", parts=[{"text": "x" * 260_000}] * 4)
    sent.content = "y" * (1024 * 1024 - sent.ByteSize() - 3 + 1)
    assert 1024 * 1024 - 2 <= sent.ByteSize() <= 1024 * 1024
    session_id = await chat.start([sent])
    await chat.update(session_id, sent.id, content="z" * len(sent.content))
    await assert_field_violations(
        chat.update(session_id, sent.id, content="z" * (len(sent.content) + 10)), "message"
    )


# --- Requests of many elements.


async def test_large_request_with_an_invalid_element_names_one_violation(chat: Chat) -> None:
    """A violation takes longer than the validation of many elements."""
    parts = [message_pb2.Part() for _ in range(64)]
    messages = [new_message("x", parts=parts) for _ in range(100)]
    await assert_field_violations(chat.start(messages), "messages[0].parts[0].kind")


async def test_large_request_is_validated_in_different_turns(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    pause = conversion_turns.ConversionTurns.pause
    split = validation._split

    def recorded(request: Any) -> Any:
        for path, message in split(request):
            counts[-1] += len(getattr(message, "parts", ()))
            yield path, message

    async def recorded_pause(*args: Any) -> None:
        await pause(*args)
        counts.append(0)

    monkeypatch.setattr(validation, "_split", recorded)
    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded_pause)
    counts.append(0)
    await chat.start([new_message("x", parts=[{"text": "y"}] * 64) for _ in range(100)])
    assert sum(counts) == 6400
    # The message after which a pause is due has been yielded before it.
    assert counts[0] <= validation.FIRST_STEP_MESSAGES + 64
    assert max(counts) <= validation.STEP_MESSAGES + 64


async def test_vectors_are_converted_in_different_turns(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    pause = conversion_turns.ConversionTurns.pause
    new_chunk = convert_documents.new_chunk

    def recorded(chunk: Any) -> Any:
        sizes[-1] += len(chunk.vector)
        return new_chunk(chunk)

    async def recorded_pause(*args: Any) -> None:
        sizes.append(0)
        await pause(*args)

    monkeypatch.setattr(convert_documents, "new_chunk", recorded)
    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded_pause)
    sizes.append(0)
    chunks = [document_pb2.DocumentChunk(text="x", vector=[0.5] * 1_000) for _ in range(200)]
    request = document_pb2.CreateDocumentRequest(
        user_id=chat.user_id, document=document_pb2.Document(), chunks=chunks
    )
    assert (await chat.stub.CreateDocument(request)).document.chunk_count == 200
    assert sum(sizes) == 200_000
    assert max(sizes) <= 16 * 1024 + 1_000


async def test_messages_with_metadata_are_converted_in_different_turns(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    pause = conversion_turns.ConversionTurns.pause
    new_row = convert.new_message

    def recorded(*args: Any) -> Any:
        sizes[-1] += args[0].ByteSize()
        return new_row(*args)

    async def recorded_pause(*args: Any) -> None:
        sizes.append(0)
        await pause(*args)

    monkeypatch.setattr(convert, "new_message", recorded)
    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded_pause)
    sizes.append(0)
    await chat.start([new_message("x", metadata={"k": numbers(400)}) for _ in range(100)])
    assert sum(sizes) > 400_000
    assert max(sizes) <= 2 * conversion_turns.PAUSE_REQUEST_BYTES


async def test_request_with_few_large_elements_names_every_violation(chat: Chat) -> None:
    messages = [new_message("y" * 5000, author="z" * 300) for _ in range(3)]
    await assert_field_violations(
        chat.start(messages), *(f"messages[{index}].author" for index in range(3))
    )


async def test_millions_of_empty_messages_are_rejected_before_validation(
    server: Server,
) -> None:
    async with channel(server.address) as opened:
        unary: Any = opened.unary_unary
        call = unary("/chathistory.v1.ChatHistoryService/AppendMessages")
        await assert_field_violations(call(b"\x1a\x00" * 2_000_000), "messages")
        # A million empty parts in one message.
        await assert_field_violations(
            call(delimited(3, b"\x32\x00" * 500_000)), "messages[0].parts"
        )


async def test_slices_of_a_large_request_are_parsed_in_different_turns(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    pause = conversion_turns.ConversionTurns.pause

    async def recorded(*args: Any) -> None:
        await pause(*args)
        turns.append(counter.count)

    monkeypatch.setattr(conversion_turns.ConversionTurns, "pause", recorded)
    async with counted_turns() as counter:
        await chat.start([new_message("x" * 200_000) for _ in range(15)])
    # Each is parsed and converted in turns of its own.
    assert len(turns) >= 20
    assert max(Counter(turns).values()) <= 2
