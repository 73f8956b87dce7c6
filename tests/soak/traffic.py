"""Clients that append, retry, read, follow, edit, delete and cancel, and record every reply."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chathistory.v1 import document_pb2, message_pb2, session_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import StatusCode, aio

from chathistory_client import ChatHistoryClient, ChatHistoryError
from tests.soak.stack import Replica, Stack
from tests.soak.tally import GRPC_OWN, Tally
from tests.support.chat import new_id
from tests.support.clients import client_of
from tests.support.load import RETRYABLE_CODES, fast_reconnect_options
from tests.support.record import (
    Erasure,
    Record,
    SeenMessage,
    Sent,
    new_marked_message,
    seen_message,
)
from tests.support.servers import AsyncStub, channel

USER_COUNT = 12
SESSION_COUNT = 24
WORKER_COUNT = 20
LIBRARY_USERS = 4
"""Users of the client library, each with a session of its own and a follower of it."""
CALL_TIMEOUT_S = 5.0
COMPLETION_TIMEOUT_S = 30.0
"""Limit after the end of a round for the retries of an append."""
SUCCESS_TIMEOUT_S = 90.0
"""Limit for the retries of a call that a round cannot do without: longer than any fault."""
CANCELLED_CALLS = 20
"""The number of concurrent calls that one action cancels."""
KEPT_REQUESTS = 30
"""The number of acknowledged requests of a session that may be sent again."""


@dataclass
class TrackedSession:
    """A session that clients write to, and the record of their calls."""

    record: Record
    requests: list[tuple[Sent, message_pb2.AppendMessagesRequest]] = field(default_factory=list)
    """The newest acknowledged requests."""


class Document(NamedTuple):
    """A document that was acknowledged."""

    user_id: str
    id: str


class CallFailed(Exception):
    """A call failed with this reason, and was counted."""


class SoakAborted(Exception):
    """The soak cannot continue, which was added to the problems."""


class Traffic:
    """The load of one round, with users and sessions of its own."""

    def __init__(self, stack: Stack, tally: Tally, seed: str) -> None:
        self._stack = stack
        self._tally = tally
        self._rng = random.Random(seed)
        self._stubs: dict[str, AsyncStub] = {}
        self._users: list[str] = []
        self.sessions: list[TrackedSession] = []
        self.documents: list[Document] = []
        """The acknowledged documents."""
        self._document_owners: dict[str, str] = {}
        """The user of each document, acknowledged or not, by its id."""
        self._existing: list[TrackedSession] = []
        """Sessions that are known to be stored."""
        self._stopping = False
        self._stop_at = float("inf")
        self._actions: dict[Callable[[TrackedSession], Awaitable[None]], int] = {
            self._append: 34,
            self._append_many: 6,
            self._append_expecting: 6,
            self._retry_acknowledged: 8,
            self._append_mixed: 4,
            self._create_session: 1,
            self._read_context: 12,
            self._read_newest: 8,
            self._read_pages: 4,
            self._read_session: 4,
            self._list_sessions: 2,
            self._rename_session: 2,
            self._edit_message: 4,
            self._delete_message: 2,
            self._watch: 2,
            self._create_twin: 1,
            self._request_foreign_session: 3,
            self._cancel_many: 1,
            self._read_twice: 3,
            self._create_document: 2,
            self._search_documents: 4,
        }
        """The actions of workers and their weights."""

    @property
    def records(self) -> list[Record]:
        """The records of all sessions."""
        return [tracked.record for tracked in self.sessions]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Call continuously during a block; at its end let all clients complete their actions."""
        async with AsyncExitStack() as exits:
            for replica in self._stack.replicas:
                connection = await exits.enter_async_context(
                    channel(replica.client_proxy.address, **fast_reconnect_options())
                )
                self._stubs[replica.name] = ChatHistoryServiceStub(connection)
            target = "ipv4:" + ",".join(
                replica.client_proxy.address for replica in self._stack.replicas
            )
            library = await exits.enter_async_context(client_of(target))
            self._users = [await self._new_user() for _ in range(USER_COUNT)]
            for _ in range(SESSION_COUNT):
                await self._create_session(None)
            async with asyncio.TaskGroup() as group:
                for _ in range(WORKER_COUNT):
                    group.create_task(self._run_actions())
                for _ in range(LIBRARY_USERS):
                    group.create_task(self._use_library(library))
                yield
                self._stop_at = time.monotonic() + COMPLETION_TIMEOUT_S
                self._stopping = True

    async def delete_users(self) -> None:
        """Delete the users with all their data."""
        async with AsyncExitStack() as exits:
            for replica in self._stack.replicas:
                connection = await exits.enter_async_context(
                    channel(replica.client_proxy.address, **fast_reconnect_options())
                )
                self._stubs[replica.name] = ChatHistoryServiceStub(connection)
            for user_id in self._users:
                request = user_pb2.DeleteUserRequest(user_id=user_id, allow_missing=True)
                await self._call_until_success("DeleteUser", request, timeout=60.0)

    # --- Calls.

    async def _call(
        self,
        rpc: str,
        request: Any,
        *,
        timeout: float = CALL_TIMEOUT_S,
        uninterrupted: bool = False,
        expected_reason: str = "",
    ) -> Any:
        """Call a random replica.

        Unless the call is `uninterrupted`, a few calls have a deadline of milliseconds, and a few
        are cancelled.

        Args:
            rpc: The name of the method.
            request: Its request.
            timeout: Its deadline in seconds.
            uninterrupted: Whether to leave out the short deadlines and cancellations.
            expected_reason: A reason for which the call may fail, besides those that clients retry.

        Raises:
            CallFailed: The call failed or was cancelled.
        """
        tally = self._tally
        replica = self._rng.choice(self._stack.replicas)
        tally.calls[rpc] += 1
        draw = 1.0 if uninterrupted else self._rng.random()
        if draw < 0.04:
            timeout = self._rng.uniform(0.001, 0.1)
        call = getattr(self._stubs[replica.name], rpc)(request, timeout=timeout)
        if 0.04 <= draw < 0.08:
            asyncio.get_running_loop().call_later(self._rng.uniform(0, 0.05), call.cancel)
        try:
            reply = await call
        except aio.AioRpcError as error:
            reason = tally.count_failure(rpc, error)
            if error.code() not in RETRYABLE_CODES and reason != expected_reason:
                tally.add_problem("ERROR", f"{rpc}: {error.code().name} {reason} {error.details()}")
            raise CallFailed(reason) from None
        except asyncio.CancelledError:
            if (
                not call.cancelled()
                or (task := asyncio.current_task()) is None
                or task.cancelling()
            ):
                raise
            tally.cancelled += 1
            raise CallFailed("cancelled") from None
        if rpc == "AppendMessages":
            tally.last_acknowledged[replica.name] = time.monotonic()
        elif rpc == "SearchDocuments":
            tally.last_searched[replica.name] = time.monotonic()
        return reply

    async def _call_until_success(
        self, rpc: str, request: Any, timeout: float = CALL_TIMEOUT_S
    ) -> Any:
        """Repeat a call, which the round cannot do without, until it succeeds.

        Raises:
            SoakAborted: The call did not succeed within SUCCESS_TIMEOUT_S.
        """
        deadline = time.monotonic() + SUCCESS_TIMEOUT_S
        while True:
            with suppress(CallFailed):
                return await self._call(rpc, request, timeout=timeout, uninterrupted=True)
            if time.monotonic() > deadline:
                self._tally.add_problem(
                    "STUCK", f"{rpc} did not succeed in {SUCCESS_TIMEOUT_S:.0f} s"
                )
                raise SoakAborted
            await asyncio.sleep(self._rng.uniform(0.05, 0.3))

    async def _run_actions(self) -> None:
        actions, weights = list(self._actions), list(self._actions.values())
        while not self._stopping:
            [action] = self._rng.choices(actions, weights)
            try:
                await action(self._rng.choice(self._existing))
            except CallFailed:
                await asyncio.sleep(self._rng.uniform(0.02, 0.3))

    async def _new_user(self) -> str:
        user_id = new_id()
        await self._call_until_success(
            "CreateUser",
            user_pb2.CreateUserRequest(user=user_pb2.User(id=user_id, name="a user")),
        )
        return user_id

    # --- Writing.

    async def _append_until_acknowledged(
        self,
        tracked: TrackedSession,
        request: message_pb2.AppendMessagesRequest,
        *,
        new: Sequence[message_pb2.Message],
        uninterrupted: bool = False,
    ) -> message_pb2.AppendMessagesResponse | None:
        """Send new messages until they are acknowledged, and return the reply.

        None if the request was abandoned: then it is not known whether they are stored.
        """
        sent = tracked.record.send(new)
        while True:
            try:
                reply: message_pb2.AppendMessagesResponse = await self._call(
                    "AppendMessages", request, uninterrupted=uninterrupted
                )
            except CallFailed as failure:
                if failure.args[0] == "LAST_SEQ_MISMATCH":
                    return None  # An earlier attempt may have stored the messages.
                if (
                    not uninterrupted and self._rng.random() < 0.05
                ) or time.monotonic() > self._stop_at:
                    self._tally.abandoned += 1
                    return None
                await asyncio.sleep(self._rng.uniform(0.01, 0.2))
            else:
                sent.acknowledge(reply)
                self._tally.acknowledged += len(new)
                tracked.requests.append((sent, request))
                del tracked.requests[:-KEPT_REQUESTS]
                return reply

    def _append_request(
        self, tracked: TrackedSession, messages: Sequence[message_pb2.Message], **fields: Any
    ) -> message_pb2.AppendMessagesRequest:
        record = tracked.record
        return message_pb2.AppendMessagesRequest(
            user_id=record.user_id, session_id=record.session_id, messages=messages, **fields
        )

    def _new_messages(self, least: int, most: int) -> list[message_pb2.Message]:
        return [
            new_marked_message(self._rng.randint(40, 600))
            for _ in range(self._rng.randint(least, most))
        ]

    async def _append(self, tracked: TrackedSession) -> None:
        messages = self._new_messages(1, 3)
        await self._append_until_acknowledged(
            tracked, self._append_request(tracked, messages), new=messages
        )

    async def _append_many(self, tracked: TrackedSession) -> None:
        messages = self._new_messages(10, 100)
        await self._append_until_acknowledged(
            tracked, self._append_request(tracked, messages), new=messages
        )

    async def _append_expecting(self, tracked: TrackedSession) -> None:
        messages = self._new_messages(1, 2)
        expected = tracked.record.last_seq
        await self._append_until_acknowledged(
            tracked,
            self._append_request(tracked, messages, expected_last_seq=expected),
            new=messages,
        )

    async def _append_mixed(self, tracked: TrackedSession) -> None:
        """Append stored messages and new ones in one request."""
        small = [(old, request) for old, request in tracked.requests if len(old.ids) <= 50]
        if small:
            old, request = self._rng.choice(small)
            known = [message for message in request.messages if message.id in old.ids]
            new = self._new_messages(1, 3)
            reply = await self._append_until_acknowledged(
                tracked, self._append_request(tracked, [*known, *new]), new=new
            )
            if reply is not None:
                old.acknowledge(reply)

    async def _retry_acknowledged(self, tracked: TrackedSession) -> None:
        if not tracked.requests:
            return
        sent, request = self._rng.choice(tracked.requests)
        reply = await self._call("AppendMessages", request)
        self._tally.replays += len(reply.messages)
        sent.acknowledge(reply)
        if not all(entry.replayed for entry in reply.messages):
            self._tally.add_problem(
                "DOUBLED",
                f"session {tracked.record.session_id}: a retry was no replay: {sent.ids}",
            )

    async def _create_session(self, _tracked: TrackedSession | None) -> None:
        """Create a session by its first append, with or without an id, or before that."""
        user_id = self._rng.choice(self._users)
        messages = self._new_messages(1, 3)
        method = self._rng.choice(["append without id", "append with id", "CreateSession"])
        session_id = (
            new_id()
            if method != "append without id"
            else str(uuid.uuid5(uuid.UUID(user_id), messages[0].id))
        )
        tracked = TrackedSession(Record(user_id, session_id))
        request = self._append_request(
            tracked, messages, create_if_missing=method == "append with id"
        )
        # Before the call: a list may show the session before its reply arrives.
        self.sessions.append(tracked)
        if method == "append without id":
            request.session_id = ""
        elif method == "CreateSession":
            session = session_pb2.Session(id=session_id)
            await self._call_until_success(
                "CreateSession", session_pb2.CreateSessionRequest(user_id=user_id, session=session)
            )
        if (
            await self._append_until_acknowledged(
                tracked, request, new=messages, uninterrupted=True
            )
            is not None
        ):
            self._existing.append(tracked)

    async def _create_twin(self, tracked: TrackedSession) -> None:
        """Create a session with the ids of another user's session: ids are unique per user only."""
        user_id = self._rng.choice(self._users)
        if tracked.requests and not self._may_exist(user_id, tracked.record.session_id):
            twin = TrackedSession(Record(user_id, tracked.record.session_id))
            self.sessions.append(twin)
            messages = list(tracked.requests[0][1].messages)
            request = self._append_request(twin, messages, create_if_missing=True)
            if (
                await self._append_until_acknowledged(
                    twin, request, new=messages, uninterrupted=True
                )
                is not None
            ):
                self._existing.append(twin)

    def _may_exist(self, user_id: str, session_id: str) -> bool:
        """Return whether the user has such a session, or is creating it."""
        return any(
            tracked.record.user_id == user_id and tracked.record.session_id == session_id
            for tracked in self.sessions
        )

    async def _request_foreign_session(self, tracked: TrackedSession) -> None:
        """Request another user's session: the reply must be as for a missing one."""
        user_id, session_id = self._rng.choice(self._users), tracked.record.session_id
        if self._may_exist(user_id, session_id):
            return
        name = Record(user_id, session_id).name
        session = session_pb2.Session(id=session_id, title="not mine")
        calls: dict[str, Any] = {
            "GetSession": session_pb2.GetSessionRequest(**name),
            "UpdateSession": session_pb2.UpdateSessionRequest(user_id=user_id, session=session),
            "ListMessages": message_pb2.ListMessagesRequest(**name),
            "GetContext": message_pb2.GetContextRequest(**name),
            "AppendMessages": message_pb2.AppendMessagesRequest(
                messages=self._new_messages(1, 2), **name
            ),
        }
        rpc, request = self._rng.choice(list(calls.items()))
        try:
            await self._call(rpc, request, expected_reason="SESSION_NOT_FOUND")
        except CallFailed:
            return
        if not self._may_exist(user_id, session_id):
            self._tally.add_problem(
                "FOREIGN", f"{rpc} gave user {user_id} session {session_id} of another user"
            )

    async def _rename_session(self, tracked: TrackedSession) -> None:
        edit = tracked.record.edit("", new_id())
        session = session_pb2.Session(id=tracked.record.session_id, title=edit.value)
        request = session_pb2.UpdateSessionRequest(user_id=tracked.record.user_id, session=session)
        await self._call("UpdateSession", request)
        edit.acknowledged = time.monotonic()

    def _some_message(self, tracked: TrackedSession) -> str:
        sent, _ = self._rng.choice(tracked.requests)
        return self._rng.choice(sent.ids)

    async def _edit_message(self, tracked: TrackedSession) -> None:
        if tracked.requests:
            id_ = self._some_message(tracked)
            edit = tracked.record.edit(id_, f"{id_} edited {new_id()}")
            edited = message_pb2.Message(id=id_, content=edit.value)
            request = message_pb2.UpdateMessageRequest(message=edited, **tracked.record.name)
            try:
                await self._call("UpdateMessage", request, expected_reason="MESSAGE_NOT_FOUND")
            except CallFailed as failure:
                if failure.args[0] == "MESSAGE_NOT_FOUND" and not tracked.record.erasing(id_):
                    self._tally.add_problem(
                        "LOST", f"session {tracked.record.session_id}: {id_} could not be edited"
                    )
                raise
            edit.acknowledged = time.monotonic()

    async def _delete_message(self, tracked: TrackedSession) -> None:
        if not tracked.requests:
            return
        erasure = Erasure(self._some_message(tracked))
        if tracked.record.erasing(erasure.id):
            return
        tracked.record.erasures.append(erasure)
        request = message_pb2.DeleteMessageRequest(
            message_id=erasure.id, allow_missing=True, **tracked.record.name
        )
        await self._call("DeleteMessage", request)
        erasure.acknowledged = time.monotonic()

    # --- Reading.

    async def _list(
        self, tracked: TrackedSession, **fields: Any
    ) -> message_pb2.ListMessagesResponse:
        page: message_pb2.ListMessagesResponse = await self._call(
            "ListMessages",
            message_pb2.ListMessagesRequest(
                **{"page_size": self._rng.randint(1, 60)} | tracked.record.name | fields
            ),
        )
        return page

    async def _read_context(self, tracked: TrackedSession) -> None:
        started_at = time.monotonic()
        request = message_pb2.GetContextRequest(
            max_messages=self._rng.randint(1, 60), **tracked.record.name
        )
        tracked.record.saw_context(started_at, await self._call("GetContext", request))

    async def _read_newest(self, tracked: TrackedSession, **fields: Any) -> None:
        started_at = time.monotonic()
        tracked.record.saw_newest(
            started_at, await self._list(tracked, order=message_pb2.MESSAGE_ORDER_DESC, **fields)
        )

    async def _read_twice(self, tracked: TrackedSession) -> None:
        """Read, append, and read the same again: the reply of the first read would be stale."""
        await self._read_newest(tracked, page_size=20)
        await self._append(tracked)
        await self._read_newest(tracked, page_size=20)

    async def _read_pages(self, tracked: TrackedSession) -> None:
        """Read the first pages of a session."""
        after, token = 0, ""
        for _ in range(self._rng.randint(1, 4)):
            started_at = time.monotonic()
            page = await self._list(tracked, page_token=token)
            tracked.record.saw_page(started_at, after, page)
            token = page.next_page_token
            if not token:
                return
            after = max((message.seq for message in page.messages), default=after)

    async def _read_session(self, tracked: TrackedSession) -> None:
        started_at = time.monotonic()
        tracked.record.saw_session(
            started_at,
            (
                await self._call("GetSession", session_pb2.GetSessionRequest(**tracked.record.name))
            ).session,
        )

    async def _list_sessions(self, tracked: TrackedSession) -> None:
        user_id = tracked.record.user_id
        known = {
            session.record.session_id
            for session in self._existing
            if session.record.user_id == user_id
        }
        reply = await self._call(
            "ListSessions", session_pb2.ListSessionsRequest(user_id=user_id, page_size=1000)
        )
        shown = {session.id for session in reply.sessions}
        if foreign := {id_ for id_ in shown if not self._may_exist(user_id, id_)}:
            self._tally.add_problem(
                "FOREIGN",
                f"the list of user {user_id} shows sessions of other users: {sorted(foreign)}",
            )
        if missing := known - shown:
            self._tally.add_problem(
                "STALE", f"the list of user {user_id} lacks sessions {sorted(missing)}"
            )

    async def _cancel_many(self, tracked: TrackedSession) -> None:
        """Cancel many concurrent calls before their replies: their resources must be released."""
        replica: Replica = self._rng.choice(self._stack.replicas)
        stub, user_id = self._stubs[replica.name], tracked.record.user_id
        reads: list[Callable[[], Any]] = [
            lambda: stub.GetSession(
                session_pb2.GetSessionRequest(**tracked.record.name), timeout=CALL_TIMEOUT_S
            ),
            lambda: stub.ListSessions(
                session_pb2.ListSessionsRequest(user_id=user_id), timeout=CALL_TIMEOUT_S
            ),
            lambda: stub.GetContext(
                message_pb2.GetContextRequest(**tracked.record.name), timeout=CALL_TIMEOUT_S
            ),
        ]
        calls = [self._rng.choice(reads)() for _ in range(CANCELLED_CALLS)]
        self._tally.calls["cancelled together"] += CANCELLED_CALLS
        await asyncio.sleep(self._rng.uniform(0, 0.05))
        self._tally.cancelled += sum(call.cancel() for call in calls)
        await asyncio.gather(*calls, return_exceptions=True)

    async def _watch(self, tracked: TrackedSession) -> None:
        """Follow a session for some seconds, from a random seq."""
        started_at, after = time.monotonic(), self._rng.randint(0, tracked.record.last_seq)
        replica: Replica = self._rng.choice(self._stack.replicas)
        self._tally.calls["WatchMessages"] += 1
        request = message_pb2.WatchMessagesRequest(after_seq=after, **tracked.record.name)
        seen: list[SeenMessage] = []
        try:
            async for reply in self._stubs[replica.name].WatchMessages(
                request, timeout=self._rng.uniform(0.2, 8)
            ):
                seen.append(seen_message(reply.message))  # noqa: PERF401 - kept if the stream fails
        except aio.AioRpcError as error:
            if error.code() != StatusCode.DEADLINE_EXCEEDED:
                reason = self._tally.count_failure("WatchMessages", error)
                if error.code() == StatusCode.OUT_OF_RANGE:
                    self._tally.add_problem("LOST", f"WatchMessages: {reason} {error.details()}")
        tracked.record.saw_stream(started_at, after, seen)

    # --- Documents.

    async def _create_document(self, _tracked: TrackedSession) -> None:
        document = Document(self._rng.choice(self._users), new_id())
        self._document_owners[document.id] = document.user_id
        request = document_pb2.CreateDocumentRequest(
            user_id=document.user_id,
            document=document_pb2.Document(id=document.id, title="notes"),
            chunks=[
                document_pb2.DocumentChunk(text=f"{word} wade in {document.id}")
                for word in ("Herons", "Storks", "Flamingos")
            ],
        )
        await self._call("CreateDocument", request)
        self.documents.append(document)

    async def _search_documents(self, tracked: TrackedSession) -> None:
        """Search a user's documents, none of which may be missing an owner, or have another one."""
        user_id = tracked.record.user_id
        # No two queries are equal: one that is computed while two search processes are killed is
        # blocked.
        query = f"which bird wades in {new_id()}"
        request = document_pb2.SearchDocumentsRequest(user_id=user_id, query=query)
        reply = await self._call("SearchDocuments", request)
        for hit in reply.hits:
            if self._document_owners.get(hit.document.id) != user_id:
                self._tally.add_problem(
                    "FOREIGN", f"a search of user {user_id} returned document {hit.document.id}"
                )

    # --- Users of the client library.

    async def _use_library(self, library: ChatHistoryClient) -> None:
        """Append and read as a chatbot does; every error that the library raises is a problem."""
        tracked = TrackedSession(Record(self._rng.choice(self._users), new_id()))
        self.sessions.append(tracked)
        record = tracked.record
        follower: asyncio.Task[None] | None = None
        seen: list[SeenMessage] = []
        started_at = time.monotonic()
        while not self._stopping or follower is None:
            messages = self._new_messages(1, 2)
            sent = record.send(messages)
            with suppress(ChatHistoryError):
                sent.acknowledge(
                    await self._count_library_call(
                        library.append_messages(
                            messages=messages, create_if_missing=True, **record.name
                        )
                    )
                )
                self._tally.acknowledged += len(messages)
                if follower is None:
                    self._existing.append(tracked)
                    follower = asyncio.create_task(self._follow(library, record, seen))
                asked = time.monotonic()
                record.saw_context(
                    asked,
                    await self._count_library_call(
                        library.get_context(max_messages=20, **record.name)
                    ),
                )
            await asyncio.sleep(self._rng.uniform(0, 0.2))
        await self._catch_up(record, seen)
        follower.cancel()
        await asyncio.wait([follower])
        if not follower.cancelled():
            self._tally.add_problem("ERROR", f"a follower ended: {follower.exception()!r}")
        record.saw_stream(started_at, 0, seen)

    async def _count_library_call(self, call: Awaitable[Any]) -> Any:
        self._tally.library_calls += 1
        try:
            return await call
        except ChatHistoryError as error:
            self._tally.library_errors[error.code.name, error.reason or GRPC_OWN] += 1
            self._tally.add_problem(
                "ERROR", f"the library: {error.code.name} {error.reason} {error.message}"
            )
            raise

    @staticmethod
    async def _follow(library: ChatHistoryClient, record: Record, seen: list[SeenMessage]) -> None:
        async for message in library.watch_messages(**record.name):
            seen.append(seen_message(message))  # noqa: PERF401 - read concurrently

    async def _catch_up(self, record: Record, seen: list[SeenMessage]) -> None:
        """Wait until a follower has received all acknowledged messages."""
        deadline = time.monotonic() + COMPLETION_TIMEOUT_S
        while not seen or seen[-1][0] < record.last_seq:
            if time.monotonic() > deadline:
                self._tally.add_problem(
                    "STALE", f"session {record.session_id}: a follower did not catch up"
                )
                return
            await asyncio.sleep(0.05)
