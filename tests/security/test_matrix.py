"""The outcome of every RPC for every caller and every owner of the ids.

An RPC without rows fails the test.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import pytest
from chathistory.v1 import document_pb2, export_pb2, message_pb2, search_pb2, session_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2 import DESCRIPTOR
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import aio
from grpc.aio import EOF  # type: ignore[attr-defined]

from tests.support import issuer
from tests.support.chat import new_id
from tests.support.failures import Failure, read_failure
from tests.support.issuer import bearer_metadata, service_token, token
from tests.support.servers import AsyncStub, connected, serving

SERVICE = DESCRIPTOR.services_by_name["ChatHistoryService"]
RPCS = [method.name for method in SERVICE.methods]
SHOWN = bearer_metadata(service_token())
NIL = "00000000-0000-0000-0000-000000000000"


class Things(NamedTuple):
    """A user and the ids of its resources."""

    user: str
    session: str
    message: str
    document: str
    external_id: str
    email: str


def random_things() -> Things:
    return Things(new_id(), new_id(), new_id(), new_id(), new_id(), f"{new_id()}@example.com")


async def make_things(stub: AsyncStub) -> Things:
    things = random_things()
    user = user_pb2.User(id=things.user, external_id=things.external_id, email=things.email)
    await stub.CreateUser(user_pb2.CreateUserRequest(user=user), metadata=SHOWN)
    message = message_pb2.Message(
        id=things.message, role=message_pb2.ROLE_USER, content=f"mine {things.user}"
    )
    append = message_pb2.AppendMessagesRequest(
        user_id=things.user, session_id=things.session, messages=[message], create_if_missing=True
    )
    await stub.AppendMessages(append, metadata=SHOWN)
    create = document_pb2.CreateDocumentRequest(
        user_id=things.user, document=document_pb2.Document(id=things.document)
    )
    create.chunks.add(text=f"mine too {things.user}")
    await stub.CreateDocument(create, metadata=SHOWN)
    return things


# The outcome of a call: OK, or the reason of its failure.
OK, MISMATCH, SERVICE_ONLY, VIOLATION = "OK", "USER_MISMATCH", "SERVICE_ONLY", "FIELD_VIOLATION"
NO_USER, NO_SESSION, NO_MESSAGE, NO_DOCUMENT = (
    f"{what}_NOT_FOUND" for what in ("USER", "SESSION", "MESSAGE", "DOCUMENT")
)


class Row(NamedTuple):
    """How to call an RPC, and its expected outcomes."""

    request: Callable[[str, Things], Any]
    """Creates the request, given its `user_id` and the resources to name."""
    missing: str = OK
    """For a permitted user and a resource of another user, or none; OK if none is named."""
    no_user: str = ""
    """For a service that names a user who does not exist; by default as `missing`."""
    service_only: bool = False
    unnamed: str = VIOLATION
    """For a service that names no user."""


def _append(user: str, t: Things, **more: Any) -> Any:
    message = message_pb2.Message(role=message_pb2.ROLE_USER, content="again")
    return message_pb2.AppendMessagesRequest(
        user_id=user, session_id=t.session, messages=[message], **more
    )


ROWS: dict[str, Row] = {
    "CreateUser": Row(
        lambda u, _t: user_pb2.CreateUserRequest(user=user_pb2.User(name=u)),
        service_only=True,
        unnamed=OK,
    ),
    "GetUser": Row(
        lambda u, _t: user_pb2.GetUserRequest(user_id=u) if u else user_pb2.GetUserRequest(),
        no_user=NO_USER,
    ),
    "ListUsers": Row(lambda _u, _t: user_pb2.ListUsersRequest(), service_only=True, unnamed=OK),
    "UpdateUser": Row(
        lambda u, _t: user_pb2.UpdateUserRequest(user_id=u, user=user_pb2.User(name="new")),
        no_user=NO_USER,
    ),
    "DeleteUser": Row(
        lambda u, _t: user_pb2.DeleteUserRequest(user_id=u), no_user=NO_USER, service_only=True
    ),
    "ExportUserData": Row(
        lambda u, _t: export_pb2.ExportUserDataRequest(user_id=u), no_user=NO_USER
    ),
    "CreateSession": Row(
        lambda u, _t: session_pb2.CreateSessionRequest(user_id=u), no_user=NO_USER
    ),
    "GetSession": Row(
        lambda u, t: session_pb2.GetSessionRequest(user_id=u, session_id=t.session), NO_SESSION
    ),
    "ListSessions": Row(lambda u, _t: session_pb2.ListSessionsRequest(user_id=u)),
    "UpdateSession": Row(
        lambda u, t: session_pb2.UpdateSessionRequest(
            user_id=u, session=session_pb2.Session(id=t.session, title="new")
        ),
        NO_SESSION,
    ),
    "DeleteSession": Row(
        lambda u, t: session_pb2.DeleteSessionRequest(user_id=u, session_id=t.session), NO_SESSION
    ),
    "ForkSession": Row(
        lambda u, t: session_pb2.ForkSessionRequest(user_id=u, session_id=t.session, through_seq=1),
        NO_SESSION,
    ),
    "AppendMessages": Row(_append, NO_SESSION),
    "GetMessage": Row(
        lambda u, t: message_pb2.GetMessageRequest(
            user_id=u, session_id=t.session, message_id=t.message
        ),
        NO_SESSION,
    ),
    "ListMessages": Row(
        lambda u, t: message_pb2.ListMessagesRequest(user_id=u, session_id=t.session), NO_SESSION
    ),
    "UpdateMessage": Row(
        lambda u, t: message_pb2.UpdateMessageRequest(
            user_id=u,
            session_id=t.session,
            message=message_pb2.Message(id=t.message, content="new"),
        ),
        NO_SESSION,
    ),
    "DeleteMessage": Row(
        lambda u, t: message_pb2.DeleteMessageRequest(
            user_id=u, session_id=t.session, message_id=t.message
        ),
        NO_SESSION,
    ),
    "GetContext": Row(
        lambda u, t: message_pb2.GetContextRequest(user_id=u, session_id=t.session), NO_SESSION
    ),
    "WatchMessages": Row(
        lambda u, t: message_pb2.WatchMessagesRequest(user_id=u, session_id=t.session), NO_SESSION
    ),
    "SearchMessages": Row(
        lambda u, t: message_pb2.SearchMessagesRequest(
            user_id=u, session_id=t.session, query="mine"
        )
    ),
    "CreateDocument": Row(
        lambda u, _t: document_pb2.CreateDocumentRequest(
            user_id=u, document=document_pb2.Document(title="x")
        ),
        no_user=NO_USER,
    ),
    "AppendDocumentChunks": Row(
        lambda u, t: document_pb2.AppendDocumentChunksRequest(
            user_id=u,
            document_id=t.document,
            first_index=1,
            chunks=[document_pb2.DocumentChunk(text="x")],
        ),
        NO_DOCUMENT,
        unnamed=NO_DOCUMENT,
    ),
    "GetDocument": Row(
        lambda u, t: document_pb2.GetDocumentRequest(user_id=u, document_id=t.document),
        NO_DOCUMENT,
        unnamed=NO_DOCUMENT,
    ),
    "ListDocuments": Row(lambda u, _t: document_pb2.ListDocumentsRequest(user_id=u), unnamed=OK),
    "UpdateDocument": Row(
        lambda u, t: document_pb2.UpdateDocumentRequest(
            user_id=u, document=document_pb2.Document(id=t.document, title="new")
        ),
        NO_DOCUMENT,
        unnamed=NO_DOCUMENT,
    ),
    "DeleteDocument": Row(
        lambda u, t: document_pb2.DeleteDocumentRequest(user_id=u, document_id=t.document),
        NO_DOCUMENT,
        unnamed=NO_DOCUMENT,
    ),
    "ListDocumentChunks": Row(
        lambda u, t: document_pb2.ListDocumentChunksRequest(user_id=u, document_id=t.document),
        NO_DOCUMENT,
        unnamed=NO_DOCUMENT,
    ),
    # Search is disabled in these tests.
    "SearchDocuments": Row(
        lambda u, t: document_pb2.SearchDocumentsRequest(
            user_id=u, query="x", document_ids=[t.document]
        ),
        unnamed="SEARCH_DISABLED",
    ),
    "RebuildSearchIndex": Row(
        lambda _u, _t: search_pb2.RebuildSearchIndexRequest(), service_only=True
    ),
}
ALLOWED = {"SearchDocuments": "SEARCH_DISABLED", "RebuildSearchIndex": "SEARCH_DISABLED"}
"""The outcome instead of OK, for RPCs that are disabled in these tests."""
WITHOUT_USER_ID = {"CreateUser", "ListUsers", "RebuildSearchIndex"}


class Case(NamedTuple):
    """The user named in a request, and the owner of the resources named in it."""

    user: str
    things: str


# "A" and "B" are users; "" names none, which means the caller; "?" is a user who does not exist.
CASES = [Case(u, t) for u in ("A", "B", "", "?") for t in ("A", "B", "?")]


def expected(rpc: str, caller: str, case: Case) -> str:
    """Return the outcome of a call that the rules for callers require."""
    row = ROWS[rpc]
    allowed = ALLOWED.get(rpc, OK)
    if caller != "service":
        if row.service_only:
            return SERVICE_ONLY
        if case.user not in ("", caller):
            return MISMATCH
        return allowed if case.things == caller or row.missing == OK else row.missing
    if rpc in WITHOUT_USER_ID:
        return allowed
    if not case.user:
        return row.unnamed
    if case.user == "?":
        return row.no_user or (allowed if row.missing == OK else row.missing)
    return allowed if case.things == case.user or row.missing == OK else row.missing


@asynccontextmanager
async def service(database_url: str) -> AsyncGenerator[AsyncStub]:
    values = {
        "auth": "jwt",
        "jwt_key": issuer.SECRET,
        "jwt_issuer": issuer.ISSUER,
        "jwt_audience": issuer.AUDIENCE,
    }
    async with serving(database_url, **values) as server, connected(server.address) as stub:
        yield stub


async def ask(
    stub: AsyncStub, rpc: str, request: Any, shown: list[tuple[str, str]]
) -> Failure | None:
    """Call an RPC and return its failure, if any; only the first reply of a stream is read."""
    call = getattr(stub, rpc)(request, metadata=shown, timeout=20)
    try:
        if isinstance(call, Awaitable):
            await call
        else:
            await call.read()
    except aio.AioRpcError as error:
        return read_failure(error)
    finally:
        call.cancel()
    return None


@pytest.mark.quick
def test_every_rpc_has_a_row() -> None:
    assert set(ROWS) == set(RPCS)


@pytest.mark.quick
def test_every_request_has_user_id_as_its_first_field() -> None:
    for method in SERVICE.methods:
        if method.name not in WITHOUT_USER_ID:
            field = method.input_type.fields_by_name["user_id"]
            assert field.number == 1
            assert field.type == field.TYPE_STRING


@pytest.mark.case(n=21)
@pytest.mark.parametrize("rpc", RPCS)
async def test_call_without_a_valid_token_is_unauthenticated(database_url: str, rpc: str) -> None:
    async with service(database_url) as stub:
        mine = await make_things(stub)
        answers = set()
        requests = [
            ROWS[rpc].request(mine.user, mine),
            ROWS[rpc].request(new_id(), random_things()),
            type(ROWS[rpc].request("", mine))(),
        ]
        for request in requests:
            for shown in ([], *map(bearer_metadata, issuer.bad_tokens(mine.user).values())):
                failed = await ask(stub, rpc, request, shown)
                assert failed is not None
                answers.add(str(failed))
        assert len(answers) == 1
        assert "TOKEN_INVALID" in answers.pop()


@pytest.mark.case(n=19)
@pytest.mark.parametrize("rpc", RPCS)
async def test_every_caller_and_user_gets_the_expected_outcome(database_url: str, rpc: str) -> None:
    wrong = {}
    async with service(database_url) as stub:
        for caller in ("A", "B", "service"):
            for case in CASES:
                world = {
                    "A": await make_things(stub),
                    "B": await make_things(stub),
                    "?": random_things(),
                }
                shown = SHOWN if caller == "service" else bearer_metadata(token(world[caller].user))
                user = world[case.user].user if case.user else ""
                failed = await ask(stub, rpc, ROWS[rpc].request(user, world[case.things]), shown)
                outcome = failed.reason if failed else OK
                if outcome != expected(rpc, caller, case):
                    wrong[caller, case] = (outcome, expected(rpc, caller, case))
    assert not wrong


@pytest.mark.case(n=19)
@pytest.mark.parametrize("rpc", [rpc for rpc in RPCS if ROWS[rpc].missing != OK])
async def test_resource_of_another_user_fails_like_a_missing_one(
    database_url: str, rpc: str
) -> None:
    async with service(database_url) as stub:
        mine, theirs, nobodys = await make_things(stub), await make_things(stub), random_things()
        answers = []
        for things in (theirs, nobodys):
            failed = await ask(
                stub, rpc, ROWS[rpc].request(mine.user, things), bearer_metadata(token(mine.user))
            )
            answers.append(str(failed))
            for name, value in things._asdict().items():
                answers[-1] = answers[-1].replace(value, name)
        assert answers[0] == answers[1]
        # The other user's resource is unchanged.
        for other in ("GetSession", "GetMessage", "GetDocument"):
            assert await ask(stub, other, ROWS[other].request(theirs.user, theirs), SHOWN) is None


@pytest.mark.case(n=19)
@pytest.mark.parametrize("rpc", RPCS)
async def test_no_reply_contains_data_of_another_user(database_url: str, rpc: str) -> None:
    async with service(database_url) as stub:
        mine, theirs = await make_things(stub), await make_things(stub)
        replies: list[Any] = []
        for things in (theirs, mine):
            call = getattr(stub, rpc)(
                ROWS[rpc].request(mine.user, things), metadata=bearer_metadata(token(mine.user))
            )
            replies.clear()
            with suppress(aio.AioRpcError):
                if isinstance(call, Awaitable):
                    replies.append(await call)
                else:
                    while (reply := await call.read()) is not EOF:
                        replies.append(reply)
                        if rpc == "WatchMessages":
                            break
            call.cancel()
            text = "".join(map(str, replies))
            assert not [value for value in theirs if value in text]
        named = rpc not in WITHOUT_USER_ID and not ROWS[rpc].service_only and rpc not in ALLOWED
        assert bool(replies) == named, "the caller's own resources are returned"


@pytest.mark.case(n=19)
async def test_user_caller_finds_itself_only(database_url: str) -> None:
    async with service(database_url) as stub:
        mine, theirs, nobodys = await make_things(stub), await make_things(stub), random_things()
        shown = bearer_metadata(token(mine.user))
        for key in ("external_id", "email"):
            assert (
                await ask(
                    stub, "GetUser", user_pb2.GetUserRequest(**{key: getattr(mine, key)}), shown
                )
                is None
            )
            answers = {
                str(
                    await ask(
                        stub,
                        "GetUser",
                        user_pb2.GetUserRequest(**{key: getattr(other, key)}),
                        shown,
                    )
                )
                for other in (theirs, nobodys)
            }
            assert len(answers) == 1
            assert MISMATCH in answers.pop()
            assert (
                await ask(
                    stub, "GetUser", user_pb2.GetUserRequest(**{key: getattr(theirs, key)}), SHOWN
                )
                is None
            )


@pytest.mark.case(n=19)
async def test_user_caller_cannot_claim_or_probe_an_email_or_external_id(
    database_url: str,
) -> None:
    """The answer is the same for a taken, a free and the user's own value, and nothing changes."""
    async with service(database_url) as stub:
        mine, theirs, free = await make_things(stub), await make_things(stub), random_things()
        shown = bearer_metadata(token(mine.user))
        for key in ("external_id", "email"):
            for mask in ([], [key], ["name", key]):
                answers = set()
                for value in (*(getattr(things, key) for things in (theirs, free, mine)), ""):
                    if not value and not mask:
                        continue  # An empty mask leaves an unset field unchanged.
                    change = user_pb2.UpdateUserRequest(
                        user=user_pb2.User(name="new", **{key: value}),
                        update_mask=FieldMask(paths=mask),
                    )
                    answers.add(str(await ask(stub, "UpdateUser", change, shown)))
                assert len(answers) == 1
                assert SERVICE_ONLY in answers.pop()
        get = user_pb2.GetUserRequest(user_id=mine.user)
        user = (await stub.GetUser(get, metadata=shown)).user
        assert (user.email, user.external_id) == (mine.email, mine.external_id)
        assert user.name != "new"


@pytest.mark.case(n=19)
async def test_page_tokens_of_another_user_are_rejected(database_url: str) -> None:
    async with service(database_url) as stub:
        mine, theirs = await make_things(stub), await make_things(stub)
        for things in (mine, theirs):
            for _ in range(2):
                await stub.CreateSession(
                    session_pb2.CreateSessionRequest(user_id=things.user), metadata=SHOWN
                )
                await stub.AppendMessages(_append(things.user, things), metadata=SHOWN)
        shown, other = bearer_metadata(token(mine.user)), bearer_metadata(token(theirs.user))
        sessions = await stub.ListSessions(
            session_pb2.ListSessionsRequest(page_size=1), metadata=shown
        )
        messages = message_pb2.ListMessagesRequest(session_id=mine.session, page_size=1)
        page = await stub.ListMessages(messages, metadata=shown)
        assert sessions.next_page_token
        assert page.next_page_token
        for request in (
            session_pb2.ListSessionsRequest(page_size=1, page_token=sessions.next_page_token),
            session_pb2.ListSessionsRequest(page_size=1, page_token=page.next_page_token),
        ):
            failed = await ask(stub, "ListSessions", request, other)
            assert failed is not None
            assert failed.reason == "BAD_PAGE_TOKEN"
        for session in (mine.session, theirs.session):
            again = message_pb2.ListMessagesRequest(
                session_id=session, page_size=1, page_token=page.next_page_token
            )
            failed = await ask(stub, "ListMessages", again, other)
            assert failed is not None
            assert failed.reason == "BAD_PAGE_TOKEN"


@pytest.mark.parametrize(
    "rpc",
    [
        rpc
        for rpc in RPCS
        if rpc not in WITHOUT_USER_ID and not rpc.endswith(("Document", "Documents", "Chunks"))
    ],
)
async def test_no_caller_can_act_as_the_system_user(database_url: str, rpc: str) -> None:
    async with service(database_url) as stub:
        things = random_things()
        failed = await ask(stub, rpc, ROWS[rpc].request(NIL, things), SHOWN)
        assert failed is not None
        assert failed.reason == VIOLATION
        failed = await ask(stub, rpc, ROWS[rpc].request(NIL, things), bearer_metadata(token(NIL)))
        assert failed is not None
        assert failed.reason == "TOKEN_INVALID"


@pytest.mark.parametrize("rpc", RPCS)
async def test_authorisation_precedes_validation(database_url: str, rpc: str) -> None:
    async with service(database_url) as stub:
        mine = new_id()
        request = ROWS[rpc].request(new_id(), random_things())
        for field in request.DESCRIPTOR.fields:
            if (
                field.name != "user_id"
                and field.type == field.TYPE_STRING
                and not (field.is_repeated or field.containing_oneof)
            ):
                setattr(request, field.name, "no id\0")
        failed = await ask(stub, rpc, request, bearer_metadata(token(mine)))
        assert failed is not None
        assert failed.reason == (SERVICE_ONLY if ROWS[rpc].service_only else MISMATCH)
