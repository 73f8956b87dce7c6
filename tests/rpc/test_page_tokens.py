"""Page tokens: their key, and cursors that no list has made."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from chathistory.v1 import document_pb2, user_pb2

from service.ids import SYSTEM_USER_ID
from service.rpc.page_tokens import ListTokens
from service.server import Server
from tests.support.chat import Chat, new_id, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails
from tests.support.servers import connected, serving, settings

Page = Callable[[str], Awaitable[Any]]

NIL = SYSTEM_USER_ID
TIME = "1700000000000000"
WRONG_CURSORS = [
    "", " ", "abc", "-1", "+1", "1.0", "1e3", "0x10", "01", "1 ", " 1", "1\n", "1_000", "٣", "²",
    str(2**63), str(10**30), "9" * 700, "NULL", "nan", "\0", "1\x002", "語",
    NIL + "0", NIL[:-1], NIL.replace("0", "g"), NIL + " ", "{" + NIL + "}", NIL.replace("-", ""),
    f"{TIME} ", f"{TIME} abc", f"{TIME}  {NIL}", f"{TIME} {NIL} {NIL} {NIL}", f"abc {NIL}",
    f"{10**18} {NIL}", f"-{10**18 - 1} {NIL}", f"{2**63} {NIL}", f"{TIME} {NIL} abc",
    f"{10**18} {NIL} {NIL}", f"{TIME} {NIL.upper()}x {NIL}",
]  # fmt: skip


async def list_calls(chat: Chat) -> dict[str, tuple[tuple[object, ...], Page]]:
    """Return the key and a call of every list of a user with two entries in each."""
    session_id = await chat.start(new_messages(3))
    await chat.create_session()
    await Chat.of_new_user(chat.stub)
    user_id = chat.user_id
    documents = [
        await chat.stub.CreateDocument(
            document_pb2.CreateDocumentRequest(
                user_id=user_id,
                document=document_pb2.Document(title=f"d{number}"),
                chunks=[document_pb2.DocumentChunk(text=f"t{index}") for index in range(2)],
            )
        )
        for number in range(2)
    ]
    document_id = documents[0].document.id

    def users(token: str) -> Any:
        return chat.stub.ListUsers(user_pb2.ListUsersRequest(page_token=token, page_size=1))

    def listed_documents(token: str) -> Any:
        return chat.stub.ListDocuments(
            document_pb2.ListDocumentsRequest(user_id=user_id, page_token=token, page_size=1)
        )

    def chunks(token: str) -> Any:
        request = document_pb2.ListDocumentChunksRequest(
            user_id=user_id, document_id=document_id, page_token=token, page_size=1
        )
        return chat.stub.ListDocumentChunks(request)

    return {
        "users": (("ListUsers",), users),
        "sessions": (
            ("ListSessions", user_id, 0),
            lambda token: chat.list_sessions(page_token=token, page_size=1),
        ),
        "messages": (
            ("ListMessages", user_id, session_id, False),
            lambda token: chat.page(session_id, page_token=token, page_size=1),
        ),
        "documents": (("ListDocuments", user_id, NIL, 0, []), listed_documents),
        "chunks": (("ListDocumentChunks", user_id, NIL, document_id), chunks),
    }


async def key_of(server: Server, chat: Chat) -> bytes:
    """Return the key of a server's tokens, which a forger does not know."""
    await chat.list_sessions()
    (key,) = [tokens._key for tokens in _page_tokens if tokens._database is server.database]
    assert isinstance(key, bytes)
    return key


_page_tokens: list[Any] = []


@pytest.fixture(autouse=True)
def _recorded_page_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.rpc import page_tokens  # noqa: PLC0415

    initialize = page_tokens.PageTokens.__init__

    def recorded(self: Any, *args: Any) -> None:
        initialize(self, *args)
        _page_tokens.append(self)

    _page_tokens.clear()
    monkeypatch.setattr(page_tokens.PageTokens, "__init__", recorded)


async def test_cursor_of_another_type_is_rejected_in_every_list(server: Server, chat: Chat) -> None:
    """Even if it is signed with the right key."""
    key = await key_of(server, chat)
    for name, (list_key, page) in (await list_calls(chat)).items():
        tokens = ListTokens(key, list_key)
        token = (await page("")).next_page_token
        assert tokens.make(tokens.read(token, str) or "") == token, name
        for cursor in WRONG_CURSORS:
            if name == "documents" and cursor.count(" ") == 1:
                continue
            await assert_fails(page(tokens.make(cursor)), "BAD_PAGE_TOKEN")
        for payload in (b"\xff\xfe", b"\x80", "1".encode("utf-16")):
            await assert_fails(page(tokens._encode(payload)), "BAD_PAGE_TOKEN")
        await page(token)


async def test_every_cursor_is_either_accepted_or_a_bad_token(server: Server, chat: Chat) -> None:
    """Cursors of one list, signed for another, never end in INTERNAL."""
    key = await key_of(server, chat)
    calls = await list_calls(chat)
    cursors = ["0", "5", str(2**31 - 1), str(2**31), str(2**63 - 1), NIL, new_id()]
    cursors += [f"{time_us} {id_}" for time_us in (0, -1, TIME) for id_ in (NIL, new_id())]
    cursors += [f"{cursor} {NIL}" for cursor in cursors]
    for list_key, page in calls.values():
        for cursor in cursors:
            try:
                await page(ListTokens(key, list_key).make(cursor))
            except Exception:  # noqa: BLE001 - any other status fails the test
                await assert_fails(page(ListTokens(key, list_key).make(cursor)), "BAD_PAGE_TOKEN")


def former_token(cursor: bytes, list_key: tuple[object, ...]) -> str:
    """Return a token with the key that earlier versions had in their code."""
    list_bytes = "\0".join(map(str, list_key)).encode()
    digest = hashlib.blake2b(
        cursor + b"\0" + list_bytes, digest_size=8, key=b"chathistory.v1 page token"
    ).digest()
    return base64.urlsafe_b64encode(digest + cursor).decode().rstrip("=")


async def test_token_forged_with_the_public_key_is_rejected(chat: Chat) -> None:
    for list_key, page in (await list_calls(chat)).values():
        for cursor in (b"1", b"abc", b"\xff", NIL.encode(), f"{TIME} {NIL}".encode()):
            await assert_fails(page(former_token(cursor, list_key)), "BAD_PAGE_TOKEN")


async def test_tokens_are_valid_on_every_replica_and_after_a_restart(database_url: str) -> None:
    async with serving(database_url) as first, connected(first.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(3))
        token = (await chat.page(session_id, page_size=2)).next_page_token
        async with serving(database_url) as second, connected(second.address) as other_stub:
            replica = Chat(other_stub, chat.user_id)
            assert (await replica.page(session_id, page_token=token)).messages[0].seq == 3
    async with serving(database_url) as server, connected(server.address) as stub:
        restarted = Chat(stub, chat.user_id)
        assert (await restarted.page(session_id, page_token=token)).messages[0].seq == 3


async def test_tokens_of_another_deployment_or_key_are_rejected(database_url: str) -> None:
    async def token_of(**values: Any) -> str:
        async with serving(database_url, **values) as server, connected(server.address) as stub:
            chat = Chat(stub, user_id)
            reply = await chat.page(session_id, page_size=2)
            for token in tokens:
                call = chat.page(session_id, page_token=token)
                await assert_fails(call, "BAD_PAGE_TOKEN")
            return reply.next_page_token

    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        user_id, session_id = chat.user_id, await chat.start(new_messages(3))
    tokens: list[str] = []
    tokens.append(await token_of())
    tokens.append(await token_of(page_token_key="a key of 16 chars"))
    tokens.append(await token_of(page_token_key="another key of 24 chars."))
    await fetch(
        database_url,
        "UPDATE users SET created_at = created_at + interval '1 microsecond' WHERE id = $1",
        NIL,
    )
    tokens.append(await token_of())
    assert len(set(tokens)) == 4


def test_short_key_is_rejected_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="at least 16") as caught:
        settings(page_token_key="too short")
    assert "too short" not in str(caught.value)
    assert "secret" not in repr(settings(page_token_key="a secret of 16 chars"))
